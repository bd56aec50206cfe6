"""The Writer: the same bytes however the rows come, nothing half-done published, bad input named."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.errors import (
    DataError,
    IncompleteCacheError,
    KDCacheError,
    LogitsError,
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


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_what_is_written_is_read(make_cache: Any, table: Any, dtype: str, name: str) -> None:
    path = make_cache(name, dtype=dtype)
    cache = caches.open(path)
    rows = cache.gather(cache.rows(table.ids))
    np.testing.assert_array_equal(rows.dense(), table.logits)
    np.testing.assert_array_equal(rows.label, table.labels)
    np.testing.assert_array_equal(rows.sample_id, table.ids)
    assert verify(path).ok


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 45), max_size=8))
def test_any_batch_size_gives_the_same_bytes(
    tmp_path: Path, table: Any, content: Any, folder: Path, sizes: list[int]
) -> None:
    left = 100 - sum(sizes)
    with Writer(tmp_path / "other", classes=CLASSES, shard_rows=40, overwrite=True) as writer:
        for batch in batches(table, sizes if left <= 0 else [*sizes, left]):
            writer.write(*batch)
    assert content(tmp_path / "other") == content(folder)


def test_the_last_shard_may_be_short(folder: Path, table: Any) -> None:
    assert [p.name for p in sorted((folder / "shards").iterdir())] == [f"v000-0000{n}.h5" for n in range(3)]
    assert [r.rows for r in caches.open(folder).catalog.shards] == [40, 40, 20]


def test_rows_that_fill_the_last_shard_leave_no_empty_one(make_cache: Any, make_table: Any) -> None:
    assert [r.rows for r in caches.open(make_cache(table=make_table(80))).catalog.shards] == [40, 40]


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_a_finished_cache_leaves_nothing_else_behind(make_cache: Any, tmp_path: Path, content: Any, name: str) -> None:
    make_cache(name)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    shards = [f"teacher/shards/v000-0000{n}.h5" for n in range(3)]
    assert files == (["teacher.h5"] if name.endswith(".h5") else ["teacher/.lock", "teacher/manifest.json", *shards])


def test_published_files_are_read_only(folder: Path) -> None:
    assert {p.stat().st_mode & 0o777 for p in [folder / "manifest.json", *(folder / "shards").iterdir()]} == {0o444}


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


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), b"x", 10**30, float("inf")])
def test_provenance_that_json_does_not_have_is_refused_before_anything_is_made(tmp_path: Path, value: object) -> None:
    with pytest.raises(UsageError, match="plain nested values"):
        Writer(tmp_path / "teacher", classes=CLASSES, provenance={"note": value})
    with pytest.raises(UsageError, match="teacher and data"):
        Writer(tmp_path / "teacher", classes=CLASSES, provenance={"teacher": "resnet50"})
    assert not (tmp_path / "teacher").exists()


def test_provenance_too_long_for_one_file_is_refused_at_the_first_batch(tmp_path: Path, table: Any) -> None:
    with pytest.raises(UsageError, match="keep a folder cache"):
        write(tmp_path / "teacher.h5", table, provenance={"note": "x" * 60_000})
    write(tmp_path / "teacher", table, provenance={"note": "x" * 60_000})


@pytest.mark.parametrize("twice", [[3, 4, 3], [0, 1, 99]])
def test_duplicate_ids_are_refused_by_name(tmp_path: Path, table: Any, twice: list[int]) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES, shard_rows=40) as writer:
        writer.write([99, 98], table.logits[:2])
        with pytest.raises(DataError, match=r"the sample id (3|99) .*unique"):
            writer.write(twice, table.logits[:3])
        writer.write([97], table.logits[:1])  # what was refused left nothing behind
    assert caches.open(tmp_path / "teacher").sample_ids.tolist() == [99, 98, 97]


def test_ids_written_before_a_resumption_are_duplicates_too(tmp_path: Path, table: Any) -> None:
    stop_after(tmp_path / "teacher", table, 90)
    with (
        pytest.raises(DataError, match="sample id 7 was written before"),
        Writer(tmp_path / "teacher", classes=CLASSES, resume=True) as writer,
    ):
        writer.write([7], table.logits[:1])


@pytest.mark.parametrize("label", [5, -2, 2**40])
def test_a_label_out_of_range_names_its_sample(tmp_path: Path, table: Any, label: int) -> None:
    with (
        pytest.raises(DataError, match=rf"sample 'b' has label {label}, expected 0 to 4"),
        Writer(tmp_path / "teacher", classes=CLASSES) as writer,
    ):
        writer.write(["a", "b"], table.logits[:2], [0, label])


@pytest.mark.parametrize("labels", [[0.5, 1.0], [[0], [1]], [0], ["a", "b"]])
def test_labels_of_another_kind_are_refused(tmp_path: Path, table: Any, labels: list[Any]) -> None:
    with pytest.raises(DataError, match="labels have"), Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([1, 2], table.logits[:2], labels)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_bad_logit_names_its_sample(tmp_path: Path, table: Any, value: float, dtype: Any) -> None:
    logits = table.logits.astype(dtype)
    logits[55, 2] = value
    with (
        pytest.raises(LogitsError, match="sample 55 hold NaN"),
        Writer(tmp_path / "teacher", classes=CLASSES, shard_rows=40) as writer,
    ):
        writer.write(table.ids, logits)


@pytest.mark.parametrize("logits", [np.zeros(5), np.zeros((2, 4)), np.zeros((2, 5), int), [["a"] * 5] * 2, None])
def test_logits_of_another_shape_or_kind_are_refused(tmp_path: Path, logits: Any) -> None:
    with pytest.raises(LogitsError), Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([1, 2], logits)


def test_a_width_that_changes_is_refused_and_what_was_there_stays(tmp_path: Path) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([0], np.zeros((1, 5, 2), np.float32))
        with pytest.raises(LogitsError, match=r"expected \(N, 5, 2\)"):
            writer.write([1], np.zeros((1, 5, 3), np.float32))
        writer.write([1], np.ones((1, 5, 2), np.float32))
    assert caches.open(tmp_path / "teacher").shape == (2, 5, 2)


@pytest.mark.parametrize(("first", "second"), [(None, [0]), ([0], None)])
def test_labels_come_from_the_first_batch_on_or_never(
    tmp_path: Path, table: Any, first: list[int] | None, second: list[int] | None
) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([0], table.logits[:1], first)
        if second is not None:
            with pytest.raises(DataError, match="from the first batch on"):
                writer.write([1], table.logits[:1], second)
        else:
            writer.write([1], table.logits[:1])
    cache = caches.open(tmp_path / "teacher")
    assert cache.has_labels == (first is not None)
    if cache.has_labels:
        assert cache.gather([0, 1]).label.tolist() == [0, -1]


def test_input_digests_come_for_every_row_or_for_none(tmp_path: Path, table: Any) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([0], table.logits[:1], input_digests=[2**64 - 1])
        for wrong in (None, [1, 2]):
            with pytest.raises(DataError, match=r"input[ _]digests"):
                writer.write([1], table.logits[:1], input_digests=wrong)
    assert caches.open(tmp_path / "teacher").gather([0]).input_digest.tolist() == [2**64 - 1]


@pytest.mark.parametrize(
    "kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=["float", "double", "half", "bfloat16"]
)
def test_tensors_of_every_float_type_are_taken(tmp_path: Path, kind: torch.dtype) -> None:
    logits = (torch.arange(20.0).reshape(4, 5) / 4).to(kind).requires_grad_()
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write(torch.arange(4), logits, torch.tensor([0, 1, 2, -1]))
    rows = caches.open(tmp_path / "teacher").gather([0, 1, 2, 3])
    np.testing.assert_array_equal(rows.dense(), logits.detach().float().numpy())
    assert rows.label.tolist() == [0, 1, 2, -1]


def test_text_ids_get_room_for_longer_ones(tmp_path: Path, table: Any) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write(["cat/1.png"], table.logits[:1])
        writer.write(["dog/ö" + "x" * 26], table.logits[:1])  # 32 bytes
        with pytest.raises(DataError, match=r"longer than the 32 bytes .*id_bytes="):
            writer.write(["x" * 33], table.logits[:1])
    assert caches.open(tmp_path / "teacher").rows(["dog/ö" + "x" * 26, "cat/1.png"]).tolist() == [1, 0]


def test_id_bytes_sets_the_room_of_text_ids(tmp_path: Path, table: Any) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES, id_bytes=50) as writer:
        writer.write(["a"], table.logits[:1])
        writer.write(["x" * 50], table.logits[:1])
    assert caches.open(tmp_path / "teacher").sample_ids.dtype == np.dtype("S50")
    for wrong in (0, 1025):
        with pytest.raises(UsageError, match="id_bytes"):
            Writer(tmp_path / "another", classes=CLASSES, id_bytes=wrong)


def test_kinds_of_ids_do_not_mix(tmp_path: Path, table: Any) -> None:
    with Writer(tmp_path / "teacher", classes=CLASSES) as writer:
        writer.write([1], table.logits[:1])
        with pytest.raises(DataError, match="use one kind"):
            writer.write(["a"], table.logits[:1])


@pytest.mark.parametrize("classes", [0, -1, True, "abcde", None, 2.5])
def test_classes_are_a_count_or_names(tmp_path: Path, classes: Any) -> None:
    with pytest.raises(UsageError):
        Writer(tmp_path / "teacher", classes=classes)


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_class_names_are_kept_in_order(make_cache: Any, name: str) -> None:
    path = make_cache(name, classes=["cat", "dög", "owl", "", "cat"])
    assert caches.open(path).classes == ("cat", "dög", "owl", "", "cat")


def test_a_numpy_count_is_a_count(make_cache: Any) -> None:
    assert caches.open(make_cache(classes=np.int64(5))).num_classes == 5


@pytest.mark.parametrize("setting", [{"dtype": "int8"}, {"shard_rows": 0}])
def test_unknown_settings_touch_nothing(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Writer(tmp_path / "teacher", classes=CLASSES, **setting)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_no_rows_are_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no rows"), Writer(tmp_path / name, classes=CLASSES) as writer:
        writer.write([], np.empty((0, CLASSES), np.float32))
    assert not any(tmp_path.iterdir())


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


def test_a_closed_writer_takes_no_rows_and_closes_twice(tmp_path: Path, table: Any) -> None:
    writer = Writer(tmp_path / "teacher", classes=CLASSES)
    writer.write(table.ids, table.logits)
    writer.close()
    writer.close()
    with pytest.raises(UsageError, match="closed"):
        writer.write([1000], table.logits[:1])


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


def test_memory_does_not_grow_with_the_size_of_a_shard(tmp_path: Path) -> None:
    logits = np.zeros((500, 1000), np.float32)
    peaks: dict[int, int] = {}

    def measure(rows: int) -> None:
        tracemalloc.start()
        with Writer(tmp_path / str(rows), classes=1000, shard_rows=rows) as writer:
            for start in range(0, rows - 1000, 500):  # a short last shard: it is copied into a smaller one
                writer.write(np.arange(start, start + 500), logits)
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    measure(2000)
    measure(10_000)
    # 20 MB a shard against 4; the ids that were seen cost about 100 bytes a row.
    assert peaks[10_000] < peaks[2000] + 8000 * 200 + (9 << 20)


def test_wide_classes_get_a_file_of_their_own(tmp_path: Path) -> None:
    names = [f"token number {n}" for n in range(5000)]
    with Writer(tmp_path / "teacher", classes=names) as writer:
        writer.write([0], np.zeros((1, 5000), np.float32))
    assert (tmp_path / "teacher" / "classes.json").exists()
    assert caches.open(tmp_path / "teacher").classes == tuple(names)
    assert verify(tmp_path / "teacher").ok


def test_writing_needs_no_torch(python: Callable[..., Any], tmp_path: Path) -> None:
    script = """
import sys, numpy as np, kdcache
with kdcache.Writer(sys.argv[1], classes=2) as writer:
    writer.write([1, 2], np.zeros((2, 2), np.float32), [0, 1])
kdcache.open(sys.argv[1]).gather([1, 0]).dense()
assert "torch" not in sys.modules
"""
    python(script, tmp_path / "teacher")
