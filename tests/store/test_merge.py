"""`merge`: the same rows in one file, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, IncompleteCacheError, KDCacheError, UsageError
from kdcache.store import cache as caches
from kdcache.store.merge import merge
from kdcache.store.rows import TeacherRows
from kdcache.store.verify import verify


def stored_arrays(rows: TeacherRows) -> dict[str, np.ndarray]:
    beside = {"sample_id": rows.sample_id, "label": rows.label, "input_digest": rows.input_digest}
    return {**rows.arrays, **{name: array for name, array in beside.items() if array is not None}}


@pytest.mark.parametrize("ids", [None, [f"image {n}" for n in range(100)]], ids=["integers", "text"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_merged_file_holds_the_same_rows(
    make_cache: Any, make_table: Any, tmp_path: Path, ids: Any, dtype: str
) -> None:
    source = make_cache(table=make_table(ids=ids), dtype=dtype, digests=True, classes=list("abcde"))
    done: list[int] = []
    root = merge(source, tmp_path / "merged.h5", progress=done.append)
    one, many = caches.open(tmp_path / "merged.h5"), caches.open(source)
    assert sum(done) == 100
    assert one.root == root
    assert one.root != many.root
    assert (one.classes, one.provenance, one.shape) == (many.classes, many.provenance, many.shape)
    for name, array in stored_arrays(many.gather(np.arange(100))).items():
        np.testing.assert_array_equal(stored_arrays(one.gather(np.arange(100)))[name], array)
    assert verify(tmp_path / "merged.h5").ok


def test_the_merged_file_does_not_depend_on_the_shards(make_cache: Any, tmp_path: Path) -> None:
    for shard_rows in (7, 100):
        merge(make_cache(f"by{shard_rows}", shard_rows=shard_rows), tmp_path / f"{shard_rows}.h5")
    merge(tmp_path / "7.h5", tmp_path / "again.h5")
    assert len({(tmp_path / n).read_bytes() for n in ("7.h5", "100.h5", "again.h5")}) == 1


@pytest.mark.parametrize("damage", ["flip", "remove", "none"])
def test_a_source_that_is_not_sound_leaves_nothing(folder: Path, flip: Any, tmp_path: Path, damage: str) -> None:
    shard = folder / "shards" / "v000-00002.h5"
    if damage == "flip":
        flip(shard, caches.open(folder).catalog.parts[2].arrays["logits"].offset)
    elif damage == "remove":
        shard.unlink()
    else:
        (folder / "manifest.json").unlink()
    before = sorted(tmp_path.iterdir())
    expected = CorruptCacheError if damage == "flip" else IncompleteCacheError
    with pytest.raises(expected):
        merge(folder, tmp_path / "merged.h5")
    assert sorted(tmp_path.iterdir()) == before


def test_a_name_that_is_taken_or_ends_in_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        merge(folder, tmp_path / "x.h5")
    assert (tmp_path / "x.h5").read_text() == "mine"
    with pytest.raises(UsageError, match=r"must end in \.h5"):
        merge(folder, tmp_path / "x.hdf5")
    merge(folder, tmp_path / "x.h5", overwrite=True)
    assert verify(tmp_path / "x.h5").ok


def test_a_file_that_appears_meanwhile_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    with pytest.raises(UsageError, match="appeared"):
        merge(folder, out, progress=lambda rows: out.exists() or (out.write_text("theirs") and None))
    assert out.read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-")] == []


def test_a_cache_may_be_merged_over_itself_while_it_is_read(one_file: Path, table: Any) -> None:
    reader = caches.open(one_file)
    reader.gather([0])
    before = one_file.read_bytes()
    merge(one_file, one_file, overwrite=True)
    assert one_file.read_bytes() == before
    np.testing.assert_array_equal(reader.gather([99]).dense(), table.logits[[99]])


def test_folders_on_the_way_are_made(folder: Path, tmp_path: Path) -> None:
    merge(folder, tmp_path / "a" / "b" / "x.h5")
    assert verify(tmp_path / "a" / "b" / "x.h5").ok


def test_an_error_of_the_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.store.posix.os.pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(KDCacheError, match="disk is full"):
        merge(folder, tmp_path / "x.h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["teacher"]
