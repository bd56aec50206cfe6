"""A small distillation task: 100 rows, 4 classes, a float32 cache of random teacher logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from kdcache.store.writer import Writer

ROWS, WIDTH, CLASSES = 100, 6, 4


@dataclass(frozen=True)
class Toy:
    inputs: Tensor
    labels: Tensor
    teacher_logits: Tensor
    cache: str

    @property
    def data(self) -> TensorDataset:
        return TensorDataset(self.inputs, self.labels)


@pytest.fixture
def make_toy(tmp_path: Path) -> Callable[..., Toy]:
    """Builds the task; `covered` rows are in the cache, labels of the rows in `unlabelled` are -1."""

    def make(
        *, rows: int = ROWS, covered: int | None = None, unlabelled: slice | None = None, classes: int = CLASSES
    ) -> Toy:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(rows, WIDTH, generator=generator)
        labels = torch.randint(0, classes, (rows,), generator=generator)
        logits = torch.randn(rows, classes, generator=generator) * 3
        if unlabelled is not None:
            labels[unlabelled] = -1
        path = tmp_path / f"teacher{len(list(tmp_path.glob('teacher*')))}"
        count = rows if covered is None else covered
        with Writer(path, classes=classes, dtype="float32") as writer:
            writer.write(np.arange(count), logits[:count].numpy(), labels[:count].numpy())
        return Toy(inputs, labels, logits, str(path))

    return make


@pytest.fixture
def toy(make_toy: Callable[..., Toy]) -> Toy:
    return make_toy()


@pytest.fixture
def dumps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs of `precompute` in processes of their own (`precompute_runs.Dumps`), all with one date."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    from precompute_runs import Dumps

    runs = Dumps()
    yield runs
    runs.end_sessions()
