from __future__ import annotations

from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.pin_memory import pin_memory

import kdcache
from kdcache.errors import MismatchError
from kdcache.store.rows import TeacherRows
from kdcache.train import rows as rows_module
from kdcache.train.rows import TeacherRow


def singles(batch: TeacherRows) -> list[TeacherRow]:
    return [TeacherRow(batch, place) for place in range(len(batch))]


def test_all_rows_of_a_gathered_batch_in_order_are_that_batch_without_a_copy(cache: kdcache.Cache) -> None:
    gathered = cache.gather([3, 1, 2]).tensors()
    batch = default_collate([(torch.zeros(1), row) for row in singles(gathered)])[1]
    assert batch is gathered
    assert batch.arrays["logits"].data_ptr() == gathered.arrays["logits"].data_ptr()


@pytest.mark.parametrize("order", [[2, 1, 0], [1], [0, 0, 2]])
def test_rows_of_a_gathered_batch_in_another_order_are_taken_from_it(cache: kdcache.Cache, order: list[int]) -> None:
    gathered = cache.gather([3, 1, 2]).tensors()
    batch = default_collate([singles(gathered)[place] for place in order])
    assert torch.equal(batch.dense(), gathered.dense()[order])
    assert batch.sample_id.tolist() == gathered.sample_id[order].tolist()


def test_rows_of_several_batches_are_put_together(cache: kdcache.Cache) -> None:
    parts = [cache.gather(rows).tensors() for rows in ([3], [1, 2], [0])]
    batch = default_collate([row for part in parts for row in singles(part)])
    whole = cache.gather([3, 1, 2, 0]).tensors()
    assert torch.equal(batch.dense(), whole.dense())
    assert torch.equal(batch.label, whole.label)
    assert batch.encoding == whole.encoding
    assert batch.sample_id.tolist() == [3, 1, 2, 0]
    assert batch.input_digest.tolist() == whole.input_digest.tolist()


def test_rows_of_caches_with_different_precision_become_float32(cache: kdcache.Cache) -> None:
    half = cache.gather([1]).tensors()
    single = TeacherRows.from_dense(torch.zeros(1, 5), sample_id=[9])
    batch = default_collate([TeacherRow(half, 0), TeacherRow(single, 0)])
    assert batch.encoding.dtype == "float32"
    assert torch.equal(batch.dense(), torch.cat([half.dense(), torch.zeros(1, 5)]))
    assert batch.label.tolist() == [1, -1]
    assert batch.input_digest is None


def test_rows_that_cannot_share_a_batch_are_refused() -> None:
    one = TeacherRows.from_dense(torch.zeros(1, 5))
    with pytest.raises(MismatchError, match="shapes"):
        default_collate([TeacherRow(one, 0), TeacherRow(TeacherRows.from_dense(torch.zeros(1, 4)), 0)])
    named = replace(one, sample_id=np.array([b"a"]))
    with pytest.raises(MismatchError, match="integer and text"):
        default_collate([TeacherRow(one, 0), TeacherRow(named, 0)])


def test_a_single_row_tells_what_a_batch_tells(cache: kdcache.Cache) -> None:
    row = TeacherRow(cache.gather([2, 7, -1]).tensors(), 1)
    assert row.dense().shape == (5,)
    assert torch.equal(row.dense(), cache.gather([7]).tensors().dense()[0])
    assert (row.sample_id, row.label, row.has_teacher, row.num_classes, len(row.rows)) == (7, 2, True, 5, 1)
    absent = TeacherRow(row.batch, 2)
    assert (absent.label, absent.has_teacher) == (-1, False)


@pytest.mark.parametrize("pipe_bytes", [0, 1 << 20])
@pytest.mark.parametrize("tensors", [True, False])
def test_rows_survive_the_queue_between_processes(
    cache: kdcache.Cache, monkeypatch: pytest.MonkeyPatch, pipe_bytes: int, tensors: bool
) -> None:
    monkeypatch.setattr(rows_module, "PIPE_BYTES", pipe_bytes)
    sent = cache.gather([4, -1, 2])
    sent = sent.tensors() if tensors else sent
    received = ForkingPickler.loads(bytes(ForkingPickler.dumps(sent)))
    assert type(received.arrays["logits"]) is type(sent.arrays["logits"])
    np.testing.assert_array_equal(np.asarray(received.dense()), np.asarray(sent.dense()))
    for name in ("view", "label", "has_teacher", "sample_id", "input_digest"):
        np.testing.assert_array_equal(np.asarray(getattr(received, name)), np.asarray(getattr(sent, name)))


def test_a_loaders_pin_thread_pins_rows_through_their_own_method(
    cache: kdcache.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.numel()) or self)
    batch = pin_memory([torch.zeros(3), cache.gather([1, 2]).tensors()])
    assert isinstance(batch[1], TeacherRows)
    assert sorted(pinned) == sorted([3, 10, 2, 2, 2, 2])  # x; logits, row_max, view, label, has_teacher


@pytest.mark.gpu
def test_a_loader_pins_rows(cache: kdcache.Cache, dataset: torch.utils.data.TensorDataset) -> None:
    loader = torch.utils.data.DataLoader(kdcache.join(dataset, cache), batch_size=4, pin_memory=True)
    _, _, teacher = next(iter(loader))
    assert teacher.arrays["logits"].is_pinned()
    assert teacher.to("cuda", non_blocking=True).dense().is_cuda
