"""A small data set and caches of it, for the tests of joining."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import kdcache
from kdcache.format.identity import input_digest

sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the tests can be imported by name

ROWS, CLASSES = 12, 5

MakeCache: TypeAlias = Callable[..., kdcache.Cache]


@pytest.fixture
def inputs() -> torch.Tensor:
    """(N, 3) float32."""
    return torch.arange(ROWS * 3.0).reshape(ROWS, 3)


@pytest.fixture
def labels() -> torch.Tensor:
    """(N,) int64."""
    return torch.arange(ROWS) % CLASSES


@pytest.fixture
def dataset(inputs: torch.Tensor, labels: torch.Tensor) -> TensorDataset:
    """Items (x, y), a class that any worker process can import."""
    return TensorDataset(inputs, labels)


@pytest.fixture
def logits() -> np.ndarray:
    """(N, C) float32; the largest is 0.5, so that float16 rows come back to 2e-3 (11 bits of numbers below 4)."""
    values = np.random.default_rng(0).standard_normal((ROWS, CLASSES)).astype(np.float32)
    return values - values.max(axis=1, keepdims=True) + np.float32(0.5)


@pytest.fixture
def make_cache(tmp_path: Path, inputs: torch.Tensor, labels: torch.Tensor, logits: np.ndarray) -> MakeCache:
    """Writes and opens a cache of the data set, or of some rows of it, with other ids, labels or digests."""

    def make(
        name: str = "teacher.h5",
        *,
        ids: Any = None,
        keep: Any = slice(None),
        with_labels: bool = True,
        digest_point: str | None = "item",
        **options: Any,
    ) -> kdcache.Cache:
        every = np.arange(ROWS) if ids is None else np.asarray(ids)
        digests = np.array([input_digest(x) for x in inputs], np.uint64)
        path = tmp_path / name
        provenance = {"data": {"name": "test", "digest_point": digest_point}}
        with kdcache.Writer(path, classes=CLASSES, provenance=provenance, **options) as writer:
            writer.write(
                every[keep],
                logits[keep],
                labels[keep] if with_labels else None,
                input_digests=None if digest_point is None else digests[keep],
            )
        return kdcache.open(path)

    return make


@pytest.fixture
def cache(make_cache: MakeCache) -> kdcache.Cache:
    """All rows, float16, ids 0 to 11, with labels and digests."""
    return make_cache()
