"""TeacherRows: one type for arrays and tensors, whose ids always stay NumPy."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.store.cache import open as open_cache
from kdcache.store.rows import TeacherRows


@pytest.fixture
def rows(make_cache: Any) -> TeacherRows:
    return open_cache(make_cache(digests=True)).gather([5, 3, -1, 99])


def test_rows_know_their_length_and_classes(rows: TeacherRows) -> None:
    assert len(rows) == 4
    assert rows.num_classes == 5


def test_tensors_hold_the_same_values_and_ids_stay_numpy(rows: TeacherRows, table: Any) -> None:
    tensors = rows.tensors()
    assert isinstance(tensors.sample_id, np.ndarray)
    assert isinstance(tensors.input_digest, np.ndarray)
    assert (tensors.view.dtype, tensors.label.dtype, tensors.has_teacher.dtype) == (
        torch.int64,
        torch.int64,
        torch.bool,
    )
    np.testing.assert_array_equal(tensors.dense().numpy(), rows.dense())
    np.testing.assert_array_equal(rows.dense()[[0, 1, 3]], table.logits[[5, 3, 99]])
    assert tensors.dense().dtype == torch.float32
    assert tensors.tensors() is tensors


def test_moving_to_a_device_makes_tensors(rows: TeacherRows) -> None:
    moved = rows.to("cpu", non_blocking=True)
    assert moved.arrays["row_max"].device.type == "cpu"
    assert moved.label.tolist() == rows.label.tolist()


@pytest.mark.parametrize("index", [slice(1, 3), slice(None, None, -1), np.array([3, 0, 0]), np.empty(0, np.int64)])
def test_taken_rows_are_those_rows(rows: TeacherRows, index: Any) -> None:
    taken = rows.take(index)
    np.testing.assert_array_equal(taken.dense(), rows.dense()[index])
    for name in ("sample_id", "view", "label", "has_teacher", "input_digest"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(rows, name)[index])


def test_rows_of_tensors_are_taken_too(rows: TeacherRows) -> None:
    taken = rows.tensors().take(np.array([3, 0]))
    assert taken.sample_id.tolist() == [99, 5]
    assert taken.label.tolist() == rows.label[[3, 0]].tolist()
    torch.testing.assert_close(taken.dense(), rows.tensors().dense()[[3, 0]])


def test_rows_survive_a_pickle(rows: TeacherRows) -> None:
    for version in (rows, rows.tensors()):
        back = pickle.loads(pickle.dumps(version))
        np.testing.assert_array_equal(np.asarray(back.dense()), np.asarray(version.dense()))
        assert back.sample_id.tolist() == rows.sample_id.tolist()


def test_decoding_twice_gives_the_same_and_changes_nothing(rows: TeacherRows) -> None:
    before = rows.arrays["logits"].copy()
    np.testing.assert_array_equal(rows.dense(), rows.dense())
    np.testing.assert_array_equal(rows.arrays["logits"], before)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_live_logits_become_float32_rows(kind: str) -> None:
    logits: Any = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    given = logits if kind == "numpy" else torch.from_numpy(logits)
    rows = TeacherRows.from_dense(given, sample_id=["a", "b", "c"])
    assert rows.encoding.row_shape == (4, 2)
    assert len(rows) == 3
    assert bool(rows.has_teacher.all())
    np.testing.assert_array_equal(np.asarray(rows.dense()), logits)
    assert TeacherRows.from_dense(given).sample_id.tolist() == [0, 1, 2]


def test_read_only_arrays_become_tensors_without_a_warning(folder: Path) -> None:
    rows = open_cache(folder).gather([1, 2])
    for array in rows.arrays.values():
        array.flags.writeable = False
    np.testing.assert_array_equal(rows.tensors().dense().numpy(), rows.dense())
