"""MixUp and CutMix, replayed: partner and ratio of view v of sample s come from (seed, sample id, v) alone.

MixUp (Zhang et al., 2018): x = r * a + (1 - r) * b with r from Beta(alpha, alpha). CutMix (Yun et al., 2019): a box of
b, whose share of the image is 1 - r, is pasted into a; r is then what is left of a, exactly. The label is a with weight
r and b with 1 - r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch

from kdcache.errors import DataError, UsageError
from kdcache.format.view_seed import view_seed


@final
@dataclass(frozen=True)
class Mix:
    """A way to mix two shared views.

    Attributes:
        kind: "mixup" or "cutmix".
        alpha: of the Beta distribution that the ratio is drawn from, above 0.
    """

    kind: Literal["mixup", "cutmix"]
    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1e6:
            raise UsageError(f"{self.kind} draws its ratio from Beta(a, a) with a above 0, found {self.alpha}")

    @property
    def name(self) -> str:
        """As in the text of a pipeline."""
        return f"{self.kind}{self.alpha:.12g}"

    def draw(self, seed: int, sample_id: Any, view: int, samples: int) -> MixDraw:
        """Partner, ratio and place for view `view` of a sample, out of a cache of `samples` samples."""
        key = view_seed(seed, sample_id, view, purpose="mix")
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
        # Raw words of PCG64, whose stream NumPy promises to keep, where whole numbers are drawn.
        words = rng.bit_generator.random_raw(3)
        partner = int(words[0]) * samples >> 64
        ratio = float(rng.beta(self.alpha, self.alpha))
        return MixDraw(partner, ratio, int(words[1]) / 2**64, int(words[2]) / 2**64)

    def __call__(self, first: Any, second: Any, draw: MixDraw) -> tuple[Any, float]:
        """The mixed view, of the type of `first`, and the share of `first` in it.

        Args:
            first: (..., H, W) tensor or (H, W, C) array of numbers.
            second: the partner's, of equal shape and dtype.
            draw: from `draw`.

        Raises:
            DataError: views that are no arrays, or of different shapes or dtypes.
        """
        _check_pair(first, second)
        if self.kind == "mixup":
            return _blend(first, second, draw.ratio), draw.ratio
        height, width = _image_shape(first)
        cut = (1.0 - draw.ratio) ** 0.5
        tall, wide = round(height * cut), round(width * cut)
        top, left = int(draw.y * (height - tall + 1)), int(draw.x * (width - wide + 1))
        rows, columns = slice(top, top + tall), slice(left, left + wide)
        mixed = first.clone() if isinstance(first, torch.Tensor) else first.copy()
        place = (..., rows, columns) if isinstance(first, torch.Tensor) else (rows, columns)
        mixed[place] = second[place]
        return mixed, 1.0 - tall * wide / (height * width)


@final
@dataclass(frozen=True)
class MixDraw:
    """What was drawn: the partner's position among the cache's samples, the ratio, and the box's place in [0, 1)."""

    partner: int
    ratio: float
    y: float
    x: float


def _check_pair(first: Any, second: Any) -> None:
    for value in (first, second):
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise DataError(
                f"MixUp and CutMix mix tensors and arrays, found a {type(value).__name__}; end the view pipeline with "
                "a conversion"
            )
    if first.shape != second.shape or first.dtype != second.dtype:
        raise DataError(
            f"MixUp and CutMix need views of equal shape and dtype, found {first.dtype} {tuple(first.shape)} and "
            f"{second.dtype} {tuple(second.shape)}; crop or resize them in the view pipeline"
        )


def _image_shape(value: Any) -> tuple[int, int]:
    if value.ndim < 2:
        raise DataError(f"CutMix needs images, found a view of shape {tuple(value.shape)}; use mixup")
    shape = value.shape[-2:] if isinstance(value, torch.Tensor) else value.shape[:2]
    return int(shape[0]), int(shape[1])


def _blend(first: Any, second: Any, ratio: float) -> Any:
    """ratio * first + (1 - ratio) * second in float32; integers are rounded back."""
    if isinstance(first, torch.Tensor):
        mixed = first.float() * ratio + second.float() * (1.0 - ratio)
        return (mixed if first.is_floating_point() else mixed.round()).to(first.dtype)
    wide = first.astype(np.float32) * np.float32(ratio) + second.astype(np.float32) * np.float32(1.0 - ratio)
    return (wide if first.dtype.kind == "f" else wide.round()).astype(first.dtype)
