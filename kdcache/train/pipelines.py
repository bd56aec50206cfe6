"""View pipelines by name: `crop4,hflip`, `rrc32,hflip`, `randaug`, `shift2,noise0.1,erase`, `hflip,mixup0.2`.

Parts are applied in order; a number behind a name is its parameter. Those on images come from torchvision (extra
`vision`); `shift`, `noise` and `erase` need torch alone. MixUp or CutMix may stand at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from kdcache.errors import MissingExtraError
from kdcache.train.mixing import Mix
from kdcache.train.pipeline_text import MIXES, canonical, parsed
from kdcache.train.replay import Replay
from kdcache.train.tensor_transforms import Erase, Noise, Shift

_VISION = ("torchvision", "PIL")  # packages that a part calls, for the provenance


def named(text: str, *, seed: int = 0) -> Replay:
    """The pipeline of a text such as "crop4,hflip", replayed.

    Args:
        text: comma-separated names: `crop` (zero padding, 4), `hflip`, `rrc` (side; the image's own), `randaug`
            (magnitude, 9), `shift` (pixels, 2), `noise` (standard deviation, 0.1), `erase` (largest share of a side,
            0.5), and at the end `mixup` (alpha, 0.2) or `cutmix` (alpha, 1), each with an optional number.
        seed: of the cache.

    Raises:
        UsageError: an unknown name, a number that cannot be meant, or a mix that is not last.
        MissingExtraError: torchvision is missing, or does not fit torch.

    >>> named("shift2,noise0.05").name
    'shift2,noise0.05'
    """
    parts: list[Any] = []
    mix: Mix | None = None
    for name, number in parsed(text):
        if name in MIXES:
            assert number is not None
            mix = Mix(name, number)
        else:
            parts.append(_PARTS[name](number))
    transform = None if not parts else parts[0] if len(parts) == 1 else Chain(tuple(parts))
    return Replay(transform, seed=seed, name=canonical(text), is_named=True, mix=mix)


@final
@dataclass(frozen=True)
class Chain:
    """Transforms one after the other; pickles if they do."""

    transforms: tuple[Callable[[Any], Any], ...]

    def __call__(self, value: Any) -> Any:
        """What the last one returns."""
        for transform in self.transforms:
            value = transform(value)
        return value


@final
@dataclass(frozen=True)
class OwnSizeCrop:
    """torchvision's random resized crop to the input's own height and width: batches stay batches."""

    packages: ClassVar[tuple[str, ...]] = _VISION

    def __call__(self, image: Any) -> Any:
        """An image of the size of `image`."""
        v2 = torchvision_transforms()
        height, width = v2.functional.get_size(image)
        return v2.RandomResizedCrop((height, width), antialias=True)(image)


@final
@dataclass(frozen=True)
class RandAugment:
    """torchvision's RandAugment (Cubuk et al., 2020); tensors of floats in [0, 1] pass through 256 levels."""

    magnitude: int = 9
    packages: ClassVar[tuple[str, ...]] = _VISION

    def __call__(self, image: Any) -> Any:
        """The type of `image`."""
        augment = torchvision_transforms().RandAugment(magnitude=self.magnitude)
        if isinstance(image, torch.Tensor) and image.is_floating_point():
            levels = (image * 255).round().clamp(0, 255).to(torch.uint8)
            return augment(levels).to(image.dtype) / 255
        return augment(image)


def torchvision_transforms() -> Any:
    """`torchvision.transforms.v2`.

    Raises:
        MissingExtraError: it is missing, or built for another torch.
    """
    try:
        from torchvision.transforms import v2
    except ModuleNotFoundError:
        raise MissingExtraError(
            "crop, hflip, rrc and randaug come from torchvision: pip install 'kdcache[vision]'"
        ) from None
    except RuntimeError as error:  # its compiled operators do not load beside this torch
        raise MissingExtraError(
            f"the installed torchvision does not fit torch {torch.__version__} ({error}): install the pair of one "
            "release and one build (both for the CPU, or both for CUDA)"
        ) from error
    return v2


@final
@dataclass(frozen=True)
class _PaddedCrop:
    """Zero padding on all sides, then a random crop of the image's own size, by torchvision."""

    padding: int
    packages: ClassVar[tuple[str, ...]] = _VISION

    def __call__(self, image: Any) -> Any:
        v2 = torchvision_transforms()
        height, width = v2.functional.get_size(image)
        return v2.RandomCrop((height, width), padding=self.padding)(image)


def _resized_crop(v2: Any, side: float | None) -> Any:
    return OwnSizeCrop() if side is None else v2.RandomResizedCrop(int(side), antialias=True)


_PARTS: dict[str, Callable[[Any], Any]] = {
    "crop": lambda padding: (torchvision_transforms(), _PaddedCrop(int(padding)))[1],
    "hflip": lambda _: torchvision_transforms().RandomHorizontalFlip(),
    "rrc": lambda side: _resized_crop(torchvision_transforms(), side),
    "randaug": lambda n: (torchvision_transforms(), RandAugment(int(n)))[1],
    "shift": lambda n: Shift(int(n)),
    "noise": Noise,
    "erase": Erase,
}
