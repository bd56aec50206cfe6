"""`kdcache.views`: augmentation that is replayed, so that the student sees exactly what the teacher saw.

    replay = kdcache.views.named("crop4,hflip", seed=0)        # a pipeline that ships with kdcache
    replay = kdcache.views.replayable(transform, seed=0)       # torchvision, albumentations, timm, any function
    kdcache.precompute(teacher, dataset, "teacher/", augment=replay, views=4)
    joined = kdcache.join(dataset, kdcache.open("teacher/"), augment=replay)

The **shared view** is what the pipeline makes of an item's first input (a uint8 image or a raw tensor). What each model
does to it afterwards, normalisation and resizing, is its own: the `transform=` of `precompute` and of `join`.
"""

from __future__ import annotations

from typing import Any

from kdcache.errors import UsageError
from kdcache.train.mixing import Mix
from kdcache.train.pipelines import named
from kdcache.train.replay import Replay, Transform, check_replay, seeded

__all__ = ["Mix", "Replay", "check_replay", "named", "replayable", "seeded"]


def replayable(transform: Transform, *, seed: int = 0, name: str | None = None, mix: Mix | None = None) -> Replay:
    """A transform whose every draw is a function of (seed, sample id, view) alone.

    Args:
        transform: called with the first input of an item; torchvision v1 and v2, timm, an albumentations pipeline
            (called with `image=`), or any function. It may draw from torch, `numpy.random` and `random`, or take a
            parameter `rng` (a numpy.random.Generator) or `generator` (a torch.Generator).
        seed: of the cache.
        name: for the provenance; by default what the transform calls itself.
        mix: MixUp or CutMix over the finished views.

    Raises:
        UsageError: not callable.

    >>> import torch
    >>> replay = replayable(lambda x: x + torch.rand(()), seed=3)
    >>> bool(replay(torch.zeros(1), 7, 0) == replay(torch.zeros(1), 7, 0))
    True
    >>> bool(replay(torch.zeros(1), 7, 0) == replay(torch.zeros(1), 7, 1))
    False
    """
    if isinstance(transform, Replay):
        raise UsageError("the transform is replayed already; pass it as it is")
    if not callable(transform):
        raise UsageError(f"a transform is called with an input, found a {type(transform).__name__}")
    return Replay(transform, seed=seed, name=name or describe(transform), mix=mix)


def describe(transform: Any) -> str:
    """A transform as text, without memory addresses or paths."""
    name = getattr(transform, "__qualname__", None)
    if name is not None:
        return f"{getattr(transform, '__module__', '')}.{name}"
    text = " ".join(repr(transform).split())
    private = " at 0x" in text or any(mark in text for mark in ("/", "\\", "~"))  # an address, or perhaps a path
    return type(transform).__qualname__ if private else text[:2000]
