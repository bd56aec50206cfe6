"""An open cache: rows by id, batches in any order, from any thread."""

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

from kdcache.errors import CoverageError, IncompleteCacheError, MismatchError, UsageError
from kdcache.store import cache as caches
from kdcache.store.merge import merge
from kdcache.store.rows import TeacherRows

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


@ACCESS
def test_shards_and_one_file_give_the_same_rows(make_cache: Any, access: str) -> None:
    one = caches.open(make_cache("teacher.h5", digests=True), access=access)
    wanted = np.random.default_rng(0).integers(-1, 100, 300)
    for shard_rows in (7, 33, 100, 1000):
        path = make_cache(f"by{shard_rows}", digests=True, shard_rows=shard_rows)
        assert_equal(caches.open(path, access=access).gather(wanted), one.gather(wanted))


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


@KINDS
@pytest.mark.parametrize("prefix", ["", "sample "])
def test_the_first_ids_need_not_all_of_them(make_cache: Any, make_table: Any, name: str, prefix: str) -> None:
    ids = [f"{prefix}{n}" for n in range(100)] if prefix else np.arange(7, 107)
    with caches.open(make_cache(name, make_table(ids=ids))) as cache:
        np.testing.assert_array_equal(cache.first_ids(6), cache.sample_ids[:6])
        np.testing.assert_array_equal(cache.first_ids(1000), cache.sample_ids)


def test_ids_of_rows_that_a_manifest_only_claims_are_not_made_up(folder: Path) -> None:
    (folder / "shards" / "v000-00002.h5").unlink()
    with caches.open(folder) as cache, pytest.raises(IncompleteCacheError, match="v000-00002"):
        cache.sample_ids  # noqa: B018
