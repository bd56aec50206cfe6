"""From `kdcache.open` to the first batch, in a process that has the libraries loaded already."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_data import BenchData, files_of, random_rows, without_fsync
from bench_measure import BATCH, timed

import kdcache

SHARDS, SHARD_ROWS, CLASSES = 1000, 100, 100


def first_batch(path: Path, seed: int) -> None:
    with kdcache.open(path) as cache:
        cache.gather(np.random.default_rng(seed).integers(0, len(cache), BATCH))


def measure(path: Path, figures: Any, *, name: str, target_ms: int) -> None:
    for file in files_of(path):
        file.read_bytes()  # into the page cache
    first_batch(path, 0)
    times = [1000 * timed(lambda seed=seed: first_batch(path, seed)) for seed in range(1, 16)]
    low, middle, high = statistics.quantiles(times, n=4)
    figures.add(
        f"open to first batch, {name}",
        middle,
        f"<= {target_ms}",
        unit="ms",
        against="warm page cache, random batch of 256",
        low=low,
        high=high,
    )


@pytest.mark.bench
def test_opening_one_file(data: BenchData, figures: Any) -> None:
    measure(data.one_file, figures, name="one file of 100,000 rows", target_ms=10)


@pytest.mark.bench
def test_opening_a_folder_of_a_thousand_shards(bench_folder: Path, figures: Any) -> None:
    path = bench_folder / "shards1000"
    if not (path / "manifest.json").exists():
        with without_fsync(), kdcache.Writer(path, classes=CLASSES, shard_rows=SHARD_ROWS, overwrite=True) as writer:
            for ids, logits, labels in random_rows(SHARDS * SHARD_ROWS, CLASSES):
                writer.write(ids, logits, labels)
    measure(path, figures, name="folder of 1,000 shards of 100 rows", target_ms=400)
