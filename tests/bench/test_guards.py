"""What the guards cost: the digest of every input in a dump, and its comparison in a student's epoch.

The cost of a part is the time spent in it over the time of the whole, measured in the same run: the difference of two
runs would drown in the noise of the machine. Needs Pillow.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kdcache
from kdcache.format.identity import input_digest
from kdcache.stages import dump_feed
from kdcache.stages.models import CNN
from kdcache.train import checks

REPEATS = 5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Timer:
    """Calls a function and adds up the seconds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return self._function(*arguments, **named)
        finally:
            self.seconds += time.perf_counter() - begun


class Photos(Dataset[tuple[Tensor, int]]):
    """JPEG files of 224 x 224, in memory, decoded to uint8 (3, 224, 224)."""

    def __init__(self, rows: int) -> None:
        from PIL import Image

        generator = np.random.default_rng(0)
        self.files = []
        for _ in range(rows):  # coarse noise, enlarged: files of about 15 kB, as photos of this size have
            small = Image.fromarray(generator.integers(0, 256, (28, 28, 3), np.uint8))
            buffer = io.BytesIO()
            small.resize((224, 224), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            self.files.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        pixels = np.array(Image.open(io.BytesIO(self.files[index])))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), index % 10


@pytest.mark.bench
def test_the_digest_of_an_input(figures: Any) -> None:
    images = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8)

    def seconds() -> float:
        begun = time.perf_counter()
        for image in images:
            input_digest(image)
        return (time.perf_counter() - begun) / len(images)

    median = statistics.median(seconds() for _ in range(3 * REPEATS))
    figures.add("digest of an input, uint8 3 x 224 x 224", 1000 * median, "<= 0.1", against="-", unit="ms")


@pytest.mark.bench
@pytest.mark.parametrize("size", ["TINY", "SMALL", "BASE"])
def test_digests_in_a_dump_of_jpeg_images(
    tmp_path: Path, figures: Any, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    photos = Photos({"TINY": 384, "SMALL": 192, "BASE": 96}[size])
    teacher = CNN(size, in_channels=3, num_classes=10, pixels=224)
    shares = []
    for repeat in range(REPEATS):
        timer = Timer(input_digest)
        monkeypatch.setattr(dump_feed, "input_digest", timer)
        begun = time.perf_counter()
        kdcache.precompute(
            teacher, photos, tmp_path / str(repeat), transform=lambda x: x / 255, batch_size=32, threads=1, quiet=True
        )
        shares.append(timer.seconds / (time.perf_counter() - begun))
    name = f"digests in a dump of JPEG images, 224 x 224, CNN {size}"
    figures.add(name, 100 * statistics.median(shares), "<= 2", against="the whole dump", unit="%")


@pytest.mark.bench
@pytest.mark.parametrize("form", ["uint8", "float32"])
@pytest.mark.parametrize("size", ["TINY", "SMALL"])
def test_the_default_guard_in_an_epoch(
    tmp_path: Path, figures: Any, monkeypatch: pytest.MonkeyPatch, size: str, form: str
) -> None:
    rows = 8_192
    images = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)
    data = TensorDataset(images if form == "uint8" else images / 255, torch.arange(rows) % 10)
    digests = np.array([input_digest(x) for x in data.tensors[0]], np.uint64)
    facts = {"data": {"digest_point": "item"}}
    with kdcache.Writer(tmp_path / "cache.h5", classes=10, provenance=facts) as writer:
        logits = np.random.default_rng(0).normal(size=(rows, 10)).astype(np.float32)
        writer.write(np.arange(rows), logits, data.tensors[1].numpy(), input_digests=digests)
    shares: dict[str, list[float]] = {"first": [], "later": []}
    for _ in range(REPEATS):
        timers = {name: Timer(getattr(checks.InputCheck, name)) for name in ("choose", "compare")}
        for name, timer in timers.items():
            monkeypatch.setattr(checks.InputCheck, name, lambda *a, _t=timer, **n: _t(*a, **n))
        with kdcache.open(tmp_path / "cache.h5") as cache:
            loader = DataLoader(kdcache.join(data, cache), batch_size=128, shuffle=True)
            for epoch in ("first", "later"):
                before = sum(timer.seconds for timer in timers.values())
                whole = train(loader, size)
                spent = sum(timer.seconds for timer in timers.values()) - before
                shares[epoch].append(spent / whole)
        monkeypatch.undo()
    for epoch, found in shares.items():
        name = f"default guard, {epoch} epoch of {rows:,} CIFAR images ({form}), CNN {size}"
        figures.add(name, 100 * statistics.median(found), "<= 1", against="the whole epoch", unit="%")


def train(loader: Any, size: str) -> float:
    """Seconds of an epoch."""
    torch.manual_seed(0)
    model = CNN(size, in_channels=3, num_classes=10, pixels=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    begun = time.perf_counter()
    for x, y, teacher in loader:
        optimizer.zero_grad(set_to_none=True)
        loss = kdcache.DistillationLoss(alpha=0.9, temperature=4.0)(model(x / 255), teacher, y)
        loss.backward()
        optimizer.step()
    assert functional.softmax(model(x / 255), dim=1).isfinite().all()
    return time.perf_counter() - begun
