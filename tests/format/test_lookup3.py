"""lookup3 against the vectors of its author and against the checksums of libhdf5."""

from __future__ import annotations

import io
import struct

import h5py
import pytest

from kdcache.format.lookup3 import lookup3


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [
        (b"", 0, 0xDEADBEEF),
        (b"", 0xDEADBEEF, 0xBD5B7DDE),
        (b"Four score and seven years ago", 0, 0x17770551),
        (b"Four score and seven years ago", 1, 0xCD628161),
    ],
)
def test_the_vectors_of_lookup3_c_come_out(data: bytes, seed: int, expected: int) -> None:
    assert lookup3(data, seed) == expected


@pytest.mark.parametrize("length", range(1, 40))
def test_headers_that_libhdf5_wrote_have_this_checksum(length: int) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        file.attrs["x"] = b"\xff" * length  # every length modulo 12
    data = buffer.getvalue()
    assert lookup3(data[:44]) == int.from_bytes(data[44:48], "little")
    (start,) = struct.unpack("<Q", data[36:44])
    flags = data[start + 5]
    prefix = 6 + (16 if flags & 32 else 0)
    width = 1 << (flags & 3)
    stop = start + prefix + width + int.from_bytes(data[start + prefix : start + prefix + width], "little")
    assert lookup3(data[start:stop]) == int.from_bytes(data[stop : stop + 4], "little")


@pytest.mark.parametrize("length", [1, 11, 12, 13, 24, 25, 4096])
def test_any_flipped_bit_changes_the_hash(length: int) -> None:
    data = bytes(range(256)) * 16
    expected = lookup3(data[:length])
    for position in {0, length // 2, length - 1}:
        changed = bytearray(data[:length])
        changed[position] ^= 0x10
        assert lookup3(bytes(changed)) != expected
