"""The last layers of factored teachers that this process knows, by the sha256 of their `head.h5`.

Rows carry that hash and nothing else of the layer, so a batch that leaves a worker stays small. Whoever reads a cache
names here where its layer can be read; the first row that is decoded reads it, checks it, and keeps it for all caches
of that teacher until the process ends, once on each device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import KDCacheError, UsageError


@dataclass(frozen=True, eq=False)
class Head:
    """A last layer: logits = input @ weight.T + bias.

    Attributes:
        weight: (C, D) float32, finite.
        bias: (C,) float32, finite.
    """

    weight: np.ndarray
    bias: np.ndarray


@dataclass(eq=False)
class _Known:
    head: Head | None = None
    sources: dict[Path, Callable[[], Head]] = field(default_factory=dict)
    on_device: dict[str, tuple[Any, Any]] = field(default_factory=dict)


_guard = threading.RLock()
_known: dict[str, _Known] = {}


def announce_head(sha256: str, path: Path, load: Callable[[], Head]) -> None:
    """Says where a head can be read; nothing is read now.

    Args:
        sha256: of its file.
        path: of its file; a path that was announced before is replaced.
        load: reads and checks it; called at most once, when the first row is decoded.
    """
    with _guard:
        _known.setdefault(sha256, _Known()).sources[path] = load


def keep_head(sha256: str, head: Head) -> None:
    """Keeps a head that was read and checked; one that is kept already stays."""
    with _guard:
        known = _known.setdefault(sha256, _Known())
        if known.head is None:
            known.head = head


def head_of(sha256: str) -> Head:
    """The head with this hash.

    Raises:
        UsageError: this process has opened no cache with it.
        KDCacheError: its file is missing or damaged.
    """
    with _guard:
        known = _known.get(sha256, _Known())
        error: KDCacheError | None = None
        for load in known.sources.values():
            if known.head is not None:
                break
            try:
                known.head = load()
            except KDCacheError as failed:  # another cache of the same teacher may have it
                error = failed
        if known.head is not None:
            return known.head
    if error is not None:
        raise error
    raise UsageError(
        f"these rows are inputs of a teacher's last layer, and that layer (head.h5, sha256 {sha256:.12}...) is not "
        "known in this process: open their cache here first, kdcache.open(PATH)"
    )


def head_on(sha256: str, device: Any) -> tuple[Any, Any]:
    """weight (C, D) and bias (C,) as float32 tensors on a device, copied there once; errors are those of `head_of`."""
    name = str(device)
    with _guard:
        known = _known.get(sha256)
        there = None if known is None else known.on_device.get(name)
        if there is None:
            import torch

            head = head_of(sha256)
            with torch.inference_mode(False):  # they outlive the block in which the first row happens to be decoded
                there = torch.from_numpy(head.weight).to(device), torch.from_numpy(head.bias).to(device)
            _known[sha256].on_device[name] = there
        return there


def forget_heads() -> None:
    """Lets go of all heads, for a process that goes on to other teachers; their caches are then to be opened again."""
    with _guard:
        _known.clear()
