"""An open cache: rows by id, batches in any order, every damage found when a row is first touched."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError, CoverageError, IncompleteCacheError, MismatchError, UsageError
from kdcache.store import cache as caches
from kdcache.store.merge import merge
from kdcache.store.rows import TeacherRows
from kdcache.store.writer import Writer

ACCESS = pytest.mark.parametrize("access", ["mmap", "pread"])
KINDS = pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
SCATTERED = np.random.default_rng(3).permutation(np.arange(-7, 93)) * 1_000_003


def assert_equal(found: TeacherRows, expected: TeacherRows) -> None:
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    for field in ("sample_id", "view", "label", "has_teacher", "input_digest"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


@KINDS
@ACCESS
def test_a_cache_says_what_it_is(make_cache: Any, name: str, access: str) -> None:
    cache = caches.open(make_cache(name, classes=list("abcde"), provenance={"teacher": {"spec": "m:f"}}), access=access)
    assert len(cache) == cache.num_samples == 100
    assert cache.shape == (100, 5)
    assert cache.num_classes == 5
    assert cache.classes == ("a", "b", "c", "d", "e")
    assert cache.views == (0,)
    assert cache.has_labels
    assert not cache.has_digests
    assert cache.provenance["teacher"] == {"spec": "m:f"}
    assert cache.encoding.dtype == "float16"
    assert "shape=(100, 5)" in repr(cache)
    assert len(cache.root) == 64


@KINDS
@ACCESS
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(st.integers(-1, 99), max_size=40))
def test_any_batch_is_what_was_written(
    make_cache: Any, table: Any, tmp_path: Path, name: str, access: str, wanted: list[int]
) -> None:
    path = tmp_path / name if (tmp_path / name).exists() else make_cache(name, digests=True)
    rows = caches.open(path, access=access).gather(wanted)
    at = np.array(wanted, np.int64)
    known = at >= 0
    np.testing.assert_array_equal(rows.dense(), np.where(known[:, None], table.logits[at], 0))
    np.testing.assert_array_equal(rows.label, np.where(known, table.labels[at], -1))
    np.testing.assert_array_equal(rows.sample_id, np.where(known, at, 0))
    np.testing.assert_array_equal(rows.input_digest, np.where(known, at * 0x0101010101, 0))
    np.testing.assert_array_equal(rows.has_teacher, known)
    np.testing.assert_array_equal(rows.view, np.zeros(len(at)))


def test_gathered_arrays_have_the_promised_shapes_and_types(make_cache: Any, make_table: Any) -> None:
    path = make_cache(table=make_table(trailing=(3, 2)), digests=True)
    rows = caches.open(path).gather([5, 6, 7])
    assert {n: (a.shape, a.dtype.str) for n, a in rows.arrays.items()} == {
        "logits": ((3, 5, 3, 2), "<f2"),
        "row_max": ((3, 3, 2), "<f4"),
    }
    assert rows.dense().shape == (3, 5, 3, 2)
    assert rows.dense().dtype == np.float32
    assert (rows.sample_id.dtype, rows.view.dtype, rows.label.dtype) == (np.int64, np.uint16, np.int64)
    assert (rows.has_teacher.dtype, rows.input_digest.dtype) == (bool, np.uint64)


def test_a_cache_without_labels_gives_none(make_cache: Any) -> None:
    rows = caches.open(make_cache(labels=False)).gather([0, -1])
    assert rows.label is None
    assert rows.input_digest is None


@pytest.mark.parametrize("ids", [SCATTERED, np.arange(100) + np.iinfo(np.int64).min, np.arange(100) + (2**63 - 100)])
@KINDS
def test_rows_of_any_integers_are_found(make_cache: Any, make_table: Any, name: str, ids: np.ndarray) -> None:
    table = make_table(ids=ids)
    cache = caches.open(make_cache(name, table))
    np.testing.assert_array_equal(cache.sample_ids, ids)
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(cache.rows(ids[order]), order)
    np.testing.assert_array_equal(cache.gather(cache.rows(ids[order])).dense(), table.logits[order])
    strangers = [i for i in (-(2**63), -(2**63) + 100, -1, 5, 100, 2**62, 2**63 - 101, 2**63 - 1) if i not in set(ids)]
    assert cache.find(strangers).tolist() == [-1] * len(strangers)


@KINDS
def test_rows_of_text_are_found(make_cache: Any, make_table: Any, name: str) -> None:
    ids = [f"class {n % 7}/ö{n}.png" for n in range(100)]
    cache = caches.open(make_cache(name, make_table(ids=ids)))
    assert [i.decode() for i in cache.sample_ids] == ids
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(cache.rows([ids[n] for n in order]), order)
    assert cache.find(["class 0/ö0", "zzz", "a", ids[3] + "x" * 500, ids[99]]).tolist() == [-1, -1, -1, -1, 99]
    missing = cache.gather([-1, 0])
    assert missing.sample_id.tolist() == [b"", ids[0].encode()]


def test_an_unknown_id_is_a_coverage_error_that_names_it(folder: Path) -> None:
    with pytest.raises(CoverageError, match="does not hold 2 of the 3 samples asked for: 100, -5"):
        caches.open(folder).rows([0, 100, -5])


def test_ids_of_another_kind_are_a_mismatch(folder: Path, make_cache: Any, make_table: Any) -> None:
    with pytest.raises(MismatchError, match="are integers, the ones asked for are"):
        caches.open(folder).find(["a"])
    text = make_cache("text", make_table(ids=[f"{n}" for n in range(100)]))
    with pytest.raises(MismatchError, match="are text, the ones asked for are int64"):
        caches.open(text).rows([1])


def test_another_view_is_a_mismatch(folder: Path) -> None:
    with pytest.raises(MismatchError, match=r"has the views \[0\], not 1"):
        caches.open(folder).rows([0], view=1)


@ACCESS
def test_no_rows_are_an_empty_batch(folder: Path, access: str) -> None:
    cache = caches.open(folder, access=access)
    assert cache.rows([]).shape == (0,)
    rows = cache.gather([])
    assert len(rows) == 0
    assert rows.dense().shape == (0, 5)


@pytest.mark.parametrize("rows", [[100], [-2], [2**62], [[0]], [0.5], [True, False], ["a"]])
def test_what_is_not_a_row_is_refused(folder: Path, rows: Any) -> None:
    with pytest.raises(UsageError, match="row"):
        caches.open(folder).gather(rows)


@ACCESS
def test_a_buffer_is_reused_and_nothing_of_the_last_batch_shows(make_cache: Any, access: str) -> None:
    cache = caches.open(make_cache(digests=True), access=access)
    fresh = caches.open(cache.path)
    out = cache.gather(np.arange(50))
    logits = out.arrays["logits"]
    for wanted in ([99, 3, 3, -1], np.arange(50, 100), [], [-1] * 50, [7]):
        found = cache.gather(wanted, out=out)
        assert_equal(found, fresh.gather(wanted))
        assert len(found) == len(wanted)
        assert np.shares_memory(found.arrays["logits"], logits) == bool(len(wanted))


def test_a_buffer_that_does_not_fit_is_refused_before_a_byte_is_written(make_cache: Any, make_table: Any) -> None:
    cache = caches.open(make_cache(digests=True))
    with pytest.raises(UsageError, match="out has room for 2 rows, 3 were asked for"):
        cache.gather([1, 2, 3], out=cache.gather([1, 2]))
    others = [
        caches.open(make_cache("wider", make_table(classes=6), digests=True)).gather([0, 1]),
        caches.open(make_cache("float32", dtype="float32", digests=True)).gather([0, 1]),
        caches.open(make_cache("unlabelled", labels=False, digests=True)).gather([0, 1]),
        caches.open(make_cache("undigested")).gather([0, 1]),
        caches.open(make_cache("text", make_table(ids=[f"{n}" for n in range(100)]), digests=True)).gather([0, 1]),
        cache.gather([0, 1]).tensors(),
        cache.gather([0, 1, 2, 3]).take(slice(None, None, 2)),
    ]
    for other in others:
        with pytest.raises(UsageError, match="out does not fit"):
            cache.gather([0, 1], out=other)


@KINDS
def test_a_cache_is_pickled_as_its_path(make_cache: Any, table: Any, name: str) -> None:
    cache = caches.open(make_cache(name))
    cache.gather(np.arange(100))
    data = pickle.dumps(cache)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).gather([3]).dense(), table.logits[[3]])


def test_a_pickle_of_a_cache_that_was_replaced_is_a_mismatch(make_cache: Any, make_table: Any) -> None:
    data = pickle.dumps(caches.open(make_cache()))
    make_cache(table=make_table(90), overwrite=True)
    with pytest.raises(MismatchError, match="root hash"):
        pickle.loads(data)


@KINDS
def test_the_expected_root_is_compared(make_cache: Any, name: str) -> None:
    path = make_cache(name)
    root = caches.open(path).root
    assert caches.open(path, expect_root=root).root == root
    with pytest.raises(MismatchError, match=f"{root}, expected 000"):
        caches.open(path, expect_root="0" * 64)


def test_an_unknown_way_of_reading_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="choose mmap or pread"):
        caches.open(folder, access="http")


@ACCESS
def test_a_closed_cache_is_refused(folder: Path, access: str) -> None:
    with caches.open(folder, access=access) as cache:
        rows = cache.gather([0])
    with pytest.raises(UsageError, match="is closed"):
        cache.gather([0])
    assert rows.has_teacher.all()  # a batch is a copy


@ACCESS
@KINDS
def test_threads_may_gather_from_the_first_moment_on(make_cache: Any, table: Any, name: str, access: str) -> None:
    path = make_cache(name, shard_rows=3)
    for _ in range(5):
        cache = caches.open(path, access=access)
        barrier = threading.Barrier(8)
        wrong: list[object] = []

        def work(seed: int, cache: Any = cache, barrier: Any = barrier, wrong: list[object] = wrong) -> None:
            rng = np.random.default_rng(seed)
            barrier.wait()
            for _ in range(20):
                at = rng.integers(0, 100, 16)
                try:
                    if not np.array_equal(cache.gather(at).dense(), table.logits[at]):
                        wrong.append(at)
                except BaseException as error:
                    wrong.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_threads_never_skip_a_check(make_cache: Any, flip: Any) -> None:
    path = make_cache("teacher.h5")
    layout = caches.open(path).catalog.parts[0].arrays["logits"]
    flip(path, layout.stop - 1)
    for _ in range(5):
        cache = caches.open(path)
        threads = [threading.Thread(target=cache.gather, args=(np.arange(99),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(CorruptCacheError, match="row 99"):
            cache.gather([99])


@ACCESS
def test_shards_and_one_file_give_the_same_rows(make_cache: Any, access: str) -> None:
    one = caches.open(make_cache("teacher.h5", digests=True), access=access)
    wanted = np.random.default_rng(0).integers(-1, 100, 300)
    for shard_rows in (7, 33, 100, 1000):
        path = make_cache(f"by{shard_rows}", digests=True, shard_rows=shard_rows)
        assert_equal(caches.open(path, access=access).gather(wanted), one.gather(wanted))


@ACCESS
@KINDS
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_of_a_row_is_found_when_the_row_is_first_touched(
    make_cache: Any, tmp_path: Path, flip: Any, name: str, access: str, data: st.DataObject
) -> None:
    path = tmp_path / name if (tmp_path / name).exists() else make_cache(name, digests=True)
    part = data.draw(st.sampled_from(caches.open(path).catalog.parts))
    array = data.draw(st.sampled_from(sorted(part.arrays.values(), key=lambda a: a.name)))
    position = data.draw(st.integers(array.offset, array.stop - 1))
    mask = 1 << data.draw(st.integers(0, 7))
    bad = part.start + (position - array.offset) // array.spec.row_bytes
    flip(part.path, position, mask)
    try:
        cache = caches.open(path, access=access)
        others = np.setdiff1d(np.arange(100), [bad])
        cache.gather(others)
        for _ in range(2):
            with pytest.raises(CorruptCacheError, match=rf"{part.path.name}: row {bad} .*checksum"):
                cache.gather([0 if bad else 1, bad])
        cache.gather(others)
    finally:
        flip(part.path, position, mask)


def test_a_flipped_bit_of_a_shards_header_is_found_when_it_is_first_mapped(folder: Path, flip: Any) -> None:
    part = caches.open(folder).catalog.parts[1]
    payload = {n for a in part.arrays.values() for n in range(a.offset, a.stop)}
    outside = [n for n in range(part.size) if n not in payload]
    for position in np.random.default_rng(0).choice(outside, 60, replace=False).tolist():
        flip(part.path, position)
        cache = caches.open(folder)
        cache.gather([0, 39, 80])
        with pytest.raises(CorruptCacheError, match=f"{part.path.name}: its header"):
            cache.gather([40])
        flip(part.path, position)


def test_a_flipped_bit_of_a_one_file_header_is_found_when_it_is_opened(one_file: Path, flip: Any) -> None:
    root = caches.open(one_file).root
    part = caches.open(one_file).catalog.parts[0]
    payload = {n for a in part.arrays.values() for n in range(a.offset, a.stop)}
    outside = [n for n in range(part.size) if n not in payload]
    for position in np.random.default_rng(0).choice(outside, 60, replace=False).tolist():
        flip(one_file, position)
        with pytest.raises((CorruptCacheError, MismatchError)):
            caches.open(one_file, expect_root=root)
        flip(one_file, position)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: data + b"\0", lambda data: b""]
)
@KINDS
def test_a_truncated_or_grown_file_is_corrupt(make_cache: Any, name: str, change: Any) -> None:
    path = make_cache(name)
    file = path if path.is_file() else path / "shards" / "v000-00001.h5"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(change(data))
    with pytest.raises(CorruptCacheError, match=file.name):
        caches.open(path).gather([40])
    if path.is_dir():
        caches.open(path).gather([0, 99])  # the others still read


def test_a_missing_shard_is_incomplete_and_the_others_still_read(folder: Path) -> None:
    (folder / "shards" / "v000-00001.h5").unlink()
    cache = caches.open(folder)
    cache.gather([0, 39, 80, 99])
    with pytest.raises(IncompleteCacheError, match=r"v000-00001.h5 is missing"):
        cache.gather([0, 40])


def test_swapped_shards_are_corrupt(folder: Path) -> None:
    first, second = (folder / "shards" / f"v000-0000{n}.h5" for n in range(2))
    middle = folder / "shards" / "middle"
    first.rename(middle)
    second.rename(first)
    middle.rename(second)
    for row in (0, 40):
        with pytest.raises(CorruptCacheError, match="header"):
            caches.open(folder).gather([row])


def test_swapped_rows_are_corrupt_although_each_is_sound(one_file: Path) -> None:
    part = caches.open(one_file).catalog.parts[0]
    data = bytearray(one_file.read_bytes())
    for array in part.arrays.values():
        width = array.spec.row_bytes
        a, b = (slice(array.offset + n * width, array.offset + (n + 1) * width) for n in (3, 4))
        data[a], data[b] = data[b], data[a]
    one_file.unlink()
    one_file.write_bytes(data)
    with pytest.raises(CorruptCacheError, match="row 3"):
        caches.open(one_file).gather([3, 4])


def test_an_edited_manifest_is_corrupt(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_bytes().replace(b'"samples":100', b'"samples":101')
    path.unlink()
    path.write_bytes(text)
    with pytest.raises(CorruptCacheError, match="root hash does not match"):
        caches.open(folder)


@KINDS
def test_a_dump_in_progress_is_incomplete(tmp_path: Path, table: Any, name: str) -> None:
    with Writer(tmp_path / name, classes=5, shard_rows=40) as writer:
        writer.write(table.ids, table.logits)
        with pytest.raises(IncompleteCacheError, match="not finished"):
            caches.open(tmp_path / name)
    caches.open(tmp_path / name)


def test_nothing_there_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError, match="does not exist"):
        caches.open(tmp_path / "teacher.h5")
    with pytest.raises(IncompleteCacheError, match="not a kdcache folder"):
        caches.open(tmp_path)


def test_a_lone_shard_is_refused_with_the_advice_to_open_its_folder(folder: Path) -> None:
    with pytest.raises(CorruptCacheError, match="open the folder"):
        caches.open(folder / "shards" / "v000-00000.h5")


@pytest.mark.parametrize("data", [b"", b"text", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(5000)])
def test_another_file_is_corrupt(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.h5").write_bytes(data)
    with pytest.raises(CorruptCacheError, match="kdcache"):
        caches.open(tmp_path / "x.h5")


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("replace", [replace_by_link, replace_by_fifo, replace_by_folder])
@pytest.mark.parametrize("file", ["shards/v000-00000.h5", "manifest.json"])
def test_only_regular_files_are_read(folder: Path, file: str, replace: Any) -> None:
    replace(folder / file)
    with pytest.raises(CorruptCacheError, match="regular files only"):
        caches.open(folder).gather([0])


def test_a_folder_that_moves_is_found_under_its_new_name(folder: Path, table: Any) -> None:
    moved = folder.rename(folder.with_name("moved"))
    np.testing.assert_array_equal(caches.open(moved).gather([1]).dense(), table.logits[[1]])


def test_a_reader_keeps_its_rows_while_the_cache_is_replaced(make_cache: Any, make_table: Any, table: Any) -> None:
    for name in ("teacher", "teacher.h5"):
        path = make_cache(name)
        reader = caches.open(path)
        reader.gather([0, 40, 80])  # all shards are mapped
        make_cache(name, make_table(60), overwrite=True)
        np.testing.assert_array_equal(reader.gather(np.arange(100)).dense(), table.logits)
        assert len(caches.open(path)) == 60


def test_a_reader_that_had_not_mapped_a_shard_says_so_when_the_cache_was_replaced(
    make_cache: Any, make_table: Any
) -> None:
    path = make_cache()
    reader = caches.open(path)
    reader.gather([0])
    make_cache(table=make_table(60, classes=7), overwrite=True)
    with pytest.raises((CorruptCacheError, IncompleteCacheError)):
        reader.gather([99])
    with pytest.raises(CorruptCacheError):
        reader.gather([40])


def test_unlisted_shards_are_ignored(folder: Path, table: Any) -> None:
    (folder / "shards" / "v000-00003.h5").write_bytes(b"another process is working here")
    (folder / "shards" / ".tmp-v000-00004.h5-1-ab").write_bytes(b"")
    np.testing.assert_array_equal(caches.open(folder).gather(np.arange(100)).dense(), table.logits)


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_a_merged_view_reads_like_its_source(folder: Path, tmp_path: Path, access: str) -> None:
    merge(folder, tmp_path / "merged.h5")
    wanted = np.arange(-1, 100)
    merged = caches.open(tmp_path / "merged.h5", access=access)
    assert_equal(merged.gather(wanted), caches.open(folder, access=access).gather(wanted))


def test_reading_writes_nothing(folder: Path, content: Any) -> None:
    before = content(folder)
    os.unlink(folder / ".lock")
    caches.open(folder).gather(np.arange(100))
    assert content(folder) == before
    assert not (folder / ".lock").exists()
