"""Random batches of 256 rows of 1000 classes out of a warm page cache, into a ready buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bench_data import ARRAYS, ROWS, BenchData
from bench_measure import BATCH, interleaved, ratio, rows_per_second

import kdcache


def memmap_reader(data: BenchData, names: tuple[str, ...]) -> Callable[[np.ndarray], Any]:
    """Gathers these arrays from NumPy memmaps into ready buffers, as fast as NumPy can."""
    mapped = [data.array(name) for name in names]
    buffers = [np.empty((BATCH, *array.shape[1:]), array.dtype) for array in mapped]

    def read(rows: np.ndarray) -> None:
        for array, buffer in zip(mapped, buffers, strict=True):
            np.take(array, rows, 0, out=buffer, mode="clip")

    return read


def cache_reader(cache: kdcache.Cache) -> Callable[[np.ndarray], Any]:
    """Gathers into one ready buffer; every row has been touched before."""
    for start in range(0, len(cache), BATCH):
        cache.gather(np.arange(start, min(start + BATCH, len(cache))))
    buffer = cache.gather(np.arange(BATCH))
    return lambda rows: cache.gather(rows, out=buffer)


@pytest.mark.bench
@pytest.mark.parametrize(("shards", "target"), [(1, 0.80), (8, 0.5), (64, 0.3)])
def test_gathering_random_batches_against_a_memmap(data: BenchData, figures: Any, shards: int, target: float) -> None:
    cache = kdcache.open(data.one_file if shards == 1 else data.shards(shards))
    readers = {
        "ours": cache_reader(cache),
        "all": memmap_reader(data, ARRAYS),
        "logits": memmap_reader(data, ("logits",)),
    }
    for read in readers.values():
        rows_per_second(read, ROWS, most_batches=ROWS // BATCH, seconds=60)
    found = interleaved({n: lambda read=read: rows_per_second(read, ROWS) for n, read in readers.items()}, repeats=9)
    name = "one file" if shards == 1 else f"{shards} shards"
    for side, against in (("all", "memmap gather of the same four arrays"), ("logits", "memmap gather of the logits")):
        result = ratio(found["ours"], found[side])
        figures.add(f"random batches, {name}", result, f">= {target}", against=against)
