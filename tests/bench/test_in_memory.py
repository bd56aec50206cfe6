"""Cached distillation against the same teacher rows held in memory, and against a live teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import kdcache
from kdcache.stages.models import CNN

IMAGES, CLASSES, BATCH, EPOCHS = 2_048, 10, 128, 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(size: str, seed: int) -> CNN:
    torch.manual_seed(seed)
    return CNN(size, in_channels=3, num_classes=CLASSES, pixels=32)


def trained(loader: Iterable[Any], teacher: CNN | None = None) -> list[Tensor]:
    """The weights of a student after two epochs; a live teacher takes the place of rows where it is given."""
    student = network("TINY", 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    criterion = kdcache.DistillationLoss(alpha=0.9, temperature=4.0)
    torch.manual_seed(2)  # the order of both epochs
    for _ in range(EPOCHS):
        for x, y, *rows in loader:
            with torch.inference_mode():
                soft = rows[0] if teacher is None else teacher(x)
            optimizer.zero_grad(set_to_none=True)
            criterion(student(x), soft if teacher is None else soft.clone(), y).backward()
            optimizer.step()
    return [parameter.detach() for parameter in student.parameters()]


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Largest difference of a weight, over the largest weight."""
    scale = max(float(w.abs().max()) for w in right)
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True)) / scale


@pytest.mark.bench
def test_cached_rows_train_the_same_student(tmp_path: Path, figures: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = TensorDataset(
        torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    )
    teacher = network("SMALL", 3).eval()
    options: dict[str, Any] = {"batch_size": BATCH, "shuffle": True}
    for dtype in ("float32", "float16"):
        path = tmp_path / f"{dtype}.h5"
        kdcache.precompute(teacher, images, path, dtype=dtype, quiet=True, device="cpu", batch_size=BATCH)
    with torch.inference_mode():
        rows = torch.cat([teacher(x) for x, _ in DataLoader(images, batch_size=BATCH)]).clone()
    held = trained(DataLoader(TensorDataset(*images.tensors, rows), **options))
    live = trained(DataLoader(images, **options), teacher)
    for dtype in ("float32", "float16"):
        with kdcache.open(tmp_path / f"{dtype}.h5") as cache:
            joined = trained(DataLoader(kdcache.join(images, cache), **options))
            attached = trained(kdcache.attach(DataLoader(kdcache.with_ids(images), **options), cache))
        assert largest_difference(joined, attached) == 0
        target = "0" if dtype == "float32" else "-"
        unit, what = "of the largest", f"weights after {EPOCHS} epochs, {dtype} cache"
        held_difference = largest_difference(joined, held)
        figures.add(what, held_difference, target, unit=unit, against="the same teacher rows held in memory")
        against = "a live teacher on the shuffled batches"
        figures.add(what, largest_difference(joined, live), "-", unit=unit, against=against)
        if dtype == "float32":
            assert all(np.array_equal(a, b) for a, b in zip(joined, held, strict=True))
