"""A cache in another encoding: the rows of a dump in that encoding, with ids, labels and views as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, DataError, MismatchError, UsageError
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


def csv_of(path: Path, rows: list[tuple[Any, Any]], header: str = "sample_id,label,score") -> Path:
    path.write_text("\n".join([header, *(f"{sample_id},{label},0.5" for sample_id, label in rows), ""]))
    return path


@pytest.mark.parametrize("options", [{}, {"dtype": "int4"}, {"top_k": 5}])
@pytest.mark.parametrize("out", ["out", "out.h5"])
def test_corrected_labels_come_in_by_sample_id(source: Path, tmp_path: Path, options: dict[str, Any], out: str) -> None:
    corrected = csv_of(tmp_path / "labels.csv", [(30, 7), (3, LABELS[1]), (897, -1)])
    expected = LABELS.copy()
    expected[[10, 299]] = 7, -1
    convert(source, tmp_path / out, labels=corrected, **options)
    assert verify(tmp_path / out).ok
    with open_cache(tmp_path / out) as made, open_cache(source) as old:
        rows = made.gather(np.arange(ROWS))
        np.testing.assert_array_equal(rows.label, expected)
        np.testing.assert_array_equal(rows.sample_id, old.gather(np.arange(ROWS)).sample_id)
        assert made.provenance["corrected_labels"]["changed"] == 2
        assert made.provenance["corrected_labels"]["samples"] == 3
        assert made.provenance["converted_from"][0]["root"] == old.root
        if not options:
            np.testing.assert_array_equal(rows.dense(), LOGITS)
    if "top_k" in options:  # the logit that is kept is that of the label as it is now
        write_with(tmp_path / "direct", expected, **options)
        with open_cache(tmp_path / "direct") as direct, open_cache(tmp_path / out) as made:
            kept = made.gather(np.arange(ROWS)).arrays["label_logits"]
            np.testing.assert_array_equal(kept, direct.gather(np.arange(ROWS)).arrays["label_logits"])


def write_with(path: Path, labels: np.ndarray, **options: Any) -> None:
    with Writer(path, classes=CLASSES, **options) as writer:
        writer.write(np.arange(ROWS), LOGITS, labels)


def test_text_ids_are_read_as_a_spreadsheet_was_given_them(tmp_path: Path) -> None:
    with Writer(tmp_path / "source", classes=CLASSES) as writer:
        writer.write(["-a", "ä", "'q"], LOGITS[:3], [1, 2, 3])
    content = "sample_id,label\n'-a,5\nä,6\n''q,7\n".encode("utf-8-sig")
    (tmp_path / "labels.csv").write_bytes(content)
    convert(tmp_path / "source", tmp_path / "out", labels=tmp_path / "labels.csv")
    with open_cache(tmp_path / "out") as made:
        assert made.gather(np.arange(3)).label.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([(30, 40)], DataError, "line 2: the label is '40', expected a number from 0 to 39"),
        ([(30, "cat")], DataError, "the label is 'cat'"),
        ([(30, 1), (30, 2)], DataError, "the sample 30 stands there twice"),
        ([(30, 1), (31, 2)], MismatchError, "names 1 samples that source does not hold .31."),
        ([("x", 1)], MismatchError, "the sample id 'x' is no integer"),
        ([("9" * 5000, 1)], MismatchError, "the sample id '9+ is no integer"),
        ([(10**30, 1)], DataError, "must fit int64"),
        ([(3, LABELS[1])], UsageError, "all 1 labels are those of source"),
        ([], UsageError, "no line behind its header"),
    ],
)
def test_labels_that_cannot_be_meant_write_nothing(
    source: Path, tmp_path: Path, rows: list[tuple[Any, Any]], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        convert(source, tmp_path / "out", labels=csv_of(tmp_path / "labels.csv", rows))
    assert not (tmp_path / "out").exists()


def test_a_file_of_other_columns_and_rows_without_labels_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the columns sample_id and label, found"):
        convert(source, tmp_path / "out", labels=csv_of(tmp_path / "labels.csv", [(30, 1)], header="id,label,x"))
    with pytest.raises(UsageError, match="there is no file"):
        convert(source, tmp_path / "out", labels=tmp_path / "nothing.csv")
    with Writer(tmp_path / "bare", classes=CLASSES) as writer:
        writer.write(np.arange(3), LOGITS[:3])
    with pytest.raises(UsageError, match="bare has no labels"):
        convert(tmp_path / "bare", tmp_path / "out", labels=csv_of(tmp_path / "labels.csv", [(0, 1)]))
    write_with(tmp_path / "sparse", LABELS, top_k=3)
    with pytest.raises(UsageError, match="holds part of the logits"):
        convert(tmp_path / "sparse", tmp_path / "out", labels=csv_of(tmp_path / "labels.csv", [(0, 1)]))
