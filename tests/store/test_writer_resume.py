"""The Writer and what is there already: dumps to resume, paths that are taken, other writers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import (
    CorruptCacheError,
    DataError,
    IncompleteCacheError,
    KDCacheError,
    MismatchError,
    StorageError,
    UsageError,
)
from kdcache.store import cache as caches
from kdcache.store.verify import verify
from kdcache.store.writer import Writer

CLASSES = 5


def batches(table: Any, sizes: list[int]) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    start = 0
    for size in sizes:
        yield table.ids[start : start + size], table.logits[start : start + size], table.labels[start : start + size]
        start += size


def write(path: Path, table: Any, **options: Any) -> None:
    with Writer(path, **{"classes": CLASSES, "shard_rows": 40, **options}) as writer:
        for ids, logits, labels in batches(table, [30, 30, 30, 30]):
            fresh = np.array([i not in set(writer.done.tolist()) for i in ids], bool)
            if len(ids):
                writer.write(np.asarray(ids)[fresh], logits[fresh], labels[fresh])


def stop_after(path: Path, table: Any, rows: int, **options: Any) -> None:
    """A dump that an exception ends after some rows."""

    def run() -> None:
        with Writer(path, **{"classes": CLASSES, "shard_rows": 40, **options}) as writer:
            writer.write(table.ids[:rows], table.logits[:rows], table.labels[:rows])
            raise RuntimeError("the loop failed")

    with pytest.raises(RuntimeError, match="the loop failed"):
        run()


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_an_exception_leaves_committed_shards_and_no_manifest(
    tmp_path: Path, table: Any, content: Any, name: str
) -> None:
    path = tmp_path / name
    stop_after(path, table, 90)
    parts = tmp_path / ("teacher.h5.parts" if name.endswith(".h5") else name)
    names = [f"shards/v000-0000{n}.{ending}" for n in range(2) for ending in ("h5", "json")]
    assert sorted(content(parts)) == sorted(["plan.json", *names])
    with pytest.raises(IncompleteCacheError, match="not finished"):
        caches.open(path)


def test_provenance_too_long_for_one_file_is_refused_at_the_first_batch(tmp_path: Path, table: Any) -> None:
    with pytest.raises(UsageError, match="keep a folder cache"):
        write(tmp_path / "teacher.h5", table, provenance={"note": "x" * 60_000})
    write(tmp_path / "teacher", table, provenance={"note": "x" * 60_000})


@pytest.mark.parametrize("rows", [0, 1, 40, 79, 80, 100])
@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_a_resumed_dump_equals_an_uninterrupted_one_byte_for_byte(
    tmp_path: Path, table: Any, make_cache: Any, content: Any, rows: int, name: str
) -> None:
    path = tmp_path / f"resumed-{name}"
    stop_after(path, table, rows)
    with Writer(path, classes=CLASSES, shard_rows=40, resume=True) as writer:
        assert writer.done.tolist() == list(range(rows // 40 * 40))
        done = len(writer.done)
        writer.write(table.ids[done:], table.logits[done:], table.labels[done:])
    expected = content(make_cache(name))
    assert list(content(path).values()) == list(expected.values())


def test_resuming_with_every_row_there_already_just_finishes(
    tmp_path: Path, make_table: Any, content: Any, make_cache: Any
) -> None:
    table = make_table(80)
    stop_after(tmp_path / "resumed", table, 80)
    with Writer(tmp_path / "resumed", classes=CLASSES, resume=True) as writer:
        assert len(writer.done) == 80
    assert content(tmp_path / "resumed") == content(make_cache(table=table))


def test_a_short_shard_of_a_dump_that_was_killed_while_closing_is_done_again(
    tmp_path: Path, table: Any, folder: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.store.dump.DumpFolder.finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(path, table)
    assert (path / "shards/v000-00002.json").exists()
    with Writer(path, classes=CLASSES, resume=True) as writer:
        assert writer.done.tolist() == list(range(80))
        writer.write(table.ids[80:], table.logits[80:], table.labels[80:])
    assert content(path) == content(folder)


def test_a_one_file_dump_that_was_killed_while_merging_is_finished_by_resuming(
    tmp_path: Path, table: Any, one_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "killed.h5"
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.store.writer.merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(path, table)
    with pytest.raises(IncompleteCacheError):
        caches.open(path)
    with Writer(path, classes=CLASSES, resume=True) as writer:
        assert len(writer.done) == 100
        with pytest.raises(UsageError, match="committed before"):
            writer.write([1000], table.logits[:1])
    assert path.read_bytes() == one_file.read_bytes()
    assert not path.with_name("killed.h5.parts").exists()


def test_resuming_nothing_starts_a_new_dump(tmp_path: Path, table: Any, folder: Path, content: Any) -> None:
    write(tmp_path / "new", table, resume=True)
    assert content(tmp_path / "new") == content(folder)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"classes": 6}, "classes.count"),
        ({"classes": list("abcde")}, "classes"),
        ({"dtype": "float32"}, "encoding.dtype"),
        ({"shard_rows": 41}, "shard_rows"),
        ({"provenance": {"teacher": {"spec": "another"}}}, "provenance.teacher"),
    ],
)
def test_resuming_another_dump_is_refused_by_the_field_that_differs(
    tmp_path: Path, table: Any, change: dict[str, Any], field: str
) -> None:
    stop_after(tmp_path / "teacher", table, 90)
    with pytest.raises((MismatchError, KDCacheError), match=field):
        Writer(tmp_path / "teacher", **{"classes": CLASSES, "shard_rows": 40, "resume": True, **change})
    write(tmp_path / "teacher", table, resume=True)  # the refused one holds no lock


def test_provenance_with_tuples_and_number_keys_is_the_same_when_resumed(tmp_path: Path, table: Any) -> None:
    provenance = {"teacher": {"spec": "m:f", "sizes": (1, 2)}, "table": {10: "a", 9: "b"}}
    stop_after(tmp_path / "teacher", table, 90, provenance=provenance)
    write(tmp_path / "teacher", table, provenance=provenance, resume=True)
    assert caches.open(tmp_path / "teacher").provenance["teacher"] == {"spec": "m:f", "sizes": [1, 2]}
    assert verify(tmp_path / "teacher").ok


def test_ids_written_before_a_resumption_are_duplicates_too(tmp_path: Path, table: Any) -> None:
    stop_after(tmp_path / "teacher", table, 90)
    with (
        pytest.raises(DataError, match="sample id 7 was written before"),
        Writer(tmp_path / "teacher", classes=CLASSES, resume=True) as writer,
    ):
        writer.write([7], table.logits[:1])


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_a_path_that_is_taken_is_refused_and_overwriting_replaces_it(
    tmp_path: Path, table: Any, make_cache: Any, content: Any, name: str
) -> None:
    path = make_cache(name)
    before = content(path)
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"exists|finished"):
            Writer(path, classes=CLASSES, resume=resume)
    assert content(path) == before
    write(path, replace(table, logits=table.logits + 1), overwrite=True)
    np.testing.assert_array_equal(caches.open(path).gather([7]).dense(), table.logits[7:8] + 1)


def test_an_unfinished_dump_is_refused_without_resume(tmp_path: Path, table: Any) -> None:
    stop_after(tmp_path / "teacher.h5", table, 90)
    with pytest.raises(UsageError, match="resume=True"):
        Writer(tmp_path / "teacher.h5", classes=CLASSES)
    write(tmp_path / "teacher.h5", table, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("inside", ["notes.txt", "README.md", "shards/train-00000.tar", "shards/README.md"])
def test_a_folder_with_somebody_elses_files_is_never_touched(tmp_path: Path, inside: str, overwrite: bool) -> None:
    mine = tmp_path / "teacher" / inside
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UsageError, match="not part of a cache"):
        Writer(tmp_path / "teacher", classes=CLASSES, overwrite=overwrite)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_is_not_a_cache_is_never_removed(tmp_path: Path, overwrite: bool) -> None:
    for name in ("teacher", "teacher.h5"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(KDCacheError):
            Writer(tmp_path / name, classes=CLASSES, overwrite=overwrite)
        assert (tmp_path / name).read_text() == "mine"


def test_a_folder_in_the_place_of_one_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher.h5").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        Writer(tmp_path / "teacher.h5", classes=CLASSES)


def test_an_empty_folder_is_a_place_to_write_to(tmp_path: Path, table: Any) -> None:
    (tmp_path / "teacher").mkdir()
    write(tmp_path / "teacher", table)
    assert verify(tmp_path / "teacher").ok


def test_a_place_that_cannot_be_made_is_a_storage_error(tmp_path: Path, table: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not create"):
        write(tmp_path / "file" / "teacher", table)


def test_a_caught_error_does_not_publish_half_a_batch(
    tmp_path: Path, table: Any, folder: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        with Writer(tmp_path / "other", classes=CLASSES, shard_rows=40) as writer:
            writer.write(table.ids[:50], table.logits[:50], table.labels[:50])
            with monkeypatch.context() as patch:
                patch.setattr("kdcache.store.posix.os.pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
                with pytest.raises(StorageError, match="disk is full"):
                    writer.write(table.ids[50:60], table.logits[50:60], table.labels[50:60])
            with pytest.raises(UsageError, match="closed"):
                writer.write(table.ids[60:], table.logits[60:], table.labels[60:])

    with pytest.raises(UsageError, match="earlier write failed"):
        run()
    assert not (tmp_path / "other" / "manifest.json").exists()
    write(tmp_path / "other", table, resume=True)
    assert content(tmp_path / "other") == content(folder)


HOLDER = """
import sys, numpy as np
from kdcache.store.writer import Writer
writer = Writer(sys.argv[1], classes=5, shard_rows=40)
writer.write(np.arange(60), np.zeros((60, 5), np.float32))
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_a_second_writer_is_refused_by_the_process_that_holds_the_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "ready\n"
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(MismatchError, match=f"process {other.pid};"):
                Writer(path, classes=CLASSES, **options)
        other.kill()
    with Writer(path, classes=CLASSES, resume=True) as writer:  # the lock died with its holder
        assert writer.done.tolist() == list(range(40))
        writer.write([1000], np.zeros((1, 5)))


def test_a_second_writer_of_the_same_process_is_refused_too(tmp_path: Path, table: Any) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([0], table.logits[:1])
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(MismatchError, match=f"process {os.getpid()};"):
                Writer(tmp_path / "teacher", classes=CLASSES, **options)
        with pytest.raises(UsageError, match="exists"):
            Writer(tmp_path / "teacher", classes=CLASSES)


@pytest.mark.parametrize("there", ["another cache", "no cache"])
def test_committed_shards_never_go_for_a_file_that_they_were_not_merged_into(
    tmp_path: Path, table: Any, make_cache: Any, there: str
) -> None:
    stop_after(tmp_path / "x.h5", table, 60)
    if there == "another cache":
        make_cache("other.h5", table, dtype="float32").rename(tmp_path / "x.h5")
    else:
        (tmp_path / "x.h5").write_bytes(b"mine")
    with pytest.raises(MismatchError if there == "another cache" else CorruptCacheError):
        Writer(tmp_path / "x.h5", classes=CLASSES, resume=True)
    (tmp_path / "x.h5").unlink()
    write(tmp_path / "x.h5", table, resume=True)
    assert verify(tmp_path / "x.h5").ok
