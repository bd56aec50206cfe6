"""A cache that is damaged, incomplete or no cache: found when a file is opened or a row first touched."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError, IncompleteCacheError, MismatchError
from kdcache.store import cache as caches
from kdcache.store.writer import Writer

ACCESS = pytest.mark.parametrize("access", ["mmap", "pread"])


KINDS = pytest.mark.parametrize("name", ["teacher", "teacher.h5"])


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
@KINDS
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_of_a_row_is_found_when_the_row_is_first_touched(
    make_cache: Any, tmp_path: Path, flip: Any, name: str, access: str, data: st.DataObject
) -> None:
    path = tmp_path / name if (tmp_path / name).exists() else make_cache(name, digests=True)
    part = data.draw(st.sampled_from(caches.open(path).catalog.parts))
    of_rows = [a for a in part.arrays.values() if a.name not in ("sample_id", "row_crc")]  # those: see below
    array = data.draw(st.sampled_from(sorted(of_rows, key=lambda a: a.name)))
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


@pytest.mark.parametrize("array", ["sample_id", "row_crc"])
@pytest.mark.parametrize("ids", ["numbers", "text"])
def test_a_flipped_bit_of_an_id_or_a_checksum_is_found_before_any_row_is_used(
    tmp_path: Path, flip: Any, array: str, ids: str
) -> None:
    names = np.arange(100) if ids == "numbers" else np.array([f"sample {n}" for n in range(100)])
    for name in ("teacher", "teacher.h5"):
        with Writer(tmp_path / name, classes=3, shard_rows=40) as writer:
            writer.write(names, np.zeros((100, 3), np.float32))
        part = caches.open(tmp_path / name).catalog.parts[0]
        flip(part.path, part.arrays[array].offset + 3, 1)
        with pytest.raises(CorruptCacheError):
            caches.open(tmp_path / name).gather([0])


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
    for array in (a for a in part.arrays.values() if a.name not in ("sample_id", "row_crc")):
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
