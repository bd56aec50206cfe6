"""A cache in another encoding: the rows of a dump in that encoding, with ids, labels and views as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, MismatchError, UsageError
from kdcache.store.cache import open as open_cache
from kdcache.store.convert import convert
from kdcache.store.export import export
from kdcache.store.merge import merge
from kdcache.store.verify import verify
from kdcache.store.writer import Writer

ROWS, CLASSES = 300, 40
LOGITS = np.random.default_rng(0).normal(size=(ROWS, CLASSES)).astype(np.float32) * 3
LABELS = np.arange(ROWS) % CLASSES - 1  # -1 as well


def write(path: Path, **options: Any) -> Path:
    with Writer(path, classes=CLASSES, shard_rows=128, provenance={"teacher": {"spec": "m:f"}}, **options) as writer:
        writer.write(np.arange(ROWS) * 3, LOGITS, LABELS, input_digests=np.arange(ROWS, dtype=np.uint64))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", dtype="float32")


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"dtype": "int8"},
        {"dtype": "int4"},
        {"top_k": 5},
        {"top_k": 7, "temperatures": (1.0, "z2")},
        {"top_k": 400},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["out", "out.h5"])
def test_rows_are_those_of_a_dump_in_that_encoding(
    source: Path, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    root = convert(source, tmp_path / name, **options)
    report = verify(tmp_path / name, expect_root=root)
    assert report.ok
    assert report.rows == ROWS
    expected = write(tmp_path / "expected", **options)
    with open_cache(tmp_path / name) as made, open_cache(expected) as wanted:
        assert made.encoding == wanted.encoding
        left, right = made.gather(np.arange(ROWS)), wanted.gather(np.arange(ROWS))
        assert {n: a.tobytes() for n, a in left.arrays.items()} == {n: a.tobytes() for n, a in right.arrays.items()}
        assert np.array_equal(left.sample_id, right.sample_id)
        assert np.array_equal(left.label, right.label)
        assert np.array_equal(left.input_digest, right.input_digest)


def test_the_lineage_is_told(source: Path, tmp_path: Path) -> None:
    with open_cache(source) as cache:
        first = cache.root
    second = convert(source, tmp_path / "half", dtype="float16")
    convert(tmp_path / "half", tmp_path / "small", dtype="int4")
    with open_cache(tmp_path / "small") as cache:
        lineage = cache.provenance["converted_from"]
        assert cache.provenance["teacher"] == {"spec": "m:f"}
    assert [one["root"] for one in lineage] == [first, second]
    assert [one["encoding"]["dtype"] for one in lineage] == ["float32", "float16"]


def test_views_can_be_left_out_and_shards_cut_anew(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", dtype="int8", views=[0], shard_rows=50)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["shard_rows"], len(manifest["shards"])) == (50, 6)
    with pytest.raises(MismatchError, match=r"has the views \[0\], not \[1\]"):
        convert(source, tmp_path / "more", dtype="int8", views=[1])


def test_a_conversion_that_was_interrupted_goes_on(source: Path, tmp_path: Path) -> None:
    calls = 0

    def stop(rows: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", dtype="int8", shard_rows=50, progress=stop)
    kept = {path: path.stat().st_ino for path in (tmp_path / "out" / "shards").glob("*.h5")}
    assert len(kept) == 2
    root = convert(source, tmp_path / "out", dtype="int8", shard_rows=50)
    assert {path: path.stat().st_ino for path in kept} == kept
    assert convert(source, tmp_path / "whole", dtype="int8", shard_rows=50) == root


def test_what_cannot_be_meant_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has this encoding already \(dense float32\); `kdcache merge`"):
        convert(source, tmp_path / "out", dtype="float32")
    with pytest.raises(UsageError, match="is the cache that is read"):
        convert(source, source, dtype="int8")
    merge(source, tmp_path / "one.h5")
    for call in (
        lambda: convert(tmp_path / "one.h5", tmp_path / "." / "one.h5", dtype="int8", overwrite=True),
        lambda: export(tmp_path / "one.h5", tmp_path / "one.h5", overwrite=True),
    ):
        with pytest.raises(UsageError, match="is the cache that is read"):
            call()
    assert verify(tmp_path / "one.h5").ok
    with pytest.raises(UsageError, match="--top-k stores float16"):
        convert(source, tmp_path / "out", dtype="int8", top_k=5)
    with pytest.raises(UsageError, match="--shard-rows"):
        convert(source, tmp_path / "out", dtype="int8", shard_rows=0)
    convert(source, tmp_path / "sparse", top_k=5)
    with pytest.raises(UsageError, match=r"part of the logits .*what was left out does not come back"):
        convert(tmp_path / "sparse", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_damaged_row_ends_it_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    merge(source, tmp_path / "one.h5")
    with open_cache(tmp_path / "one.h5") as cache:
        offset = cache.catalog.parts[0].arrays["logits"].offset
    (tmp_path / "one.h5").chmod(0o644)
    with (tmp_path / "one.h5").open("r+b") as file:
        file.seek(offset + 1000)
        file.write(b"\xff")
    with pytest.raises(CorruptCacheError, match="checksum"):
        convert(tmp_path / "one.h5", tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(CorruptCacheError, match="checksum"):
        convert(tmp_path / "one.h5", tmp_path / "out.h5", dtype="int8")
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize("shard_rows", [50, 128])
def test_what_was_clamped_before_is_still_counted(tmp_path: Path, shard_rows: int) -> None:
    logits = LOGITS.copy()
    logits[:, 3] = -1e6
    with Writer(tmp_path / "source", classes=CLASSES, shard_rows=128) as writer:
        writer.write(np.arange(ROWS), logits)
    convert(tmp_path / "source", tmp_path / "out", dtype="int8", shard_rows=shard_rows)
    for name in ("source", "out"):
        shards = json.loads((tmp_path / name / "manifest.json").read_text())["shards"]
        assert sum(shard["clamped"] for shard in shards) == ROWS
