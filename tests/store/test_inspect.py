"""`describe`: what a cache says about itself, from its manifest or header alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, IncompleteCacheError
from kdcache.store.cache import open as open_cache
from kdcache.store.inspect import describe
from kdcache.store.merge import merge
from kdcache.store.writer import Writer


def test_a_folder_is_described(make_cache: Any) -> None:
    path = make_cache(classes=list("abcde"), digests=True, provenance={"teacher": {"spec": "m:f"}})
    summary = describe(path)
    size = sum(p.stat().st_size for p in (path / "shards").iterdir())
    assert summary.pop("provenance")["teacher"] == {"spec": "m:f"}
    assert summary == {
        "kind": "folder",
        "root": open_cache(path).root,
        "format": 1,
        "samples": 100,
        "extents": [],
        "views": [0],
        "absent_views": [],
        "rows": 100,
        "classes": {"count": 5, "names": list("abcde")},
        "encoding": {"name": "dense", "dtype": "float16", "shape": [5]},
        "labels": True,
        "digests": True,
        "sample_ids": "integers",
        "bytes": size,
        "bytes_per_row": {"payload": 14, "total": round(size / 100, 1)},
        "shards": 3,
        "clamped": 0,
        "unlisted": [],
        "created": "2023-11-14T22:13:20Z",
    }
    json.dumps(summary)


def test_a_file_is_described(make_cache: Any, make_table: Any) -> None:
    path = make_cache("teacher.h5", make_table(ids=[f"{n}" for n in range(100)]), labels=False, dtype="float32")
    summary = describe(path)
    assert (summary["kind"], summary["shards"], summary["bytes"]) == ("file", 1, path.stat().st_size)
    assert summary["sample_ids"] == "text of up to 16 bytes"
    assert summary["clamped"] is None
    assert summary["created"] is None
    assert summary["bytes_per_row"]["payload"] == 20
    assert not summary["labels"]


def test_rows_count_over_views(make_views: Any, tmp_path: Path) -> None:
    path, _ = make_views()
    merge(path, tmp_path / "x.h5")
    for source in (path, tmp_path / "x.h5"):
        assert [describe(source)[n] for n in ("samples", "rows", "views")] == [100, 200, [0, 3]]


def test_clamped_values_are_counted_over_shards(tmp_path: Path) -> None:
    with Writer(tmp_path / "x", classes=2, shard_rows=2) as writer:
        writer.write([0, 1, 2], np.array([[0, -1e6], [0, 0], [-1e9, 0]], np.float32))
        writer.write([3], np.array([[0, -np.inf]], np.float32))
    assert describe(tmp_path / "x")["clamped"] == 2


def test_unlisted_files_are_noted(folder: Path) -> None:
    for name in ("shards/v001-00000.h5", "shards/notes.txt", "plan.json"):
        (folder / name).write_text("")
    assert describe(folder)["unlisted"] == ["notes.txt", "v001-00000.h5", "plan.json"]


def test_a_manifest_alone_is_described_too(folder: Path) -> None:
    for path in (folder / "shards").iterdir():
        path.unlink()
    (folder / "shards").rmdir()
    assert describe(folder)["rows"] == 100
    assert describe(folder)["unlisted"] == []


def test_what_is_not_a_cache_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError):
        describe(tmp_path)
    (tmp_path / "x.h5").write_bytes(b"x")
    with pytest.raises(CorruptCacheError):
        describe(tmp_path / "x.h5")


def test_describing_needs_no_torch(folder: Path, python: Any) -> None:
    script = """
import sys
from kdcache.store.inspect import describe
assert describe(sys.argv[1])["rows"] == 100
assert "torch" not in sys.modules
"""
    python(script, folder)


def test_top_k_rows_say_what_they_capture_and_when_to_store_more(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(100, 200)).astype(np.float32)
    sharp = logits * np.where(np.arange(200) < 3, 20, 1).astype(np.float32)
    for name, values in (("flat", logits), ("sharp", sharp)):
        with Writer(tmp_path / name, classes=200, top_k=10, temperatures=(1.0, 2.0)) as writer:
            writer.write(np.arange(100), values)
    flat, peaked = describe(tmp_path / "flat"), describe(tmp_path / "sharp")
    assert [one["temperature"] for one in flat["captured"]] == [1.0, 2.0]
    assert all(0 < one["mass"] < 0.4 and one["kl_share"][0] <= one["kl_share"][1] for one in flat["captured"])
    assert "--dtype int4 (140 bytes a row, here 60)" in flat["advice"]
    assert peaked["captured"][0]["mass"] > 0.8
    assert peaked["advice"] is None
    assert "captured" not in describe(_dense(tmp_path / "dense"))


def _dense(path: Path) -> Path:
    with Writer(path, classes=3) as writer:
        writer.write(np.arange(2), np.zeros((2, 3), np.float32))
    return path
