"""The two sides that several measurements share: our gather into a ready buffer, and NumPy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from bench_data import BenchData
from bench_measure import BATCH

import kdcache

Read = Callable[[np.ndarray], Any]


def memmap_reader(data: BenchData, names: tuple[str, ...]) -> Read:
    """Gathers these arrays from NumPy memmaps into ready buffers, as fast as NumPy can."""
    mapped = [data.array(name) for name in names]
    buffers = [np.empty((BATCH, *array.shape[1:]), array.dtype) for array in mapped]

    def read(rows: np.ndarray) -> None:
        for array, buffer in zip(mapped, buffers, strict=True):
            np.take(array, rows, 0, out=buffer, mode="clip")

    return read


def cache_reader(cache: kdcache.Cache) -> Read:
    """Gathers into one ready buffer; every row has been touched before."""
    for start in range(0, len(cache), BATCH):
        cache.gather(np.arange(start, min(start + BATCH, len(cache))))
    buffer = cache.gather(np.arange(BATCH))
    return lambda rows: cache.gather(rows, out=buffer)
