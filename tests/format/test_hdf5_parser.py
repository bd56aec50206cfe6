"""The strict parser: finds what our writer wrote, and refuses everything else with a reason, never a crash.

Patched files start from one of ours and have their checksums put right, as an attacker would.
tests/hostile has the files that libhdf5 can make, and takes all of them through every door.
"""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from itertools import pairwise

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError
from kdcache.format.arrays import ArraySpec
from kdcache.format.hdf5_header import build_layout
from kdcache.format.hdf5_parser import ParsedFile, parse
from kdcache.format.lookup3 import lookup3

ROWS = 600
ATTRIBUTE = '{"format": 1, "note": "été"}'
ROOT = 48  # address of the root group's header


def make_image(*extra: ArraySpec) -> bytearray:
    """A file of four arrays and `extra`, whose rows are zero."""
    specs = [
        ArraySpec("logits", "<f2", (10,)),
        ArraySpec("label", "<i8"),
        ArraySpec("sample_id", "|S7"),
        ArraySpec("view", "<u2"),
    ]
    layout = build_layout([*specs, *extra], ROWS, ATTRIBUTE)
    image = bytearray(layout.size)
    for offset, piece in layout.metadata:
        image[offset : offset + len(piece)] = piece
    return image


GOOD = bytes(make_image())


def parse_bytes(data: bytes) -> ParsedFile:
    return parse(lambda offset, length: bytes(data[offset : offset + length]), len(data), name="cache.h5")


EXPECTED = parse_bytes(GOOD)


def assert_refused(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptCacheError, match=reason) as caught:
        parse_bytes(data)
    assert str(caught.value).startswith("cache.h5: ")


def header_spans(data: bytes) -> list[tuple[int, int]]:
    """(start, stop) of each checksummed block; its checksum is the four bytes from stop."""
    spans = [(0, 44)]
    start = data.find(b"OHDR")
    while start >= 0:
        spans.append((start, start + 8 + int.from_bytes(data[start + 6 : start + 8], "little")))
        start = data.find(b"OHDR", start + 4)
    return spans


SPANS = header_spans(GOOD)


def seal(data: bytearray) -> bytes:
    """Put right all checksums of a changed copy of GOOD."""
    for start, stop in SPANS:
        struct.pack_into("<I", data, stop, lookup3(bytes(data[start:stop])))
    return bytes(data)


def patched(old: bytes, new: bytes, *, within: int = 0) -> bytes:
    """GOOD with the first `old` behind `within` replaced by `new` of the same length, checksums right."""
    assert len(old) == len(new)
    data = bytearray(GOOD)
    position = data.index(old, within)
    data[position : position + len(new)] = new
    return seal(data)


def header_of(name: str) -> int:
    """Address of the header of an array of GOOD."""
    link = bytes([1, 0, len(name)]) + name.encode()
    position = GOOD.index(link) + len(link)
    (address,) = struct.unpack_from("<Q", GOOD, position)
    assert GOOD[address : address + 4] == b"OHDR"
    return int(address)


def test_what_our_writer_wrote_is_found() -> None:
    assert EXPECTED.attribute == ATTRIBUTE
    assert EXPECTED.rows == ROWS
    assert [(array.name, array.dtype, array.shape) for array in EXPECTED.arrays.values()] == [
        ("logits", "<f2", (ROWS, 10)),
        ("label", "<i8", (ROWS,)),
        ("sample_id", "|S7", (ROWS,)),
        ("view", "<u2", (ROWS,)),
    ]
    with h5py.File(io.BytesIO(GOOD), "r") as file:
        for name, array in EXPECTED.arrays.items():
            assert file[name].id.get_chunk_info(0).byte_offset == array.offset


def test_only_bytes_inside_the_file_are_asked_for_and_few_of_them() -> None:
    asked = []

    def read(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return GOOD[offset : offset + length]

    parse(read, len(GOOD), name="cache.h5")
    assert all(offset >= 0 and offset + length <= len(GOOD) for offset, length in asked)
    assert sum(length for _, length in asked) < 4096
    assert len(asked) == 1 + 2 * 5


def test_a_failing_read_is_passed_on_and_a_short_one_is_refused() -> None:
    def broken(offset: int, length: int) -> bytes:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        parse(broken, len(GOOD), name="cache.h5")
    with pytest.raises(CorruptCacheError, match="while it was read"):
        parse(lambda offset, length: GOOD[offset : offset + length - 1], len(GOOD), name="cache.h5")


# --------------------------------------------------------------------------- patched bytes, checksums right


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (8, b"\x02", "superblock version"),
        (9, b"\x04", "not of 8 bytes"),
        (11, b"\x01", "left open by a writer"),
        (12, struct.pack("<Q", 8), "base address is 8"),
        (20, struct.pack("<Q", 96), "superblock extension"),
        (28, struct.pack("<Q", len(GOOD) + 1), "truncated or grown"),
        (28, struct.pack("<Q", 2**64 - 1), "truncated or grown"),
        (36, struct.pack("<Q", 2**64 - 1), "outside the file"),
        (36, struct.pack("<Q", 0), "no version 2 header of the root group at byte 0"),
        (36, struct.pack("<Q", len(GOOD) - 4), "outside the file"),
        (ROOT + 4, b"\x01", "no version 2 header"),
        (ROOT + 5, b"\x21", "header flags"),
        (ROOT + 6, b"\xff\xff", "outside the file"),
        (ROOT + 8, b"\x10", "unexpected message 0x10"),
        (ROOT + 11, b"\x02", r"message 0x2 \(link info\) of the root group is shared"),
        (ROOT + 11, b"\x08", "flags 0x8 on message 0x2"),
    ],
)
def test_a_patched_superblock_or_root_is_refused(position: int, value: bytes, reason: str) -> None:
    data = bytearray(GOOD)
    data[position : position + len(value)] = value
    assert_refused(seal(data), reason)


