"""An epoch of a student on cached logits against the same epoch on labels only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_measure import interleaved, ratio, timed
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import kdcache
from kdcache.stages.models import CNN

IMAGES, BATCH = 4_096, 128


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steady on a machine with other work; nothing of ours would use a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def student(classes: int) -> tuple[CNN, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = CNN("SMALL", in_channels=3, num_classes=classes, pixels=32)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def labels_only(images: TensorDataset, classes: int) -> None:
    model, optimizer = student(classes)
    for x, y in DataLoader(images, batch_size=BATCH, shuffle=True):
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def distilled(loader: Any, classes: int) -> None:
    model, optimizer = student(classes)
    criterion = kdcache.DistillationLoss(alpha=0.9, temperature=4.0)
    for x, y, teacher in loader:
        optimizer.zero_grad(set_to_none=True)
        criterion(model(x), teacher, y).backward()
        optimizer.step()


@pytest.mark.bench
@pytest.mark.parametrize("classes", [10, 1000])
def test_an_epoch_of_cached_distillation(tmp_path: Path, figures: Any, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (IMAGES,), generator=generator)
    images = TensorDataset(torch.randn(IMAGES, 3, 32, 32, generator=generator), labels)
    with kdcache.Writer(tmp_path / "cache.h5", classes=classes) as writer:
        writer.write(np.arange(IMAGES), torch.randn(IMAGES, classes, generator=generator), labels)
    with kdcache.open(tmp_path / "cache.h5") as cache:
        loader = kdcache.attach(DataLoader(kdcache.with_ids(images), batch_size=BATCH, shuffle=True), cache)
        joined = DataLoader(kdcache.join(images, cache), batch_size=BATCH, shuffle=True)
        found = interleaved(
            {
                "attach": lambda: timed(lambda: distilled(loader, classes)),
                "join": lambda: timed(lambda: distilled(joined, classes)),
                "labels": lambda: timed(lambda: labels_only(images, classes)),
            },
            repeats=7,
        )
    for way, target in (("attach", "<= 1.03"), ("join", "-")):
        name = f"epoch of cached KD, {way}, {classes} classes, one thread"
        against = "the same loader and student on labels only"
        figures.add(name, ratio(found[way], found["labels"]), target, against=against)
