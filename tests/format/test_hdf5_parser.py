"""The strict parser: finds what our writer wrote, and refuses everything else with a reason, never a crash.

Hostile files start from one of ours and change one thing each, so that it is this thing that is refused. Those
that libhdf5 can make are made by it; the rest are patched bytes with the checksums put right, as an attacker would.
"""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from itertools import pairwise

import h5py
import numpy as np
import pytest
from h5py import h5a, h5d, h5p, h5s, h5t
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
SPARE = "spare_with_a_long_name_so_that_its_link_leaves_room"


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
    assert all(0 <= offset and offset + length <= len(GOOD) for offset, length in asked)
    assert sum(length for _, length in asked) < 4096
    assert len(asked) == 1 + 2 * 5


def test_a_failing_read_is_passed_on_and_a_short_one_is_refused() -> None:
    def broken(offset: int, length: int) -> bytes:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        parse(broken, len(GOOD), name="cache.h5")
    with pytest.raises(CorruptCacheError, match="while it was read"):
        parse(lambda offset, length: GOOD[offset : offset + length - 1], len(GOOD), name="cache.h5")


# --------------------------------------------------------------------------- files that libhdf5 can make


def create(file: h5py.File, name: str = "logits", **change: object) -> None:
    """Create an array as our writer does, but for `change`."""
    properties = h5p.create(h5p.DATASET_CREATE)
    shape = change.get("shape", (ROWS, 10))
    if "layout" in change:
        properties.set_layout(change["layout"])
    else:
        properties.set_chunk(change.get("chunk", (256, 10)))
    properties.set_alloc_time(change.get("alloc", h5d.ALLOC_TIME_EARLY))
    properties.set_fill_time(change.get("fill", h5d.FILL_TIME_NEVER))
    properties.set_obj_track_times(bool(change.get("times", False)))
    if change.get("deflate"):
        properties.set_deflate(1)
    if "fill_value" in change:
        properties.set_fill_value(np.array(change["fill_value"], "<f2"))
    kind = change.get("kind") or h5t.py_create(np.dtype(str(change.get("dtype", "<f2"))))
    space = h5s.create_simple(shape, change.get("max_shape"))
    h5d.create(file.id, name.encode(), kind, space, properties)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((ROWS, 10), "<f2")
    layout[:] = h5py.VirtualSource("/etc/secret.h5", "x", shape=(ROWS, 10), dtype="<f2")
    file.create_virtual_dataset("logits", layout)


def external_storage(file: h5py.File) -> None:
    file.create_dataset("logits", (ROWS, 10), "<f2", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def attribute(file: h5py.File, name: str, value: str | np.ndarray | bytes) -> None:
    del file.attrs["kdcache"]
    file.attrs.create(name, value)


def with_link(link: object) -> Callable[[h5py.File], None]:
    return lambda file: file.__setitem__("logits", link)


def with_array(**change: object) -> Callable[[h5py.File], None]:
    return lambda file: create(file, **change)


ARRAYS_OF_LIBHDF5: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "external link": (with_link(h5py.ExternalLink("/etc/secret.h5", "/x")), "soft, external or user-defined link"),
    "soft link": (with_link(h5py.SoftLink("/label")), "soft, external or user-defined link"),
    "hard link to another array": (lambda file: with_link(file["label"])(file), "unexpected message 0x16|overlap"),
    "cycle of hard links": (lambda file: with_link(file["/"])(file), "header flags|unexpected message"),
    "group": (lambda file: file.create_group("logits"), "header flags|unexpected message"),
    "committed type": (with_link(np.dtype("<f2")), "header flags|unexpected message"),
    "virtual array": (virtual, "header flags|not chunked|unexpected message"),
    "external storage": (external_storage, "header flags|unexpected message 0x7|not chunked"),
    "contiguous array": (with_array(layout=h5d.CONTIGUOUS), "not chunked"),
    "compact array": (with_array(layout=h5d.COMPACT, shape=(10,), dtype="<f2"), "not chunked"),
    "gzip": (with_array(deflate=True), "unexpected message 0xb"),
    "timestamps": (with_array(times=True), "header flags"),
    "late allocation": (with_array(alloc=h5d.ALLOC_TIME_LATE), "fill value"),
    "incremental allocation": (with_array(alloc=h5d.ALLOC_TIME_INCR), "fill value"),
    "filling": (with_array(fill=h5d.FILL_TIME_ALLOC), "fill value"),
    "fill value": (with_array(fill_value=7), "fill value"),
    "resizable": (with_array(max_shape=(2 * ROWS, 10)), "can be extended"),
    "unlimited": (with_array(max_shape=(h5s.UNLIMITED, 10)), "can be extended"),
    "chunks that cut rows": (with_array(chunk=(256, 5)), r"chunk \(256, 5\) of"),
    "scalar": (with_array(shape=(), layout=h5d.CONTIGUOUS), "not chunked"),
    "big-endian": (with_array(dtype=">f2"), "element type"),
    "float64": (with_array(dtype="<f8"), "element type"),
    "complex": (with_array(dtype="<c8"), "element type"),
    "compound": (with_array(kind=h5t.py_create(np.dtype([("a", "<f2")]))), "element type"),
    "vlen": (with_array(kind=h5t.vlen_create(h5t.IEEE_F16LE)), "element type"),
    "vlen string": (with_array(kind=h5t.py_create(h5py.string_dtype(), logical=True)), "element type"),
    "enum": (with_array(kind=h5t.py_create(h5py.enum_dtype({"A": 1}, "u1"), logical=True)), "element type"),
    "opaque": (with_array(dtype="|V8"), "element type"),
    "reference": (with_array(kind=h5t.STD_REF_OBJ), "element type"),
    "array type": (with_array(kind=h5t.py_create(np.dtype(("<f2", (3,))))), "element type"),
    "other rows": (with_array(shape=(ROWS + 1, 10)), "different numbers of rows"),
    "nine dimensions": (with_array(shape=(ROWS,) + (1,) * 8, chunk=(256,) + (1,) * 8), "9 dimensions"),
    "capital letters": (lambda file: create(file, "Logits"), "array name"),
    "control characters": (lambda file: create(file, "lo\ngits"), "array name"),
    "a name of 65 letters": (lambda file: create(file, "a" * 65), "array name"),
    "attribute of an array": (lambda file: file["label"].attrs.__setitem__("x", 1), "unexpected message 0x15"),
}


