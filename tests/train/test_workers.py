"""Joined and attached loaders with worker processes (tests/proof/test_concurrency.py: every start method)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import kdcache
from kdcache.errors import MismatchError


@pytest.fixture(autouse=True, scope="module")
def _preloaded_server() -> Iterator[None]:
    """Lets the fork server import torch and kdcache once for all of its workers."""
    multiprocessing.set_forkserver_preload(["kdcache.train.join", "kdcache.train.attach"])
    yield
    multiprocessing.set_forkserver_preload(["__main__"])


@pytest.mark.parametrize(("workers", "method"), [(2, "fork"), (2, "forkserver")])
def test_ids_come_through_workers(dataset: TensorDataset, cache: kdcache.Cache, workers: int, method: str) -> None:
    loader = DataLoader(kdcache.with_ids(dataset), batch_size=3, num_workers=workers, multiprocessing_context=method)
    batches = list(kdcache.attach(loader, cache, check="full"))
    dense = torch.cat([teacher.dense() for _, _, teacher in batches])
    assert torch.equal(dense, cache.gather(range(12)).tensors().dense())


def test_large_rows_come_through_shared_memory(tmp_path: Any) -> None:
    """Rows above the size that the pipe takes: 4 rows of 20,000 classes are 160 kB."""
    logits = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    with kdcache.Writer(tmp_path / "wide.h5", classes=20_000) as writer:
        writer.write([0, 1, 2, 3], logits)
    cache = kdcache.open(tmp_path / "wide.h5")
    loader = DataLoader(kdcache.join(list(range(4)), cache), batch_size=4, num_workers=1)
    ((_, teacher),) = loader
    assert teacher.arrays["logits"].is_shared()
    assert not teacher.view.is_shared()
    assert torch.equal(teacher.dense(), cache.gather(range(4)).tensors().dense())


def test_a_mismatch_in_a_worker_keeps_its_type(
    inputs: torch.Tensor, labels: torch.Tensor, cache: kdcache.Cache
) -> None:
    joined = kdcache.join(TensorDataset(inputs, (labels + 1) % 5), cache)
    with pytest.raises(MismatchError, match="sample 0 has the label 1"):
        list(DataLoader(joined, batch_size=4, num_workers=1))
