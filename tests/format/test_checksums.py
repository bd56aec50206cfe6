"""Row checksums and header digests against plain twins that pack every byte by hand."""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.format import checksums
from kdcache.format.arrays import ArrayLayout
from kdcache.format.checksums import header_digest, outside_spans, row_crcs

LAYOUT = {
    "b": ArrayLayout("b", "<i8", (4,), 100),
    "a": ArrayLayout("a", "<f2", (4, 5), 50),
}


def crc_twin(arrays: list[np.ndarray], view: int, position: int, row: int) -> int:
    seed = struct.pack("<HQ", view, position)
    return zlib.crc32(seed + b"".join(a[row : row + 1].tobytes() for a in arrays))


@pytest.fixture
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    ids = np.array([b"a", b"bb", b"", b"dddd"])
    return [ids, rng.integers(0, 9, 4), rng.normal(size=(4, 3, 2)).astype(np.float16), np.zeros((4, 1), np.float32)]


@pytest.mark.parametrize("buffer_bytes", [1, 100, 1 << 20])
def test_a_row_checksum_is_the_crc32_of_seed_and_bytes(
    arrays: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    monkeypatch.setattr(checksums, "_BUFFER_BYTES", buffer_bytes)
    positions = np.array([7, 0, 2**40, 3])
    expected = [crc_twin(arrays, 65_535, int(p), i) for i, p in enumerate(positions)]
    crcs = row_crcs(arrays, view=65_535, positions=positions)
    assert crcs.dtype == np.uint32
    assert crcs.tolist() == expected


def test_view_position_and_every_byte_count(arrays: list[np.ndarray]) -> None:
    positions = np.arange(4)
    before = row_crcs(arrays, view=0, positions=positions)
    assert (row_crcs(arrays, view=1, positions=positions) != before).all()
    assert (row_crcs(arrays, view=0, positions=positions + 1) != before).all()
    for number, array in enumerate(arrays):
        raw = np.frombuffer(array.tobytes(), np.uint8).copy()
        raw[-1] ^= 1
        changed = [*arrays]
        changed[number] = raw.view(array.dtype).reshape(array.shape)
        assert (row_crcs(changed, view=0, positions=positions) != before).tolist() == [False, False, False, True]


def test_no_rows_have_no_checksums() -> None:
    assert row_crcs([np.empty((0, 3), "<f2")], view=0, positions=np.empty(0, np.int64)).shape == (0,)


def test_everything_but_the_payload_lies_outside() -> None:
    assert outside_spans(LAYOUT, 200) == [(0, 50), (90, 100), (132, 200)]
    assert outside_spans(LAYOUT, 132) == [(0, 50), (90, 100)]
    assert outside_spans({}, 3) == [(0, 3)]


def test_a_header_digest_is_the_documented_one(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(200))
    expected = hashlib.blake2b(digest_size=32)
    for start, stop in [(0, 50), (90, 100), (132, 200)]:
        expected.update(struct.pack("<QQ", start, stop) + content[start:stop])
    for buffer_bytes in (1, 7, 1 << 20):
        monkeypatch.setattr(checksums, "_BUFFER_BYTES", buffer_bytes)
        assert header_digest(lambda o, n: content[o : o + n], LAYOUT, 200) == expected.hexdigest()


@given(st.integers(0, 199))
def test_a_header_digest_sees_every_byte_outside_and_none_inside(position: int) -> None:
    content = bytearray(200)
    before = header_digest(lambda o, n: bytes(content[o : o + n]), LAYOUT, 200)
    content[position] ^= 0x10
    after = header_digest(lambda o, n: bytes(content[o : o + n]), LAYOUT, 200)
    inside = 50 <= position < 90 or 100 <= position < 132
    assert (before == after) == inside
