"""Replayed transforms: every random draw of view v of sample s is a function of (seed, sample id, v) alone.

Around the transform, the global generators of torch, NumPy and `random` are set from that seed, and put back
afterwards; transforms with generators of their own get those set (albumentations, and functions with a parameter
`rng` or `generator`). Setting them takes 14 us a view; keeping them and putting them back takes 70 us more, most of it
for NumPy's, which is why a batch does that once. What cannot be set this way, a generator hidden in a closure or a
state that the transform keeps, is found by `check_replay`, which draws some samples twice.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, final

import numpy as np
import torch

from kdcache.errors import DataError, KDCacheError
from kdcache.format.identity import input_digest, show_id
from kdcache.format.view_seed import view_seed
from kdcache.train.mixing import Mix

Transform = Callable[..., Any]
# The packages whose version decides what a transform draws and computes.
_DRAWING = ("torch", "torchvision", "albumentations", "timm", "numpy", "PIL", "cv2", "kdcache")


@final
class Replay:
    """A transform whose draws are replayed, made by `kdcache.views.replayable` or `kdcache.views.named`.

    Args:
        transform: from an item's first input to the shared view; None leaves it (only mixed).
        seed: of the cache.
        name: what the pipeline is called, in provenance and errors.
        is_named: whether `name` is the text of a pipeline that ships with kdcache, so that a student can build it.
        mix: what mixes two shared views, if anything.

    Pickled as it is: a transform that shall reach spawned workers must pickle.
    """

    def __init__(
        self, transform: Transform | None, *, seed: int, name: str, is_named: bool = False, mix: Mix | None = None
    ) -> None:
        view_seed(seed, 0, 0)  # refuses a seed out of range
        self.transform = transform
        self.seed = seed
        self.name = name
        self.is_named = is_named
        self.mix = mix
        self._call = _caller(transform)

    def __call__(self, value: Any, sample_id: Any, view: int) -> Any:
        """The shared view, before any mixing.

        Args:
            value: the first input of the item: a tensor, an array, a PIL image.
            sample_id: of the sample, as the cache stores it.
            view: its number.

        Raises:
            DataError: the transform failed; the message names it and the sample.
        """
        return self.each([value], [sample_id], [view])[0]

    def each(self, values: Sequence[Any], sample_ids: Sequence[Any], views: Sequence[int]) -> list[Any]:
        """The shared views of some samples, each as a call gives it; generators are put back once, at the end."""
        if self.transform is None:
            return list(values)
        with _kept_generators():
            return [self._draw(*sample) for sample in zip(values, sample_ids, views, strict=True)]

    def _draw(self, value: Any, sample_id: Any, view: int) -> Any:
        key = view_seed(self.seed, sample_id, view)
        _set_generators(key)
        try:
            return self._call(value, key)
        except KDCacheError:
            raise
        except Exception as error:
            raise DataError(
                f"the view pipeline {self.name} failed on sample {show_id(sample_id)} (view {view}): "
                f"{type(error).__name__}: {error}. It gets the first input of an item, here a "
                f"{_outline(value)}"
            ) from error

    def describe(self) -> dict[str, Any]:
        """For the provenance: pipeline, seed and the versions of the libraries that draw and compute."""
        return {
            "augment": self.name,
            "named": self.is_named,
            "seed": self.seed,
            "mix": None if self.mix is None else self.mix.name,
            "versions": _versions(self.transform),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.transform, self.seed, self.name, self.is_named, self.mix)


@contextmanager
def seeded(key: bytes) -> Iterator[None]:
    """Sets the global generators of torch (CPU), NumPy and `random` from a key of 32 bytes; puts them back after.

    torch's CPU generator takes 32 bits of a seed only (init of MT19937), the others take all of it.
    """
    with _kept_generators():
        _set_generators(key)
        yield


@contextmanager
def _kept_generators() -> Iterator[None]:
    before = torch.default_generator.get_state(), np.random.get_state(legacy=False), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def _set_generators(key: bytes) -> None:
    torch.default_generator.manual_seed(int.from_bytes(key[:4], "little"))
    np.random.seed(np.frombuffer(key, "<u4"))
    # From the other end: both are MT19937 with one way of seeding, and would draw the same numbers from one key.
    random.seed(int.from_bytes(key, "big"))


def check_replay(replay: Replay, samples: Sequence[tuple[Any, Any]], views: Sequence[int]) -> None:
    """Draws the views of some samples twice, in two orders and from other states of the global generators.

    Args:
        replay: the pipeline.
        samples: (first input, sample id) pairs.
        views: numbers of the views to draw.

    Raises:
        DataError: two drawings differ; the message names the transform, of a composed one the part.
    """
    if replay.transform is None:
        return
    wanted = [(value, sample_id, view) for view in views for value, sample_id in samples]
    culprit = _unsteady(replay, wanted)
    if culprit is None:
        return
    part = _unsteady_part(replay.transform, replay.seed, wanted)
    name, inside = (replay.name, "") if part is None else (part, f" (part of {replay.name})")
    raise DataError(
        f"the transform {name}{inside} is not replayed: view {culprit[1]} of sample {show_id(culprit[0])} came out "
        "differently when it was drawn again. It keeps a state of its own or draws from a generator that kdcache "
        "cannot set. Let it draw from torch, numpy.random or random, or take a parameter `rng` "
        "(numpy.random.Generator) or `generator` (torch.Generator)"
    )


def check_alike(replay: Replay, samples: Sequence[tuple[Any, Any]], views: Sequence[int]) -> None:
    """Refuses a pipeline whose views do not stack to batches.

    Args:
        replay: the pipeline.
        samples: (first input, sample id) pairs.
        views: numbers of the views to draw.

    Raises:
        DataError: two views differ in dtype or shape, naming both samples; or they are no arrays.
    """
    drawn = [(value, sample_id, view) for view in views for value, sample_id in samples]
    values = replay.each(*map(list, zip(*drawn, strict=True)))
    for value, (_, sample_id, view) in zip(values, drawn, strict=True):
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise DataError(
                f"the view pipeline {replay.name} makes a {type(value).__name__} of sample {show_id(sample_id)}, and "
                "batches need tensors or arrays: end it with a conversion"
            )
        if (value.dtype, value.shape) != (values[0].dtype, values[0].shape):
            raise DataError(
                f"the view pipeline {replay.name} makes a {_outline(values[0])} of sample {show_id(drawn[0][1])} (view "
                f"{drawn[0][2]}) and a {_outline(value)} of sample {show_id(sample_id)} (view {view}), and batches "
                "need one dtype and shape: crop or resize, and convert, at its end"
            )


def _unsteady(replay: Replay, wanted: Sequence[tuple[Any, Any, int]]) -> tuple[Any, int] | None:
    """The first (sample id, view) that comes out otherwise when drawn again."""
    with seeded(b"1" * 32):
        first = [input_digest(replay(*sample)) for sample in wanted]
    with seeded(b"2" * 32):
        again = [input_digest(replay(*sample)) for sample in reversed(wanted)][::-1]
    for (_, sample_id, view), one, other in zip(wanted, first, again, strict=True):
        if one != other:
            return sample_id, view
    return None


def _unsteady_part(transform: Any, seed: int, wanted: Sequence[tuple[Any, Any, int]]) -> str | None:
    """The name of the innermost part that comes out otherwise when drawn again; each gets what the one before gives."""
    for part in _parts(transform):
        alone = Replay(part, seed=seed, name=_name_of(part))
        try:
            if _unsteady(alone, wanted) is not None:
                return _unsteady_part(part, seed, wanted) or alone.name
            wanted = [(alone(*sample), *sample[1:]) for sample in wanted]
        except DataError:  # it cannot be called alone
            return None
    return None


def _parts(transform: Any) -> list[Any]:
    parts = getattr(transform, "transforms", None)
    return [part for part in parts if callable(part)] if isinstance(parts, (list, tuple)) else []


def _name_of(transform: Any) -> str:
    return str(getattr(transform, "__qualname__", None) or type(transform).__qualname__)


def _caller(transform: Any) -> Callable[[Any, bytes], Any]:
    """How a transform is called with a value and a key, by what it is."""
    if transform is None:
        return lambda value, key: value
    if hasattr(transform, "set_random_state") and hasattr(transform, "py_random"):
        return lambda value, key: _call_albumentations(transform, value, key)
    try:
        parameters = inspect.signature(transform).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    if "rng" in parameters:
        return lambda value, key: transform(value, rng=np.random.default_rng(int.from_bytes(key, "little")))
    if "generator" in parameters:
        return lambda value, key: transform(
            value, generator=torch.Generator().manual_seed(int.from_bytes(key[:4], "little"))
        )
    return lambda value, key: transform(value)


def _call_albumentations(transform: Any, value: Any, key: bytes) -> Any:
    """An albumentations pipeline takes `image=` (H, W, C) arrays and draws from generators of its own."""
    number = int.from_bytes(key, "little")
    transform.set_random_state(np.random.default_rng(number), random.Random(number))
    return transform(image=np.asarray(value))["image"]


def _versions(transform: Any) -> dict[str, str]:
    """Versions of the packages that the pipeline's parts come from, and of those that hold the generators."""
    found = {"torch", "numpy", "kdcache"}
    waiting = [transform]
    while waiting:
        part = waiting.pop()
        waiting.extend(_parts(part))
        found.add((getattr(part, "__module__", None) or type(part).__module__).partition(".")[0])
        found.update(getattr(part, "packages", ()))  # what a part of ours calls
    if found & {"torchvision", "timm"}:
        found.update(("PIL", "torchvision"))
    if "albumentations" in found:
        found.add("cv2")
    names = [name for name in _DRAWING if name in found]
    return {name: str(getattr(import_module(name), "__version__", "")) for name in names}


def _outline(value: Any) -> str:
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    return (
        type(value).__name__ if dtype is None else f"{type(value).__name__} of {dtype} and shape {tuple(shape or ())}"
    )


def _restore(transform: Any, seed: int, name: str, is_named: bool, mix: Mix | None) -> Replay:
    return Replay(transform, seed=seed, name=name, is_named=is_named, mix=mix)
