"""Dumps over data with more classes than the teacher: which labels are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kdcache
from kdcache.errors import DataError

INPUTS = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % 7 - 1  # -1 to 5
NAMES = ("a", "b", "c", "d", "e", "f")


class Data(TensorDataset):
    classes = NAMES


def dumped(path: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    kdcache.precompute(nn.Linear(5, 4), Data(INPUTS, LABELS), path, device="cpu", quiet=True, batch_size=8, **options)
    return path


def stored(path: Path) -> Any:
    with kdcache.open(path) as cache:
        return cache.gather(np.arange(30)), cache.classes


@pytest.mark.parametrize("encoding", [{}, {"top_k": 2}], ids=["dense", "topk"])
def test_labels_of_other_classes_are_left_out_or_all_are(tmp_path: Path, encoding: dict[str, Any]) -> None:
    known, names = stored(dumped(tmp_path / "known", labels="known", **encoding))
    assert known.label.tolist() == [label if label < 4 else -1 for label in LABELS.tolist()]
    assert names == NAMES[:4]
    none, names = stored(dumped(tmp_path / "none", labels="none", **encoding))
    assert none.label is None
    assert names is None
    for name in ("topk_logits", "logits"):
        if name in known.arrays:
            np.testing.assert_array_equal(known.arrays[name], none.arrays[name])
    if encoding:
        assert np.isneginf(known.arrays["label_logits"][known.label < 0]).all()
        assert "label_logits" not in none.arrays


def test_a_label_beyond_the_teachers_classes_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has label 4, expected 0 to 3.*--labels known"):
        dumped(tmp_path / "all")
    kdcache.precompute(
        nn.Linear(5, 4), Data(INPUTS, LABELS), tmp_path / "dry", device="cpu", quiet=True, dry_run=True, labels="known"
    )
