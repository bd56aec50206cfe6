"""What a dump refuses: a typed error that says what was found, nothing lost, nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import kdcache
from kdcache.errors import (
    DataError,
    IncompleteCacheError,
    KDCacheError,
    LogitsError,
    MismatchError,
    StorageError,
    UsageError,
)
from kdcache.stages.precompute import precompute
from kdcache.store import posix

ROWS, WIDTH, CLASSES = 30, 5, 3
INPUTS = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % CLASSES
DATA = TensorDataset(INPUTS, LABELS)
SETTINGS = {"device": "cpu", "quiet": True, "batch_size": 4, "shard_rows": 8}


def linear(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    module = nn.Linear(WIDTH, classes)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(module.bias)
    return module


class Returns(nn.Module):
    """A teacher that returns what a function makes of its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Items(Dataset[Any]):
    def __init__(self, make: Any, rows: int = ROWS) -> None:
        self.make, self.rows = make, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def with_value(row: int, value: float) -> Any:
    """Logits that hold a value where the input is that of a row."""

    def function(x: Tensor) -> Tensor:
        logits = x[:, :CLASSES].clone()
        logits[(x == INPUTS[row]).all(1), 1] = value
        return logits

    return function


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_logit_that_is_no_number_names_its_sample_and_leaves_finished_shards(
    tmp_path: Path, value: float, dtype: str
) -> None:
    ids = [f"photo{n}" for n in range(ROWS)]
    with pytest.raises(LogitsError, match=r"sample 'photo19' hold NaN"):
        precompute(Returns(with_value(19, value)), DATA, tmp_path / "t", sample_ids=ids, dtype=dtype, **SETTINGS)
    assert sorted(file.name for file in (tmp_path / "t" / "shards").glob("*.h5")) == ["v000-00000.h5", "v000-00001.h5"]
    assert not list(tmp_path.rglob(".tmp-*"))
    with pytest.raises(IncompleteCacheError):
        kdcache.open(tmp_path / "t")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.sum(1), r"shape \(2,\) for 2 samples"),
        (lambda x: x[:1], r"shape \(1, 5\) for 2 samples"),
        (lambda x: x.long(), "int64"),
        (lambda x: {"scores": x}, "a dict with the keys scores"),
        (lambda x: x[:, : 2 + len(x)], r"expected \(N, 4\) as in the first batch"),
        (lambda x: x[:, 99], "the teacher failed on an input of shape"),
    ],
)
def test_an_output_that_is_no_logits_is_described(tmp_path: Path, function: Any, message: str) -> None:
    with pytest.raises((LogitsError, KDCacheError), match=message) as raised:
        precompute(Returns(function), DATA, tmp_path / "t", **SETTINGS)
    assert raised.value.exit_code == 1
    assert not list(tmp_path.rglob("*.h5"))


def failing(error: Exception, at: int = 13) -> Any:
    def make(index: int) -> tuple[Tensor, int]:
        if index == at:
            raise error
        return INPUTS[index], 0

    return make


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [ValueError("bad pixel\nin line 3"), KeyError("gone"), DataError("cannot be read")])
def test_an_item_that_fails_is_one_line_with_its_sample(tmp_path: Path, workers: int, error: Exception) -> None:
    ids = np.arange(ROWS) + 100
    with pytest.raises(DataError, match=r"sample 113") as raised:
        precompute(linear(), Items(failing(error)), tmp_path / "t", sample_ids=ids, workers=workers, **SETTINGS)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)


class InBatches(Items):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.make(index) for index in indices]


