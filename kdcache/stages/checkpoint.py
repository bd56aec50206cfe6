"""Files a run can go on from: written whole or not at all, and read without unpickling anything but tensors.

A checkpoint is written to a temporary name, fsynced and renamed over the last one, so that a kill at
any moment leaves one that is whole. It holds tensors and plain numbers only: `weights_only=True` reads
it, and so does everybody else without running code of ours or anyone's.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import IncompleteCacheError, KDCacheError
from kdcache.store import posix

RESUME_NAME = "resume.pt"
BEST_NAME = "best.pt"
LAST_NAME = "last.pt"
_MAX_BYTES = 1 << 48  # no limit: it is a file of our own


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` (tensors, numbers, texts, and lists, tuples and dicts of them) atomically.

    Raises:
        StorageError: the disk is full or refuses otherwise; what was at `path` is untouched.
    """
    buffer = io.BytesIO()  # a student's size in memory once more, so that every byte goes through one checked writer
    torch.save(dict(content), buffer)
    posix.write_file(path, bytes(buffer.getbuffer()), replace=True)


def load(path: Path) -> dict[str, Any]:
    """Reads a file of tensors and plain values onto the CPU.

    Raises:
        KDCacheError: it is missing or cannot be read as one.
        StorageError: the disk refused.
    """
    try:
        file = io.BytesIO(posix.read_file(path, _MAX_BYTES))
    except IncompleteCacheError:
        raise KDCacheError(
            f"{path.name} in {path.parent} is missing; bring it back, or start again with --overwrite"
        ) from None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen unrelated types for a damaged file
        raise KDCacheError(f"{path.name} in {path.parent} cannot be read as tensors: {error!s:.300}") from error
    if not isinstance(content, dict):
        raise KDCacheError(f"{path.name} in {path.parent} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def state_dict(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's tensors as a plain dict on the CPU (a copy, as they are at this moment)."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The generators that a step may draw from, as tensors of fixed shape: Python's, NumPy's, torch's, CUDA's.

    Returns:
        `python` (625,) int64 and `python_gauss` (2,) float64; `numpy` (626,) int64 and `numpy_gauss` (1,)
        float64; `torch` (n,) uint8; `cuda` (m,) uint8, m = 0 on other devices.
    """
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0, dtype=torch.uint8),
    }


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts the generators back to where `rng_state` found them."""
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    *keys, position, cached_is_valid = state["numpy"].tolist()
    words = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, cached_is_valid, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and len(state["cuda"]):
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def own_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds all generators for the block and gives the caller's back afterwards."""
    before = rng_state(device)
    seed_generators(seed)
    try:
        yield
    finally:
        set_rng_state(before, device)


def seed_generators(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators (CUDA's included)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
