"""A dump in progress: shards are claimed, committed and taken up again; foreign folders stay untouched."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, IncompleteCacheError, MismatchError, UsageError
from kdcache.format.dense import Dense
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store.dump import DumpFolder, open_dump, utc_now
from kdcache.store.folder import read_manifest
from kdcache.store.incoming import consecutive
from kdcache.store.locks import LockFile
from kdcache.store.plan import Plan, parse_plan
from kdcache.store.removal import clear_dump, refuse_foreign, remove_dump, remove_empty
from kdcache.store.verify import verify

ENCODING = Dense((3,), "float16")
SCHEMA = RowSchema(ENCODING, "<i8", has_labels=False, has_digests=False)
PLAN = Plan(SCHEMA, ClassList.of(3, None), 4, 10, {})


def fill(dump: DumpFolder, index: int, *, shift: float = 0) -> Any:
    """Writes shard `index`, not committed yet: (container, record)."""
    _, start, stop = dump.plan.span(index)
    ids = np.arange(start, stop)
    logits = np.arange(start * 3, stop * 3, dtype=np.float32).reshape(-1, 3) + shift
    container = dump.container(0, index, start, stop)
    container.append({"sample_id": ids, **ENCODING.encode(logits).arrays}, view=0, positions=ids)
    return container, container.record(view=0, start=start, ids=consecutive(ids))


def commit(dump: DumpFolder, index: int) -> None:
    container, record = fill(dump, index)
    dump.commit(container, record, index)


def test_shards_are_committed_in_any_order_and_finished_once(tmp_path: Path) -> None:
    dump = open_dump(tmp_path / "x", PLAN)
    for index in (2, 0):
        assert dump.claim(0, index)
        commit(dump, index)
        dump.release(0, index)
        assert not dump.claim(0, index)
    assert dump.all_records() is None
    assert dump.record(0, 1) is None
    assert dump.claim(0, 1)
    commit(dump, 1)
    records = dump.all_records()
    assert records is not None
    assert [r.start for r in records] == [0, 4, 8]
    assert not dump.finished
    manifest = dump.finish(records, samples=10)
    assert dump.finished
    assert dump.finish(records, samples=10).root == manifest.root == read_manifest(tmp_path / "x").root
    assert verify(tmp_path / "x").ok
    assert sorted(os.listdir(tmp_path / "x")) == [".lock", "manifest.json", "shards"]
    assert not dump.claim(0, 0)


def test_a_shard_that_is_committed_while_its_lock_is_asked_for_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = open_dump(tmp_path / "x", PLAN)
    try_lock = LockFile.try_lock

    def late(self: LockFile, index: int) -> bool:
        commit(dump, 0)  # as another process would, right before it gives the lock back
        return try_lock(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(LockFile, "try_lock", late)
        assert not dump.claim(0, 0)
    assert dump.record(0, 0) is not None
    assert dump.holder(0, 0) is None


def test_a_claim_clears_what_a_dead_process_left(tmp_path: Path) -> None:
    dump = open_dump(tmp_path / "x", PLAN)
    container, _ = fill(dump, 0)
    assert container.publish()  # published, and then the process died before its commit record
    shards = tmp_path / "x" / "shards"
    (shards / ".tmp-v000-00000.h5-99-0123abcd").write_bytes(b"half")
    (shards / ".tmp-v000-00001.h5-99-0123abcd").write_bytes(b"another process is at it")
    assert dump.claim(0, 0)
    assert os.listdir(shards) == [".tmp-v000-00001.h5-99-0123abcd"]
    commit(dump, 0)


def test_an_equal_shard_that_is_there_already_is_success_and_another_one_is_corrupt(tmp_path: Path) -> None:
    dump = open_dump(tmp_path / "x", PLAN)
    fill(dump, 0)[0].publish()
    commit(dump, 0)
    assert dump.record(0, 0) is not None
    fill(dump, 1, shift=1)[0].publish()  # other row maxima
    with pytest.raises(CorruptCacheError, match="locks do not work on this file system"):
        commit(dump, 1)


def test_a_discarded_shard_is_done_again(tmp_path: Path) -> None:
    dump = open_dump(tmp_path / "x", PLAN)
    commit(dump, 2)
    dump.discard(0, 2)
    assert dump.record(0, 2) is None
    assert dump.claim(0, 2)
    commit(dump, 2)


def test_a_damaged_commit_record_is_corrupt(tmp_path: Path) -> None:
    dump = open_dump(tmp_path / "x", PLAN)
    commit(dump, 0)
    path = tmp_path / "x" / "shards" / "v000-00000.json"
    path.unlink()
    path.write_bytes(b"{}")
    with pytest.raises(CorruptCacheError, match=path.name):
        dump.record(0, 0)


def test_another_plan_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    open_dump(tmp_path / "x", PLAN)
    commit(open_dump(tmp_path / "x", replace(PLAN)), 0)
    with pytest.raises(MismatchError, match="shard_rows is 4 there and 5"):
        open_dump(tmp_path / "x", replace(PLAN, shard_rows=5))


def test_leftovers_of_a_finished_dump_are_cleared_when_it_is_joined(tmp_path: Path) -> None:
    dump = open_dump(tmp_path / "x", PLAN)
    for index in range(3):
        commit(dump, index)
    records = dump.all_records()
    assert records is not None
    dump.finish(records, samples=10)
    for name in (
        "plan.json",
        "shards/v000-00000.json",
        "shards/.tmp-v000-00001.h5-1-0123abcd",
        ".tmp-manifest.json-1-0123abcd",
    ):
        (tmp_path / "x" / name).write_bytes(b"left")
    open_dump(tmp_path / "x", PLAN)
    assert sorted(os.listdir(tmp_path / "x")) == [".lock", "manifest.json", "shards"]
    assert sorted(os.listdir(tmp_path / "x" / "shards")) == [f"v000-0000{n}.h5" for n in range(3)]


def test_no_second_manifest_is_written_where_the_one_file_was_made_meanwhile(tmp_path: Path) -> None:
    """Of two processes that find all records, the second may be so late that the first has cleared the folder away."""
    merged = tmp_path / "x.h5"
    first, second = (open_dump(tmp_path / "x.h5.parts", PLAN, merged=merged) for _ in range(2))
    for index in range(3):
        commit(first, index)
    records = second.all_records()
    assert records is not None
    first.finish(records, samples=10)
    merged.write_bytes(b"the one file")
    clear_dump(first.folder)
    assert second.finish(records, samples=10) is None
    assert not second.manifest_path.exists()


def test_the_last_to_leave_removes_the_folder_whatever_another_has_removed_already(folder: Path) -> None:
    remove_dump(folder)
    (folder / "shards").rmdir()
    remove_empty(folder)
    assert not folder.exists()


def test_no_manifest_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("foreign", ["data.csv", "README.md", "shards/x.h5", "shards/v000-00000.tar", ".git/HEAD"])
def test_a_foreign_folder_is_refused_and_never_removed(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("mine")
    for act in (refuse_foreign, remove_dump, lambda path: open_dump(path, PLAN)):
        with pytest.raises(UsageError, match="not part of a cache"):
            act(tmp_path)
    assert (tmp_path / foreign).read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [Path(foreign).parts[0]]


def test_a_dump_is_removed_with_its_card(folder: Path) -> None:
    (folder / "README.md").write_text("the card")
    remove_dump(folder)
    remove_empty(folder)
    assert not folder.exists()
    remove_dump(folder)  # nothing there is fine


def test_a_dump_that_is_worked_on_is_not_removed(tmp_path: Path) -> None:
    dump = open_dump(tmp_path / "x", PLAN)
    assert dump.claim(0, 1)
    with pytest.raises(MismatchError, match=f"in use by process {os.getpid()}"):
        remove_dump(tmp_path / "x")
    dump.release(0, 1)
    remove_dump(tmp_path / "x")


def test_the_date_can_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert utc_now() == "1970-01-01T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert utc_now() > "2024"


def test_the_plan_of_a_first_try_that_stored_nothing_is_replaced(tmp_path: Path) -> None:
    open_dump(tmp_path / "x", PLAN).leave()
    dump = open_dump(tmp_path / "x", replace(PLAN, shard_rows=5))
    assert parse_plan((tmp_path / "x" / "plan.json").read_bytes(), where="x") == dump.plan


def test_the_plan_that_another_process_works_by_is_not_replaced(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from kdcache.store.dump import open_dump; from kdcache.store.plan import parse_plan\n"
        "folder = pathlib.Path(sys.argv[1]); plan = parse_plan((folder / 'plan.json').read_bytes(), where='plan')\n"
        "open_dump(folder, plan); print('in', flush=True); sys.stdin.read()"
    )
    open_dump(tmp_path / "x", PLAN).leave()
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(MismatchError, match=rf"shard_rows is 4 there and 5.*process {other.pid} is at work on it"):
            open_dump(tmp_path / "x", replace(PLAN, shard_rows=5))
        other.communicate(b"")
    open_dump(tmp_path / "x", replace(PLAN, shard_rows=5))


def test_shards_without_manifest_and_plan_are_never_taken_for_those_of_a_new_dump(tmp_path: Path) -> None:
    commit(open_dump(tmp_path / "x", PLAN), 0)
    (tmp_path / "x" / "plan.json").unlink()
    with pytest.raises(IncompleteCacheError, match="neither manifest"):
        open_dump(tmp_path / "x", PLAN)


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_finished_dump_whose_shard_is_gone_is_reopened_for_that_shard_alone(tmp_path: Path, damage: str) -> None:
    dump = open_dump(tmp_path / "x", PLAN)
    for index in range(3):
        commit(dump, index)
    root = dump.finish(dump.all_records() or [], samples=10).root
    shard = tmp_path / "x" / "shards" / "v000-00001.h5"
    if damage == "cut":
        content = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(content[:-1])
    else:
        shard.unlink()
    again = open_dump(tmp_path / "x", PLAN)
    assert not again.finished
    assert [again.claim(0, index) for index in range(3)] == [False, True, False]
    commit(again, 1)
    assert again.finish(again.all_records() or [], samples=10).root == root


def test_a_shard_made_anew_with_other_bytes_and_not_recorded_is_made_again(tmp_path: Path) -> None:
    """Another machine heals a folder, and is killed between a shard and its record: the old one has other bytes."""
    dump = open_dump(tmp_path / "x", PLAN)
    for index in range(3):
        commit(dump, index)
    dump.finish(dump.all_records() or [], samples=10)
    dump.leave()
    (tmp_path / "x" / "shards" / "v000-00001.h5").unlink()
    killed = open_dump(tmp_path / "x", PLAN)
    assert killed.claim(0, 1)
    container, _ = fill(killed, 1, shift=1.0)
    assert container.publish()
    killed.release(0, 1)
    killed.leave()
    again = open_dump(tmp_path / "x", PLAN)
    assert again.claim(0, 1)
    commit(again, 1)
    again.finish(again.all_records() or [], samples=10)
    assert verify(tmp_path / "x").ok
