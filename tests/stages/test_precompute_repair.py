"""A finished cache that lost shards is made whole by the same command; a first try that failed is in nobody's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kdcache.errors import KDCacheError, LogitsError
from kdcache.stages.precompute import PrecomputeResult, precompute
from kdcache.store.verify import verify


def teacher(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, classes)


def data(rows: int = 100) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, 4, generator=generator), torch.arange(rows) % 3)


def dump(out: Path, model: nn.Module, dataset: Any) -> PrecomputeResult:
    result = precompute(model, dataset, out, shard_rows=40, batch_size=16, quiet=True)
    assert isinstance(result, PrecomputeResult)
    return result


def test_a_shard_that_is_gone_is_computed_again_and_nothing_else(tmp_path: Path) -> None:
    root = dump(tmp_path / "cache", teacher(), data()).root
    (tmp_path / "cache" / "shards" / "v000-00001.h5").unlink()
    assert verify(tmp_path / "cache").missing
    again = dump(tmp_path / "cache", teacher(), data())
    assert again.computed == 40
    assert again.root == root
    assert verify(tmp_path / "cache").ok


def test_a_first_try_that_stored_nothing_leaves_the_path_free_for_another_dump(tmp_path: Path) -> None:
    broken = data()
    broken.tensors[0][0] = float("nan")
    with pytest.raises(LogitsError, match="sample 0"):
        dump(tmp_path / "cache", teacher(), broken)
    assert dump(tmp_path / "cache", teacher(5), data(70)).finished
    assert verify(tmp_path / "cache").ok


def test_a_try_that_stored_a_shard_still_holds_its_path(tmp_path: Path) -> None:
    broken = data()
    broken.tensors[0][90] = float("nan")
    with pytest.raises(LogitsError, match="sample 90"):
        dump(tmp_path / "cache", teacher(), broken)
    with pytest.raises(KDCacheError, match="another dump"):
        dump(tmp_path / "cache", teacher(5), data())
