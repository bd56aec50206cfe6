"""Data sets for DataLoader workers: joined to a cache that was opened before the workers start, or in each of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concurrency_jobs import CLASSES, IDS, inputs_of, logits_of
from torch.utils.data import DataLoader, Dataset, RandomSampler

import kdcache

ORDER = np.sort(IDS)  # the data set's order is not the cache's


class Items(Dataset[Any]):
    """Items (input, label) with ids of their own."""

    sample_ids = ORDER

    def __len__(self) -> int:
        return len(ORDER)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(inputs_of(ORDER[index : index + 1])[0]), int(ORDER[index] % CLASSES)


class Answers(Items):
    """Items whose input is what a teacher must answer."""

    sample_ids = IDS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(logits_of(IDS[index : index + 1])[0]), int(IDS[index] % CLASSES)


class OpenedInWorker(Items):
    """Joined to the cache when a process asks for its first batch."""

    def __init__(self, path: Path, access: str) -> None:
        self.path, self.access = path, access
        self.joined: Any = None
        self.process = 0

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if self.process != os.getpid():
            self.joined = kdcache.join(Items(), kdcache.open(self.path, access=self.access), check="full")
            self.process = os.getpid()
        found: list[Any] = self.joined.__getitems__(indices)
        return found


def data(path: Path, access: str, opened: str) -> Any:
    """The joined data set; its cache is `fresh`, or `touched` by some reads of the parent, or opened `inside`."""
    if opened == "inside":
        return OpenedInWorker(path, access)
    cache = kdcache.open(path, access=access)
    if opened == "touched":
        cache.gather(cache.rows(ORDER[::7]))
    return kdcache.join(Items(), cache, check="full")


def epochs(dataset: Any, count: int, **options: Any) -> list[list[dict[str, np.ndarray]]]:
    """All arrays of all batches of some epochs, in a random order that a seed decides."""
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(3))  # the loader draws from another one
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=70, sampler=order, **options)
    return [[arrays_of(batch) for batch in loader] for _ in range(count)]


def arrays_of(batch: Any) -> dict[str, np.ndarray]:
    """Every array of a batch (input, label, teacher) by name."""
    x, y, teacher = batch
    parts = {"x": x, "y": y, "view": teacher.view, "label": teacher.label, "has": teacher.has_teacher}
    arrays = {name: part.numpy().copy() for name, part in {**parts, **teacher.arrays}.items()}
    return {**arrays, "id": teacher.sample_id.copy(), "digest": teacher.input_digest.copy()}


def assert_same(found: list[list[dict[str, np.ndarray]]], wanted: list[list[dict[str, np.ndarray]]]) -> int:
    """Bit for bit, type for type; returns the rows compared."""
    rows = 0
    for mine, theirs in zip(found, wanted, strict=True):
        for batch, other in zip(mine, theirs, strict=True):
            assert batch.keys() == other.keys()
            for name, array in batch.items():
                assert (array.dtype, array.shape) == (other[name].dtype, other[name].shape), name
                assert array.tobytes() == other[name].tobytes(), name
            rows += len(batch["id"])
    return rows