U64 = struct.Struct("<Q").pack


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("label", U64(ROWS) * 2, U64(2**64 - 1) * 2, "outside the file"),
        ("label", U64(ROWS) * 2, U64(0) * 2, "is empty or scalar"),
        ("label", U64(ROWS) * 2, U64(ROWS) + U64(2**64 - 1), "can be extended"),
        ("label", U64(ROWS) * 2, U64(ROWS - 1) * 2, "different numbers of rows"),
        ("logits", U64(ROWS) + U64(10), U64(ROWS) + U64(0), "can be extended"),
        ("logits", b"\x02\x02\x01\x01", b"\x02\x02\x00\x01", "neither a scalar nor"),
        ("logits", b"\x02\x02\x01\x01", b"\x02\xff\x01\x01", "255 dimensions"),
        ("logits", b"\x02\x02\x01\x01", b"\x02\x01\x01\x01", "can be extended"),
        ("logits", b"\x02\x02\x01\x01", b"\x01\x02\x01\x01", "dataspace version"),
        ("view", bytes.fromhex("10000000 02000000"), bytes.fromhex("10000000 04000000"), "element type"),
        ("view", bytes.fromhex("10000000 02000000"), bytes.fromhex("10010000 02000000"), "element type"),
        ("sample_id", bytes.fromhex("13010000 07"), bytes.fromhex("13010000 08"), "elements of 7 bytes, not 8"),
        ("sample_id", bytes.fromhex("13010000 07"), bytes.fromhex("13010000 00"), "strings of 0 bytes"),
        ("sample_id", bytes.fromhex("13010000 070000 00"), bytes.fromhex("13010000 070000 80"), "strings of"),
        ("sample_id", bytes.fromhex("13010000 07"), bytes.fromhex("13000000 07"), "element type"),
        ("label", b"\x03\x05", b"\x03\x0a", "fill value"),
        ("label", b"\x04\x02\x00\x02\x02\x00\x01\x08\x00", b"\x03\x02\x00\x02\x02\x00\x01\x08\x00", "layout version"),
        (
            "label",
            b"\x04\x02\x00\x02\x02\x00\x01\x08\x00",
            b"\x04\x02\x01\x02\x02\x00\x01\x08\x00",
            "filtered or partial",
        ),
        ("label", b"\x04\x02\x00\x02\x02\x00\x01\x08\x00", b"\x04\x02\x00\x02\x02\x00\x00\x08\x00", "empty dimension"),
        ("label", b"\x04\x02\x00\x02\x02\x00\x01\x08\x00", b"\x04\x02\x00\x02\x02\xff\xff\x08\x00", "chunk"),
        ("label", b"\x04\x02\x00\x02\x02\x00\x01\x08\x00", b"\x04\x02\x00\x02\x02\x00\x01\x04\x00", "elements of 4"),
        ("label", b"\x04\x02\x00\x02\x02\x00\x01\x08\x00", b"\x04\x02\x00\x00\x02\x00\x01\x08\x00", "malformed"),
        ("label", b"\x04\x02\x00\x02\x02\x00\x01\x08\x00", b"\x04\x02\x00\x02\x00\x00\x01\x08\x00", "malformed"),
        ("label", b"\x04\x02\x00\x02\x02\x00\x01\x08\x00", b"\x04\x02\x00\x02\x09\x00\x01\x08\x00", "malformed"),
        ("label", b"\x01\x08\x00\x02", b"\x01\x08\x00\x01", "does not fit the number of chunks"),
        ("label", b"\x01\x08\x00\x02", b"\x01\x08\x00\x03", "index type 3"),
        ("label", b"\x01\x08\x00\x02", b"\x01\x08\x00\x05", "index type 5"),
    ],
)
def test_a_patched_array_is_refused(name: str, old: bytes, new: bytes, reason: str) -> None:
    assert_refused(patched(old, new, within=header_of(name)), reason)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (lambda: EXPECTED.arrays["logits"].offset, "overlap"),
        (lambda: EXPECTED.arrays["label"].offset + 8, "overlap"),
        (lambda: 48, "overlap"),
        (lambda: 0, "overlap"),
        (lambda: header_of("sample_id"), "overlap"),
        (lambda: EXPECTED.arrays["label"].offset + 1, "misaligned"),
        (lambda: len(GOOD) // 8 * 8, "outside the file"),
        (lambda: 2**64 - 8, "outside the file"),
        (lambda: 2**64 - 1, "outside the file"),
    ],
)
def test_an_array_that_points_elsewhere_is_refused(target: Callable[[], int], reason: str) -> None:
    array = EXPECTED.arrays["label"]
    moved = patched(U64(array.offset), U64(target()), within=header_of("label"))
    assert_refused(moved, reason)