def test_an_item_that_fails_in_a_batch_names_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at sample 14: ValueError: torn"):
        precompute(linear(), InBatches(failing(ValueError("torn"), at=14)), tmp_path / "t", **SETTINGS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: (INPUTS[i], 3 if i == 17 else 0), "sample 17 has label 3, expected 0 to 2"),
        (lambda i: (INPUTS[i], -2 if i == 17 else 0), "sample 17 has label -2"),
        (lambda i: (INPUTS[i], 0.5), "sample 0: a label must be an integer"),
        (lambda i: (INPUTS[i], None if i < 9 else 1), "a sample from 8 on has one"),
        (lambda i: (INPUTS[i, : 5 - i % 2], 0), "cannot be stacked"),
        (lambda i: ("text", 0), "sample 0: an input digest needs numbers"),
        (lambda i: (), "sample 0: .*empty"),
    ],
)
def test_items_that_cannot_be_used_are_described(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        precompute(linear(), Items(make), tmp_path / "t", **SETTINGS)


class Iterable(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (DATA, {"sample_ids": [1, 1, *range(2, ROWS)]}, "sample id 1 occurs 2 times"),
        (DATA, {"sample_ids": [1, 2]}, "2 ids, the data set 30 items"),
        (Items(None, rows=0), {}, "no rows"),
        (Iterable(), {}, "no index|IterableDataset"),
        (object(), {}, "no length"),
    ],
)
def test_data_without_a_length_rows_or_ids_of_their_own_is_refused(
    tmp_path: Path, data: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        precompute(linear(), data, tmp_path / "t", **settings, **SETTINGS)
    assert not (tmp_path / "t").exists()


class Larger(TensorDataset):
    pass


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": linear(1)}, "provenance.teacher.state_sha256"),
        ({"model": linear(classes=4)}, "classes.count"),
        ({"dataset": Larger(INPUTS, LABELS)}, "provenance.data.fingerprint|provenance.data.name"),
        ({"dataset": TensorDataset(INPUTS[:20], LABELS[:20])}, "provenance.data.dumped"),
        ({"sample_ids": np.arange(ROWS) + 1}, "provenance.data.ids_sha256"),
        ({"limit": 20}, "provenance.data.dumped"),
        ({"dtype": "float32"}, "encoding.dtype"),
        ({"transform": nn.Tanh()}, "provenance.transform"),
        ({"batch_size": 5}, "provenance.precision.batch_size"),
        ({"amp": "bf16"}, "provenance.precision.amp"),
        ({"teacher_saw": "yes"}, "provenance.teacher_seen"),
    ],
)
def test_another_dump_on_the_same_path_is_refused_by_the_field_that_differs(
    tmp_path: Path, name: str, is_finished: bool, changes: dict[str, Any], field: str
) -> None:
    given = {"model": linear(), "dataset": DATA, "out": tmp_path / name, **SETTINGS}
    precompute(**given, shard=None if is_finished else "0/2")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(MismatchError, match=rf"({field}) is .* there and .* in this command"):
        precompute(**{**given, **changes})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_output_key_belongs_to_the_dump(tmp_path: Path) -> None:
    model = Returns(lambda x: {"a": x, "b": -x})
    precompute(model, DATA, tmp_path / "t", output_key="a", **SETTINGS)
    with pytest.raises(MismatchError, match=r"provenance.output_key is 'a' there and 'b'"):
        precompute(model, DATA, tmp_path / "t", output_key="b", **SETTINGS)


def test_overwrite_replaces_a_cache_and_nothing_else(tmp_path: Path) -> None:
    for name in ("teacher", "teacher.h5"):
        out = tmp_path / name
        precompute(linear(), DATA, out, **SETTINGS)
        precompute(linear(1), DATA, out, overwrite=True, **SETTINGS)
        with torch.no_grad():
            again = linear(1)(INPUTS).numpy()
        np.testing.assert_allclose(kdcache.open(out).gather([3]).dense()[0], again[3], atol=1e-2)
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis.txt"):
        precompute(linear(), DATA, foreign, overwrite=True, **SETTINGS)
    own = tmp_path / "own.h5"
    own.write_bytes(b"somebody's")
    with pytest.raises(KDCacheError, match=r"own.h5"):
        precompute(linear(), DATA, own, overwrite=True, **SETTINGS)
    assert (foreign / "thesis.txt").read_text() == "mine"
    assert own.read_bytes() == b"somebody's"


@pytest.mark.parametrize("several", ["shard", "ranks"])
def test_overwrite_is_refused_where_several_processes_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: str
) -> None:
    """Each would remove what the others have done."""
    if several == "ranks":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"--overwrite goes with one process only"):
        precompute(
            linear(), DATA, tmp_path / "t", overwrite=True, shard="0/2" if several == "shard" else None, **SETTINGS
        )


def test_a_path_that_holds_something_else_is_refused_before_the_teacher_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "file.h5").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for name in ("folder.h5", "file", "file.h5", "folder"):
        with pytest.raises(KDCacheError, match=name) as raised:
            precompute(None, DATA, tmp_path / name, teacher="nowhere:at_all", **SETTINGS)
        assert "nowhere" not in str(raised.value)
    assert (tmp_path / "file.h5").read_text() == "mine"


def test_too_little_disk_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(StorageError, match=r"MB free; free some space, choose another --out"):
        precompute(linear(), DATA, tmp_path / "t", **SETTINGS)
    assert not list(tmp_path.iterdir())


def refusing(path: Path) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_a_path_that_cannot_be_written_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda folder, mode: folder != tmp_path)  # to root, everything is writable
        with pytest.raises(StorageError, match=r"no permission in .*choose another --out"):
            precompute(None, DATA, tmp_path / "deep" / "t", teacher="nowhere:at_all", **SETTINGS)
    monkeypatch.setattr(posix, "make_folder", refusing)
    with pytest.raises(StorageError, match=r"could not create .*choose another --out"):
        precompute(linear(), DATA, tmp_path / "t", **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_batch_above_the_exported_limit_is_a_usage_error(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", max=3)
    program = torch.export.export(linear().eval(), (INPUTS[:2],), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "teacher.pt2")
    with pytest.raises(UsageError, match=r"--batch-size 4 is above 3"):
        precompute(None, DATA, tmp_path / "t", teacher=f"pt2:{tmp_path / 'teacher.pt2'}", **SETTINGS)


def test_settings_are_checked_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no setting 'batchsize'"):
        precompute(linear(), DATA, tmp_path / "t", batchsize=3)
    with pytest.raises(UsageError, match=r"--out is needed"):
        precompute(linear(), DATA)
    with pytest.raises(UsageError, match=r"--data is needed"):
        precompute(linear(), out=tmp_path / "t")
    with pytest.raises(UsageError, match=r"--teacher is needed"):
        precompute(None, DATA, tmp_path / "t")
