"""Caches of several small teachers, and runs on them; used by the tests of several teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kdcache
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions

ROWS, WIDTH, CLASSES = 60, 5, 6
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(ROWS, WIDTH, generator=GENERATOR)
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=GENERATOR)
LOGITS = [
    torch.randn(ROWS, CLASSES, generator=GENERATOR) * 3 + 3 * torch.nn.functional.one_hot(LABELS, CLASSES)
    for _ in range(3)
]
DATA = TensorDataset(INPUTS, LABELS)
NAMES = ("a", "b", "c", "d", "e", "f")
OPTIONS = DistillOptions(epochs=2, batch_size=16, device="cpu", quiet=True, seed=3, temperature=4.0)


def cache_of(
    path: Path,
    logits: Tensor,
    *,
    rows: Any = slice(None),
    names: Any = None,
    labels: Tensor | None = LABELS,
    dtype: str = "float32",
    **provenance: Any,
) -> Path:
    known = {"teacher_seen": "no", **provenance}
    with kdcache.Writer(path, classes=names or CLASSES, dtype=dtype, provenance=known) as writer:
        own = None if labels is None else labels[rows].numpy()
        writer.write(np.arange(ROWS)[rows], logits[rows].numpy(), own)
    return path


def two_caches(folder: Path) -> list[Path]:
    return [cache_of(folder / name, logits) for name, logits in zip(("first", "second"), LOGITS, strict=False)]


def ran(caches: Any, *, val: Any = None, data: Any = DATA, **changed: Any) -> Any:
    torch.manual_seed(4)
    student = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    options = replace(OPTIONS, **changed)
    return distill(options, student=student, data=data, cache=caches, val=None if val is None else DATA, val_cache=val)


def weights(result: Any) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in result.student.parameters()])
