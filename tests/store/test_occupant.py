"""What a path holds, and when another plan is refused there: not by a first try that failed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import MismatchError
from kdcache.format.dense import Dense
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store.dump import open_dump
from kdcache.store.locks import PRESENT, LockFile
from kdcache.store.merge import merge
from kdcache.store.occupant import occupant
from kdcache.store.plan import Plan
from kdcache.store.writer import Writer

SCHEMA = RowSchema(Dense((3,), "float16"), "<i8", has_labels=False, has_digests=False)
PLAN = Plan(SCHEMA, ClassList.of(3, None), 4, 10, {"teacher": {"spec": "m:f"}})


def test_nothing_is_nobody(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("missing", "missing.h5", "empty"):
        assert occupant(tmp_path / name) is None
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not any((tmp_path / "empty").iterdir())


def test_a_plan_by_which_nothing_was_stored_is_in_the_way_only_while_a_process_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_dump(tmp_path / "x", PLAN).leave()
    found = occupant(tmp_path / "x")
    assert found is not None
    assert (found.is_stored, found.holder) == (False, None)
    found.refuse_other({"shard_rows": 5})
    monkeypatch.setattr(LockFile, "holder", lambda self, index: 77 if index == PRESENT else None)
    held = occupant(tmp_path / "x")
    assert held is not None
    held.refuse_other({"shard_rows": 4})
    with pytest.raises(MismatchError, match=r"shard_rows is 4 there and 5 .* process 77 is at work on it"):
        held.refuse_other({"shard_rows": 5})


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_a_finished_cache_is_compared_by_what_it_knows(folder: Path, tmp_path: Path, name: str) -> None:
    if name.endswith(".h5"):
        merge(folder, tmp_path / name)
    found = occupant(tmp_path / name)
    assert found is not None
    assert (found.is_stored, found.holder) == (True, None)
    assert found.field("encoding", "dtype") == "float16"
    with pytest.raises(MismatchError, match=r"encoding\.dtype is 'float16' there and 'float32'"):
        found.refuse_other({"encoding": {"dtype": "float32"}, "shard_rows": 40})
    if name.endswith(".h5"):
        found.refuse_other({"shard_rows": 41})  # one file does not know how it was cut
    else:
        with pytest.raises(MismatchError, match="shard_rows is 40 there and 41"):
            found.refuse_other({"shard_rows": 41})


@pytest.mark.parametrize("said", [{}, {"precision": {"threads": "two"}}, {"precision": {"threads": {"of": 2}}}])
def test_free_provenance_of_a_writer_is_no_stumbling_block(tmp_path: Path, said: dict[str, Any]) -> None:
    with Writer(tmp_path / "x", classes=3, provenance=said) as writer:
        writer.write([0], np.zeros((1, 3), np.float32))
    found = occupant(tmp_path / "x")
    assert found is not None
    assert found.field("provenance", "precision", "threads") == said.get("precision", {}).get("threads")
    assert found.field("provenance", "precision", "threads", "of", "cores") is None
    with pytest.raises(MismatchError, match=r"provenance\.precision"):
        found.refuse_other({"provenance": {"precision": {"threads": 2}}})


def test_a_look_makes_no_lock_file(folder: Path) -> None:
    (folder / ".lock").unlink()
    assert occupant(folder) is not None
    assert ".lock" not in os.listdir(folder)


def test_an_unfinished_dump_that_stored_rows_is_in_the_way(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x", classes=3, shard_rows=2)
    writer.write([0, 1, 2], np.zeros((3, 3), np.float32))
    writer.abandon()
    found = occupant(tmp_path / "x")
    assert found is not None
    assert found.is_stored
    with pytest.raises(MismatchError, match="shard_rows is 2 there and 4"):
        found.refuse_other({"shard_rows": replace(PLAN).shard_rows})
