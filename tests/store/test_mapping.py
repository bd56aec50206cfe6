"""Both ways of reading rows of a file in place: maps and pread give the same bytes at any offset and width."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import StorageError
from kdcache.store.mapping import GRID_ROWS, PreadRegion, Region, grid_rows

SHAPES = pytest.mark.parametrize(
    ("dtype", "row_shape"), [("<u2", ()), ("<f2", (3,)), ("|S13", ()), ("<f4", (2, 5)), ("<i8", ())]
)


@pytest.fixture
def descriptor(tmp_path: Path) -> Any:
    """A file of 2 MB of random bytes; (descriptor, content)."""
    data = np.random.default_rng(0).integers(0, 256, 2 << 20, np.uint8).tobytes()
    (tmp_path / "data").write_bytes(data)
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    yield fd, data
    os.close(fd)


def expected_rows(data: bytes, offset: int, count: int, dtype: str, row_shape: tuple[int, ...]) -> np.ndarray:
    width = int(np.dtype(dtype).itemsize * np.prod(row_shape, dtype=int))
    raw = np.frombuffer(data[offset : offset + count * width], np.uint8)
    return raw.view(dtype).reshape(count, *row_shape)


@SHAPES
@pytest.mark.parametrize("offset", [0, mmap.PAGESIZE, 8, mmap.PAGESIZE + 24, 12_345])
def test_two_shards_stand_side_by_side(descriptor: Any, dtype: str, row_shape: tuple[int, ...], offset: int) -> None:
    fd, data = descriptor
    first = expected_rows(data, offset, 5000, dtype, row_shape)
    second = expected_rows(data, offset + 999, 70, dtype, row_shape)
    at = np.random.default_rng(1).integers(0, 5000, 300)
    later = np.random.default_rng(2).integers(0, 70, 300)
    for region in (Region(3 * GRID_ROWS, dtype, row_shape), PreadRegion(dtype, row_shape)):
        region.place(fd, offset + 999, 2 * GRID_ROWS, 70)  # the later one first
        region.place(fd, offset, 0, 5000)
        out = np.empty((300, *row_shape), dtype)
        region.take(at, out)
        assert out.tobytes() == first[at].tobytes()
        region.take(later + 2 * GRID_ROWS, out)
        assert out.tobytes() == second[later].tobytes()
        region.take(np.empty(0, np.int64), out[:0])


def test_consecutive_rows_of_a_part_take_one_call(descriptor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fd, data = descriptor
    region, preadv, calls = PreadRegion("<i8", ()), os.preadv, []
    region.place(fd, 0, 0, GRID_ROWS)
    region.place(fd, 4000, GRID_ROWS, 70)  # right behind, without a gap
    expected = np.concatenate([expected_rows(data, 0, GRID_ROWS, "<i8", ()), expected_rows(data, 4000, 70, "<i8", ())])
    monkeypatch.setattr(os, "preadv", lambda *given: calls.append(given) or preadv(*given))
    for rows, reads in (
        (np.arange(GRID_ROWS + 70), 2),
        (np.arange(GRID_ROWS - 3, GRID_ROWS + 3), 2),
        (np.arange(5, 9), 1),
        (np.array([7, 8, 9, 8, 8, 3, 4, GRID_ROWS, GRID_ROWS + 1]), 5),
    ):
        out = np.empty(len(rows), "<i8")
        region.take(rows, out)
        assert out.tobytes() == expected[rows].tobytes()
        assert len(calls) == reads
        calls.clear()


def test_a_map_outlives_its_descriptor(descriptor: Any, tmp_path: Path) -> None:
    _, data = descriptor
    region = Region(GRID_ROWS, "<i8", ())
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    region.place(fd, 0, 0, 100)
    os.close(fd)
    out = np.empty(100, "<i8")
    region.take(np.arange(100), out)
    assert out.tobytes() == data[:800]


def test_a_map_is_read_only(descriptor: Any) -> None:
    fd, _ = descriptor
    region = Region(GRID_ROWS, "<i8", ())
    region.place(fd, 0, 0, 100)
    with pytest.raises(ValueError, match="read-only"):
        region.array[0] = 1


def test_a_file_that_ends_early_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(100))
    fd = os.open(tmp_path / "short", os.O_RDONLY)
    with pytest.raises(StorageError, match="ended at byte"):
        Region(GRID_ROWS, "<i8", ()).place(fd, 8, 0, 100)
    region = PreadRegion("<i8", ())
    region.place(fd, 0, 0, 100)
    with pytest.raises(StorageError, match="ended at byte"):
        region.take(np.array([99]), np.empty(1, "<i8"))
    os.close(fd)


def test_addresses_beyond_any_machine_are_a_storage_error() -> None:
    with pytest.raises(StorageError, match="could not map"):
        Region(1 << 50, "<f4", (1000,))


def test_advice_changes_no_byte(descriptor: Any) -> None:
    fd, data = descriptor
    region = Region(GRID_ROWS, "<f2", (100,))
    region.place(fd, 0, 0, GRID_ROWS)
    at = np.array([0, 1, 4095, 17])
    region.expect_random(True, 0, GRID_ROWS)
    region.will_need(at)
    out = np.empty((4, 100), "<f2")
    region.take(at, out)
    assert out.tobytes() == expected_rows(data, 0, GRID_ROWS, "<f2", (100,))[at].tobytes()
    assert region.resident(at)
    region.expect_random(False, 0, GRID_ROWS)


def test_addresses_are_given_back(descriptor: Any) -> None:
    fd, _ = descriptor

    def maps() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    regions = [Region(GRID_ROWS, "<i8", ()) for _ in range(50)]
    for region in regions:
        region.place(fd, 0, 0, GRID_ROWS)
    high = maps()
    del regions, region
    assert maps() < high - 30
    descriptors = len(os.listdir("/proc/self/fd"))
    preads = [PreadRegion("<i8", ()) for _ in range(10)]
    for pread in preads:
        pread.place(fd, 0, 0, 10)
    del preads, pread
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_grid_is_a_multiple_of_the_page() -> None:
    assert GRID_ROWS % mmap.PAGESIZE == 0
    assert [grid_rows(n) for n in (1, GRID_ROWS, GRID_ROWS + 1)] == [GRID_ROWS, GRID_ROWS, 2 * GRID_ROWS]
