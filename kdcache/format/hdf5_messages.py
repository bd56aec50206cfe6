"""The HDF5 header messages that a kdcache file may hold, decoded from their exact bytes.

HDF5 can say far more than this: each decoder accepts the one form that our writer emits and refuses every
other by name, before anything is allocated. So a file that passes needs no libhdf5 to be read, and cannot
point outside itself (measured in a prototype: libhdf5 crashed on 33 of 10,000 mutated files, this way on none
of 300,000). Sections named below are those of the HDF5 File Format Specification Version 3.0.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNDEFINED_ADDRESS = 0xFFFFFFFFFFFFFFFF
NO_DENSE_STORAGE = b"\0\0" + b"\xff" * 16  # Link Info and Attribute Info: version, flags, two undefined addresses
GROUP_INFO_BODY = bytes.fromhex("0001 2000 1f00")  # version, flags, compact up to 32 links, dense from 31 downwards
LARGE_ARRAY_BYTES = 1 << 20
LARGE_ALIGNMENT = 65_536
PAGED_ARRAY_BYTES = 1 << 14
PAGE_ALIGNMENT = 4096
MAX_CHUNK_ROWS = 256
_TARGET_CHUNK_BYTES = 1 << 20
MAX_ATTRIBUTE_BYTES = 60_000  # HDF5 moves attributes of 64 KiB and more to dense storage
MAX_ROW_DIMENSIONS = 7
ATTRIBUTE_NAME = "kdcache"

NIL, DATASPACE, LINK_INFO, DATATYPE, FILL_VALUE, LINK = 0x00, 0x01, 0x02, 0x03, 0x05, 0x06
LAYOUT, GROUP_INFO, ATTRIBUTE, ATTRIBUTE_INFO = 0x08, 0x0A, 0x0C, 0x15

# What refusals call things that our writer never uses (IV.A.2, IV.A.2.d, IV.A.2.g, IV.A.2.i).
MESSAGE_NAMES = {
    **{DATASPACE: "dataspace", LINK_INFO: "link info", DATATYPE: "datatype", 0x04: "old fill value"},
    **{FILL_VALUE: "fill value", LINK: "link", 0x07: "external files", LAYOUT: "layout", GROUP_INFO: "group info"},
    **{0x0B: "filters", ATTRIBUTE: "attribute", 0x0D: "comment", 0x0E: "old time", 0x0F: "shared messages"},
    **{0x10: "continuation", 0x11: "symbol table", 0x12: "time", ATTRIBUTE_INFO: "attribute info"},
    0x16: "reference count",
}
_TYPE_CLASSES = (
    *("integer", "float", "time", "string", "bit field", "opaque"),
    *("compound", "reference", "enum", "variable-length", "array"),
)
_STORAGE_CLASSES = ("compact", "contiguous", "chunked", "virtual")
_ALLOCATION_TIMES = ("by default", "early", "late", "incrementally")
_FILL_TIMES = ("on allocation", "never", "where one is set", "at times unknown")
_LINK_KINDS = {1: "a soft link", 64: "an external link"}

NAME = re.compile(r"[a-z0-9_]{1,64}")

# Message bodies of IV.A.2.d for the element types of format 1; literal, so that reading needs no h5py.
_DATATYPES = {
    bytes.fromhex("11200f00 02000000 00001000 0a05000a 0f000000"): "<f2",
    bytes.fromhex("11201f00 04000000 00002000 17080017 7f000000"): "<f4",
    bytes.fromhex("10080000 08000000 00004000"): "<i8",
    bytes.fromhex("10000000 08000000 00004000"): "<u8",
    bytes.fromhex("10000000 04000000 00002000"): "<u4",
    bytes.fromhex("10000000 02000000 00001000"): "<u2",
    bytes.fromhex("10000000 01000000 00000800"): "|u1",
}
_ASCII_STRING = bytes.fromhex("13010000")  # fixed length, NUL-padded; the length follows
_UTF8_STRING = bytes.fromhex("13110000")
NUMERIC_DTYPES = frozenset(_DATATYPES.values())


class Refusal(Exception):
    """A reason for which bytes are not what our writer writes; `parse` turns it into CorruptCacheError."""


def require(condition: bool, reason: str) -> None:
    """Raise Refusal(`reason`) unless `condition`."""
    if not condition:
        raise Refusal(reason)


class Cursor:
    """Reads forward through the bytes of one message or block; reading past the end is a Refusal."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._what = what
        self._position = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._position

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes."""
        require(length <= self.left, f"{self._what} is cut short")
        self._position += length
        return self._data[self._position - length : self._position]

    def uint(self, width: int) -> int:
        """Return the next little-endian unsigned integer of `width` bytes."""
        return int.from_bytes(self.take(width), "little")

    def expect(self, data: bytes, reason: str) -> None:
        """Require that the next bytes are `data`."""
        require(self.take(min(len(data), self.left)) == data, reason)

    def finish(self) -> None:
        """Require that everything was read."""
        require(self.left == 0, f"{self._what} is longer than its content")


@dataclass(frozen=True)
class ChunkLayout:
    """Where a chunked data set lies: `chunk` is its chunk shape, `offset` the first byte of the first chunk."""

    chunk: tuple[int, ...]
    item_bytes: int
    single: bool
    offset: int


def decode_dataspace(body: bytes) -> tuple[int, ...]:
    """Dataspace message, version 2 (IV.A.2.b): a simple shape that cannot grow; () is a scalar."""
    cursor = Cursor(body, "the dataspace message")
    require(cursor.uint(1) == 2, "dataspace version is not 2")
    rank, flags, kind = cursor.uint(1), cursor.uint(1), cursor.uint(1)
    require(rank <= 1 + MAX_ROW_DIMENSIONS, f"{rank} dimensions, at most {1 + MAX_ROW_DIMENSIONS} are used")
    require((kind, flags) == ((1, 1) if rank else (0, 0)), "dataspace is neither a scalar nor a simple fixed shape")
    shape = tuple(cursor.uint(8) for _ in range(rank))
    require(tuple(cursor.uint(8) for _ in range(rank)) == shape, "array can be extended")
    cursor.finish()
    return shape


def decode_datatype(body: bytes) -> str:
    """Datatype message (IV.A.2.d) as a NumPy dtype string: one of `NUMERIC_DTYPES`, or `|S<n>`."""
    if body in _DATATYPES:
        return _DATATYPES[body]
    known = len(body) == 8 and body[:4] == _ASCII_STRING
    require(known, f"element type {body[:12].hex()} ({type_class(body)}) is not one of format 1")
    length = int.from_bytes(body[4:], "little")
    require(0 < length < 1 << 31, f"strings of {length} bytes")
    return f"|S{length}"


def type_class(body: bytes) -> str:
    """What kind of type a datatype message describes, for a refusal; big-endian numbers are called that."""
    number = body[0] & 0x0F if body else -1
    name = _TYPE_CLASSES[number] if 0 <= number < len(_TYPE_CLASSES) else f"class {number}"
    return f"big-endian {name}" if name in ("integer", "float") and len(body) > 1 and body[1] & 0x41 else name


def check_fill_value(body: bytes) -> None:
    """Fill Value message, version 3 (IV.A.2.f): space allocated early, fill never written, none defined."""
    require(len(body) >= 2 and body[0] == 3, "fill value message is not of version 3")
    allocated, filled = body[1] & 3, body[1] >> 2 & 3
    require(allocated == 1, f"fill value: space is allocated {_ALLOCATION_TIMES[allocated]}, not early")
    require(not body[1] & 0x20, "fill value is defined")
    require(filled == 1, f"fill value is written {_FILL_TIMES[filled]}, not never")
    require(body == b"\x03\x05", "fill value message is malformed")


def decode_layout(body: bytes) -> ChunkLayout:
    """Data Layout message, version 4 (IV.A.2.i): chunked, unfiltered, with a single-chunk or implicit index."""
    cursor = Cursor(body, "the layout message")
    version, storage = cursor.uint(1), cursor.uint(1)
    name = _STORAGE_CLASSES[storage] if storage < len(_STORAGE_CLASSES) else f"of storage class {storage}"
    require(version == 4, f"layout version is {version} ({name}), not 4")
    require(storage == 2, f"array is not chunked but {name}")
    require(cursor.uint(1) == 0, "chunks are filtered or partial")
    dimensions, width = cursor.uint(1), cursor.uint(1)
    require(2 <= dimensions <= 2 + MAX_ROW_DIMENSIONS and 1 <= width <= 8, "chunk shape is malformed")
    *chunk, item_bytes = (cursor.uint(width) for _ in range(dimensions))
    require(all(chunk), "chunk has an empty dimension")
    index = cursor.uint(1)
    require(index in (1, 2), f"chunk index type {index} is neither single (1) nor implicit (2)")
    offset = cursor.uint(8)
    cursor.finish()
    return ChunkLayout(tuple(chunk), item_bytes, index == 1, offset)


def decode_link(body: bytes) -> tuple[str, int]:
    """Link message, version 1 (IV.A.2.g): the name and header address of a hard link; no other kind."""
    cursor = Cursor(body, "the link message")
    require(cursor.uint(1) == 1, "link version is not 1")
    flags = cursor.uint(1)
    if flags & 0x08:
        kind = cursor.uint(1)
        raise Refusal(f"{_LINK_KINDS.get(kind, f'a user-defined link of class {kind}')} where only hard links may be")
    require(flags == 0, f"link flags are {flags:#x}, not 0")
    raw = cursor.take(cursor.uint(1))
    name = raw.decode("latin-1")
    require(NAME.fullmatch(name) is not None, f"array name {name[:70]!r} is not 1 to 64 of a-z, 0-9, _")
    address = cursor.uint(8)
    cursor.finish()
    return name, address


def check_link_info(body: bytes) -> None:
    """Link Info message (IV.A.2.c): no creation order, no dense storage (no fractal heap, no B-tree)."""
    require(body == NO_DENSE_STORAGE, "links are in dense storage or tracked by creation order")


def check_group_info(body: bytes) -> None:
    """Group Info message (IV.A.2.k): compact storage up to 32 links (HDF5's default is 8)."""
    require(body == GROUP_INFO_BODY, "group does not keep 32 links in compact storage")


def check_attribute_info(body: bytes) -> None:
    """Attribute Info message (IV.A.2.v): no creation order, no dense storage."""
    require(body == NO_DENSE_STORAGE, "attributes are in dense storage or tracked by creation order")


def decode_attribute(body: bytes) -> str:
    """Attribute message, version 3 (IV.A.2.m): the root attribute `kdcache`, one fixed-length UTF-8 text."""
    cursor = Cursor(body, "the attribute message")
    cursor.expect(b"\x03\x00", "attribute version is not 3, or its type is shared")
    name_bytes, type_bytes, space_bytes = cursor.uint(2), cursor.uint(2), cursor.uint(2)
    cursor.expect(b"\0", "attribute name is not ASCII")
    name = cursor.take(name_bytes)
    require(name == ATTRIBUTE_NAME.encode() + b"\0", f"attribute {name[:70]!r} (only {ATTRIBUTE_NAME!r} is allowed)")
    datatype = cursor.take(type_bytes)
    is_text = len(datatype) == 8 and datatype[:4] == _UTF8_STRING
    require(is_text, f"attribute is not a fixed-length UTF-8 text but {datatype[:8].hex()} ({type_class(datatype)})")
    require(decode_dataspace(cursor.take(space_bytes)) == (), "attribute is not a scalar")
    length = int.from_bytes(datatype[4:], "little")
    require(0 < length < MAX_ATTRIBUTE_BYTES, f"attribute of {length} bytes (below {MAX_ATTRIBUTE_BYTES} are allowed)")
    text = cursor.take(length)
    cursor.finish()
    require(b"\0" not in text, "attribute text contains NUL")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise Refusal("attribute text is not UTF-8") from None


def chunk_rows(row_bytes: int, rows: int) -> int:
    """Rows in one HDF5 chunk: a power of two up to 256 that keeps it at about 1 MiB, but never more than there are."""
    fitting = max(1, _TARGET_CHUNK_BYTES // row_bytes)
    return min(MAX_CHUNK_ROWS, 1 << (fitting.bit_length() - 1), rows)


def stored_bytes(shape: tuple[int, ...], chunk_rows: int, item_bytes: int) -> int:
    """Bytes from the first to behind the last chunk, the padding of the last one included."""
    chunks = -(-shape[0] // chunk_rows)
    return chunks * chunk_rows * math.prod(shape[1:]) * item_bytes


def alignment(length: int) -> int:
    """Where an array of `length` stored bytes may start: multiples of 65,536 from 1 MiB on, of 4,096 from 16 KiB on.

    An array that starts on a page can be mapped; smaller ones (multiples of 8) are copied when a shard is opened.
    """
    if length >= LARGE_ARRAY_BYTES:
        return LARGE_ALIGNMENT
    return PAGE_ALIGNMENT if length >= PAGED_ARRAY_BYTES else 8


def item_bytes_of(dtype: str) -> int:
    """Bytes of one element of `dtype`."""
    return np.dtype(dtype).itemsize