def test_two_links_to_one_array_are_refused() -> None:
    assert_refused(patched(U64(header_of("view")), U64(header_of("label")), within=ROOT), "overlap")


def test_two_arrays_of_one_name_are_refused() -> None:
    image = make_image(ArraySpec("views", "<u2"), ArraySpec("viewt", "<u2"))
    position = image.index(b"\x05views")
    image[position : position + 6] = b"\x05viewt"
    start, stop = header_spans(bytes(image))[1]
    struct.pack_into("<I", image, stop, lookup3(bytes(image[start:stop])))
    assert_refused(bytes(image), "two arrays are called 'viewt'")


def test_large_arrays_must_be_aligned_to_64_kib() -> None:
    layout = build_layout([ArraySpec("logits", "<f4", (1000,))], 512, ATTRIBUTE)
    image = bytearray(layout.size)
    for offset, piece in layout.metadata:
        image[offset : offset + len(piece)] = piece
    assert layout.arrays["logits"].offset == 65_536
    position = image.index(U64(65_536), 60)
    image[position : position + 8] = U64(32_768)
    start, stop = header_spans(bytes(image))[2]
    struct.pack_into("<I", image, stop, lookup3(bytes(image[start:stop])))
    assert_refused(bytes(image), "misaligned")


# --------------------------------------------------------------------------- damage


def test_a_file_that_is_cut_anywhere_is_refused() -> None:
    for length in {*range(0, 200), *range(200, len(GOOD), 97), len(GOOD) - 1}:
        assert_refused(GOOD[:length], r"bytes long|truncated")


@pytest.mark.parametrize("tail", [b"\0", b"PK\x03\x04" + bytes(5000)])
def test_a_file_that_has_grown_is_refused(tail: bytes) -> None:
    assert_refused(GOOD + tail, "truncated or grown")


def test_a_flipped_bit_in_any_metadata_byte_is_refused() -> None:
    for start, stop in SPANS:
        for position in range(start, stop + 4):
            data = bytearray(GOOD)
            data[position] ^= 1 << position % 8
            with pytest.raises(CorruptCacheError):
                parse_bytes(bytes(data))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptCacheError):
        parse_bytes(data)
    with pytest.raises(CorruptCacheError):
        parse_bytes(GOOD[:12] + data)


INTERESTING_BYTES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF)
INTERESTING_WORDS = (0, 1, 8, ROOT, len(GOOD), 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def mutate(source: random.Random) -> bytes:
    """GOOD with one to four changes in one header, checksum right."""
    data = bytearray(GOOD)
    start, stop = source.choice(SPANS)
    for _ in range(source.choice((1, 1, 2, 4))):
        position = source.randrange(start, stop)
        choice = source.random()
        if choice < 0.4:
            data[position] ^= 1 << source.randrange(8)
        elif choice < 0.7:
            data[position] = source.choice(INTERESTING_BYTES)
        elif choice < 0.9 and position + 8 <= stop:
            data[position : position + 8] = U64(source.choice((*INTERESTING_WORDS, source.randrange(len(GOOD)))))
        else:
            data[position] = source.randrange(256)
    return seal(data)


def without_text(parsed: ParsedFile) -> list[tuple[int, int, tuple[int, ...]]]:
    """What decides which bytes become rows. Names, the attribute and the sign of integers are data, not structure."""
    return [(array.offset, array.nbytes, array.shape) for array in parsed.arrays.values()]


@pytest.mark.parametrize("seed", range(4))
def test_mutations_with_right_checksums_are_refused_or_change_no_row(seed: int) -> None:
    source = random.Random(seed)
    refused = 0
    for _ in range(500):
        data = mutate(source)
        try:
            parsed = parse_bytes(data)
        except CorruptCacheError:
            refused += 1
        else:
            assert without_text(parsed) == without_text(EXPECTED)
            spans = sorted((array.offset, array.stop) for array in parsed.arrays.values())
            assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert refused > 100
