"""`verify` finds every flipped bit and says what is missing, damaged or swapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, IncompleteCacheError, MismatchError
from kdcache.format.identity import canonical_json, fingerprint
from kdcache.store import cache as caches
from kdcache.store.verify import verify
from kdcache.store.writer import Writer

KINDS = pytest.mark.parametrize("name", ["teacher", "teacher.h5"])


@KINDS
@pytest.mark.parametrize("ids", [None, [f"image {n}" for n in range(100)]], ids=["integers", "text"])
def test_a_sound_cache_is_reported_as_such(make_cache: Any, make_table: Any, name: str, ids: Any) -> None:
    path = make_cache(name, make_table(ids=ids), digests=True)
    seen: list[int] = []
    report = verify(path, raise_on_error=True, progress=seen.append)
    files = [path] if path.is_file() else [*(path / "shards").iterdir()]
    size = sum(p.stat().st_size for p in files)
    assert report.to_json() == {
        "ok": True,
        "root": caches.open(path).root,
        "rows": 100,
        "bytes": size,
        "problems": [],
        "unlisted": [],
        "absent_views": [],
    }
    assert not report.missing
    assert sum(seen) == size


@KINDS
def test_every_flipped_bit_is_found(make_cache: Any, flip: Any, name: str) -> None:
    """Header, rows, checksums, slack between the arrays, manifest, class names."""
    names = [f"a rather long name of class number {n} of 2000" for n in range(2000)] if name == "teacher" else 5
    path = make_cache(name, classes=5) if names == 5 else wide_cache(make_cache("x").with_name(name), names)
    files = sorted(p for p in [path, *path.rglob("*")] if p.is_file() and p.name != ".lock")
    rng = np.random.default_rng(0)
    sizes = np.array([p.stat().st_size for p in files])
    for _ in range(200):
        file = files[int(rng.integers(len(files)))]
        position, mask = int(rng.integers(sizes[files.index(file)])), 1 << int(rng.integers(8))
        flip(file, position, mask)
        report = verify(path)
        flip(file, position, mask)
        assert report.problems, f"bit {mask} of byte {position} of {file.name}"
        assert not report.missing
    assert verify(path).ok


def wide_cache(path: Path, names: list[str]) -> Path:
    with Writer(path, classes=names, shard_rows=2) as writer:
        writer.write([5, 3, 9], np.random.default_rng(0).normal(size=(3, len(names))).astype(np.float32), [0, 1, 2])
    return path


@pytest.mark.long
@KINDS
def test_every_single_bit_of_a_small_cache_is_found(make_cache: Any, flip: Any, name: str) -> None:
    path = make_cache(name, shard_rows=60)
    for file in sorted(p for p in [path, *path.rglob("*")] if p.is_file() and p.name != ".lock"):
        for position in range(file.stat().st_size):
            mask = 1 << position % 8
            flip(file, position, mask)
            assert verify(path).problems, f"byte {position} of {file.name}"
            flip(file, position, mask)


def test_damage_is_corrupt_and_missing_files_are_incomplete(folder: Path, flip: Any) -> None:
    first, second, third = sorted((folder / "shards").iterdir())
    third.unlink()
    report = verify(folder)
    assert report.missing
    assert report.rows == 80
    with pytest.raises(IncompleteCacheError, match=third.name) as caught:
        report.raise_on_error()
    assert caught.value.exit_code == 4
    second.unlink()
    with pytest.raises(
        IncompleteCacheError, match=rf"2 problems: \(1\) .*{second.name} is missing.* \(2\) .*{third.name} is missing"
    ):
        verify(folder, raise_on_error=True)
    flip(first, first.stat().st_size - 1)
    with pytest.raises(CorruptCacheError, match=first.name) as corrupt:
        verify(folder, raise_on_error=True)
    assert corrupt.value.exit_code == 3
    assert len(verify(folder).problems) == 3


@KINDS
def test_a_truncated_file_is_named(make_cache: Any, name: str) -> None:
    path = make_cache(name)
    file = path if path.is_file() else path / "shards" / "v000-00001.h5"
    data = file.read_bytes()
    for content in (data[:-1], data[: len(data) // 2], b"", data + b"x"):
        file.unlink()
        file.write_bytes(content)
        problems = verify(path).problems
        assert len(problems) == 1
        assert file.name in problems[0]


def test_what_is_not_a_cache_is_a_report_too(tmp_path: Path) -> None:
    report = verify(tmp_path / "nothing")
    assert report.missing
    assert report.root is None
    (tmp_path / "x.h5").write_bytes(b"text")
    assert not verify(tmp_path / "x.h5").missing
    with pytest.raises(IncompleteCacheError):
        verify(tmp_path, raise_on_error=True)


@KINDS
def test_another_root_is_a_mismatch(make_cache: Any, name: str) -> None:
    path = make_cache(name)
    assert verify(path, expect_root=caches.open(path).root).ok
    with pytest.raises(MismatchError, match="expected 000"):
        verify(path, expect_root="0" * 64)


def test_a_shard_of_another_dump_with_the_same_header_is_found(folder: Path, make_cache: Any, make_table: Any) -> None:
    other = make_table()
    other.logits[:] += 1
    shard = make_cache("other", other) / "shards" / "v000-00000.h5"
    shard.rename(folder / "shards" / "v000-00000.h5")
    assert not verify(folder).ok
    with pytest.raises(CorruptCacheError, match="header is not the one"):  # and no row of it is ever used
        caches.open(folder).gather([0])


def reseal(folder: Path, **changes: Any) -> None:
    """Edits the manifest and puts its hashes right, as an attacker would."""
    path = folder / "manifest.json"
    value = {**json.loads(path.read_bytes()), **changes}
    body = {k: v for k, v in value.items() if k not in ("created", "root", "seal")}
    root = fingerprint(body)
    path.unlink()
    text = canonical_json({**value, "root": root, "seal": fingerprint([value["created"], root])})
    path.write_bytes(text.encode() + b"\n")


def test_a_resealed_manifest_that_lies_about_its_shards_is_found(folder: Path) -> None:
    value = json.loads((folder / "manifest.json").read_bytes())
    shards = value["shards"]
    for change in (
        {"provenance": {**value["provenance"], "teacher": {"spec": "another"}}},
        {"classes": {"count": 5, "names": list("abcde"), "sha256": fingerprint(list("abcde"))}},
        {"shards": [{**shards[0], "sha256": "0" * 64}, *shards[1:]]},
        {"shards": [{**s, "ids": [s["start"] + 1, s["stop"]]} for s in shards]},
        {"shards": [{**s, "arrays": {**s["arrays"], "label": s["arrays"]["sample_id"]}} for s in shards]},
    ):
        before = (folder / "manifest.json").read_bytes()
        reseal(folder, **change)
        assert not verify(folder).ok, change
        (folder / "manifest.json").write_bytes(before)
    assert verify(folder).ok


def test_an_id_that_stands_twice_is_found(make_views: Any, make_table: Any) -> None:
    ids = [f"image {n % 99}" for n in range(100)]
    path, _ = make_views(ids=ids)
    assert "'image 0' stands twice" in verify(path).problems[0]
    with pytest.raises(CorruptCacheError, match="stands twice"):
        caches.open(path).rows(["image 1"])
