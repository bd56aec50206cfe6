"""Through torch's DataLoader with 2 workers: most of the time goes into copies between processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from bench_data import ARRAYS, ROWS, BenchData
from bench_measure import BATCH, interleaved, ratio
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

import kdcache

SKIPPED_BATCHES = 10  # until both workers are up and their queues full
MEASURED_BATCHES = 380


class MemmapRows(Dataset[Any]):
    """Items of a data set with their rows from memmaps: one gather for a batch, as a careful user would write it."""

    def __init__(self, dataset: Dataset[Any], arrays: dict[str, np.ndarray]) -> None:
        self.dataset = dataset
        self.arrays = arrays

    def __len__(self) -> int:
        return ROWS

    def __getitems__(self, indices: list[int]) -> tuple[list[Any], dict[str, torch.Tensor]]:
        rows = np.asarray(indices)
        batch = {}
        for name, array in self.arrays.items():
            batch[name] = torch.from_numpy(np.empty((len(rows), *array.shape[1:]), array.dtype))
            np.take(array, rows, 0, out=batch[name].numpy(), mode="clip")
        return [self.dataset[index] for index in indices], batch


def collate_memmap(batch: tuple[list[Any], dict[str, torch.Tensor]]) -> list[Any]:
    items, rows = batch
    return [*default_collate(items), rows]


def steady_rows_per_second(make: Callable[[], Iterable[Any]]) -> float:
    """Rows a second of one epoch, without the start of the workers."""
    batches = iter(make())
    for _ in range(SKIPPED_BATCHES):
        next(batches)
    begun, done = time.perf_counter(), 0
    for _ in batches:
        done += 1
        if done == MEASURED_BATCHES - SKIPPED_BATCHES:
            break
    return done * BATCH / (time.perf_counter() - begun)


@pytest.mark.bench
def test_a_loader_with_two_workers(data: BenchData, figures: Any) -> None:
    labels = torch.from_numpy(np.array(data.array("label")))
    items = TensorDataset(torch.arange(ROWS, dtype=torch.float32), labels)
    with kdcache.open(data.one_file) as cache:
        for start in range(0, ROWS, BATCH):  # first-touch checks are measured elsewhere; forked workers inherit this
            cache.gather(np.arange(start, min(start + BATCH, ROWS)))
        options: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "num_workers": 2}
        memmaps = MemmapRows(items, {name: data.array(name) for name in ARRAYS})
        joined = kdcache.join(items, cache)
        identified = kdcache.with_ids(items)
        sides: dict[str, Callable[[], Iterable[Any]]] = {
            "memmap": lambda: DataLoader(memmaps, collate_fn=collate_memmap, **options),
            "join": lambda: DataLoader(joined, **options),
            "attach": lambda: kdcache.attach(DataLoader(identified, **options), cache),
        }
        found = interleaved(
            {name: lambda make=make: steady_rows_per_second(make) for name, make in sides.items()}, repeats=5
        )
    memmap = "memmap gather in the same loader"
    figures.add("DataLoader, 2 workers: join", ratio(found["join"], found["memmap"]), ">= 0.9", against=memmap)
    figures.add("DataLoader, 2 workers: attach", ratio(found["attach"], found["join"]), ">= 1.5", against="join")
