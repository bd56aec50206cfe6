"""`precompute` against the same forward loop that keeps nothing: a CIFAR CNN over 3x32x32 images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_measure import BATCH, anonymous_bytes, interleaved, ratio, timed
from torch.utils.data import DataLoader, TensorDataset

import kdcache
from kdcache.stages.models import CNN

IMAGES = {"SMALL": 10_240, "BASE": 4_096}


@pytest.fixture(params=[1, os.cpu_count()])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return TensorDataset(images, torch.randint(0, 10, (count,), generator=generator))


def teacher(size: str) -> CNN:
    torch.manual_seed(0)
    return CNN(size, in_channels=3, num_classes=10, pixels=32).eval()


def dump(model: CNN, images: Any, out: Path) -> None:
    kdcache.precompute(model, images, out, batch_size=BATCH, quiet=True, device="cpu")
    shutil.rmtree(out)


def forward_only(model: CNN, images: Any) -> None:
    with torch.inference_mode():
        for inputs, _ in DataLoader(images, batch_size=BATCH):
            model(inputs)


@pytest.mark.bench
@pytest.mark.parametrize("size", ["SMALL", "BASE"])
def test_precompute_against_a_forward_loop(tmp_path: Path, figures: Any, threads: int, size: str) -> None:
    images, model = random_images(IMAGES[size]), teacher(size)
    found = interleaved(
        {
            "ours": lambda: timed(lambda: dump(model, images, tmp_path / "cache")),
            "loop": lambda: timed(lambda: forward_only(model, images)),
        },
        repeats=5,
    )
    name = f"precompute, time, CNN {size}, {threads} threads"
    figures.add(name, ratio(found["ours"], found["loop"]), "<= 1.05", against="the same forward loop without saving")


@pytest.mark.bench
def test_memory_of_precompute_over_the_number_of_rows(tmp_path: Path, figures: Any) -> None:
    class Endless:
        """As many rows as asked for, of one image: the data set itself takes no memory."""

        def __init__(self, rows: int) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return self.rows

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((3, 8, 8), float(index)), index % 10

    class Wide(torch.nn.Module):
        """1000 logits of nothing much."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, 0, :1] * torch.linspace(0, 1, 1000)

    added = []
    for rows in (2_048, 2_048, 32_768):  # the first call brings everything that is loaded once
        before = anonymous_bytes()
        kdcache.precompute(Wide(), Endless(rows), tmp_path / f"cache{len(added)}", quiet=True, device="cpu")
        added.append(anonymous_bytes() - before)
    figures.add(
        "memory of precompute, 32,768 rows (66 MB) against 2,048",
        (added[2] - added[1]) / 2**20,
        "constant",
        unit="MiB more",
        against="anonymous memory left behind by each call",
        added=np.asarray(added).tolist(),
    )
