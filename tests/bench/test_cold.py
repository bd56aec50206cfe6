"""Random batches from an evicted page cache: the disk decides, and how it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from bench_data import ROWS, BenchData, evict, resident
from bench_measure import BATCH, interleaved, ratio

import kdcache

OUR_BATCHES, H5PY_BATCHES = 40, 8  # about equal times
COLD_BELOW = 0.01  # part of the file that may be in the page cache before a measurement: headers


def cold_rows_per_second(path: Path, read_all: Callable[[list[np.ndarray]], None], batches: int, seed: int) -> float:
    order = np.random.default_rng(seed).permutation(ROWS)[: batches * BATCH]
    evict(path)
    found = resident(path)
    assert found < COLD_BELOW, f"{found:.1%} of {path.name} is still in the page cache"
    begun = time.perf_counter()
    read_all(list(order.reshape(batches, BATCH)))
    return len(order) / (time.perf_counter() - begun)


def with_kdcache(path: Path) -> Callable[[list[np.ndarray]], None]:
    def read_all(batches: list[np.ndarray]) -> None:
        with kdcache.open(path) as cache:  # with its checks: every row is touched for the first time
            buffer = cache.gather(batches[0])
            for batch in batches[1:]:
                cache.gather(batch, out=buffer)

    return read_all


def with_h5py(path: Path) -> Callable[[list[np.ndarray]], None]:
    def read_all(batches: list[np.ndarray]) -> None:
        with h5py.File(path, rdcc_nbytes=0) as file:
            logits = file["logits"]
            for batch in batches:
                for row in batch.tolist():
                    logits[row]

    return read_all


@pytest.mark.bench
@pytest.mark.parametrize("shards", [1, 8])
def test_reading_from_a_cold_page_cache(data: BenchData, figures: Any, shards: int) -> None:
    path = data.one_file if shards == 1 else data.shards(shards)
    seeds = iter(range(1000))
    found = interleaved(
        {
            "ours": lambda: cold_rows_per_second(path, with_kdcache(path), OUR_BATCHES, next(seeds)),
            "h5py": lambda: cold_rows_per_second(data.one_file, with_h5py(data.one_file), H5PY_BATCHES, next(seeds)),
        },
        repeats=5,
    )
    name = "one file" if shards == 1 else f"{shards} shards"
    against = "h5py, rdcc_nbytes=0, an item at a time, logits alone"
    figures.add(f"cold page cache, {name}", ratio(found["ours"], found["h5py"]), ">= 5", against=against)