@pytest.mark.parametrize("case", ARRAYS_OF_LIBHDF5)
def test_arrays_that_our_writer_does_not_make_are_refused(case: str) -> None:
    change, reason = ARRAYS_OF_LIBHDF5[case]
    buffer = io.BytesIO(make_image(ArraySpec(SPARE, "<u2"), ArraySpec(f"{SPARE}2", "<u2")))
    with h5py.File(buffer, "r+", libver=("v110", "v110")) as file:
        del file["logits"], file[SPARE], file[f"{SPARE}2"]  # their links leave room in the root group
        change(file)
    assert_refused(buffer.getvalue(), reason)


ATTRIBUTES_OF_LIBHDF5: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "none": (lambda file: file.attrs.__delitem__("kdcache"), "0 root attributes"),
    "two": (lambda file: file.attrs.__setitem__("x", np.int8(1)), "attribute b'x"),
    "another name": (lambda file: attribute(file, "kdcachf", np.bytes_("x")), "attribute b'kdcachf"),
    "vlen text": (lambda file: attribute(file, "kdcache", "text"), "fixed-length UTF-8"),
    "ASCII": (lambda file: attribute(file, "kdcache", np.bytes_("text")), "fixed-length UTF-8"),
    "number": (lambda file: attribute(file, "kdcache", np.array(1, "<i8")), "fixed-length UTF-8"),
    "array": (lambda file: attribute(file, "kdcache", np.array([b"a", b"b"])), "fixed-length UTF-8"),
    "array of texts": (lambda file: write_text(file, b"abcd", shape=(2,)), "can be extended|not a scalar"),
    "empty": (lambda file: write_text(file, b"\0"), "contains NUL"),
    "not UTF-8": (lambda file: write_text(file, b"\xff\xfe"), "not UTF-8"),
    "too long": (lambda file: write_text(file, b"x" * 60_000), "unexpected message 0x10|attribute of 60000"),
    "dense": (lambda file: [file.attrs.__setitem__(f"a{i}", i) for i in range(20)] and None, "dense|unexpected"),
}


def write_text(file: h5py.File, text: bytes, shape: tuple[int, ...] = ()) -> None:
    del file.attrs["kdcache"]
    kind = h5t.C_S1.copy()
    kind.set_size(len(text))
    kind.set_strpad(h5t.STR_NULLPAD)
    kind.set_cset(h5t.CSET_UTF8)
    space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
    h5a.create(file.id, b"kdcache", kind, space).write(np.full(shape, text, f"S{len(text)}"), mtype=kind)


@pytest.mark.parametrize("case", ATTRIBUTES_OF_LIBHDF5)
def test_attributes_that_our_writer_does_not_make_are_refused(case: str) -> None:
    change, reason = ATTRIBUTES_OF_LIBHDF5[case]
    buffer = io.BytesIO(make_image(ArraySpec(SPARE, "<u2")))
    with h5py.File(buffer, "r+", libver=("v110", "v110")) as file:
        del file[SPARE]
        change(file)
    assert_refused(buffer.getvalue(), reason)


@pytest.mark.parametrize("libver", ["earliest", "v108", "latest", ("v110", "v110")])
def test_files_of_other_programs_are_refused(libver: str | tuple[str, str]) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=libver) as file:
        create(file)
        file.attrs["kdcache"] = np.bytes_(ATTRIBUTE.encode())
    assert_refused(buffer.getvalue(), "superblock version|header flags|group does not|unexpected message")


def test_a_user_block_before_the_file_is_refused() -> None:
    assert_refused(b"#!/bin/sh\n".ljust(512, b"\0") + GOOD, "no HDF5 signature")


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
        (ROOT + 11, b"\x02", "flags 0x2 on message"),
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
        ("label", b"\x04\x02\x00\x02\x02\x00\x01\x08\x00", b"\x04\x02\x01\x02\x02\x00\x01\x08\x00", "filtered or partial"),
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
        (lambda: header_of("view"), "overlap"),
        (lambda: EXPECTED.arrays["label"].offset + 1, "misaligned"),
        (lambda: len(GOOD) // 8 * 8, "outside the file"),
        (lambda: 2**64 - 8, "outside the file"),
        (lambda: 2**64 - 1, "misaligned"),
    ],
)
def test_an_array_that_points_elsewhere_is_refused(target: Callable[[], int], reason: str) -> None:
    array = EXPECTED.arrays["label"]
    moved = patched(U64(array.offset), U64(target()), within=header_of("label"))
    assert_refused(moved, reason)


def test_two_links_to_one_array_are_refused() -> None:
    assert_refused(patched(U64(header_of("view")), U64(header_of("label")), within=ROOT), "overlap")


def test_two_arrays_of_one_name_are_refused() -> None:
    assert_refused(patched(b"\x01\x00\x05label", b"\x01\x00\x05viewx"), "nothing") if False else None
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
