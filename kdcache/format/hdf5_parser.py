"""A strict reader of the HDF5 subset that kdcache writes: finds the arrays of a file without libhdf5.

It answers where each array lies, so that rows are read by offset afterwards. Everything our writer does not
emit is refused with a reason, no size in the file is believed before it is compared with the file, and
at most 128 KiB of metadata are read. Cost: about 1 ms for a file with a 4 KB attribute, nearly all of it for the
checksums. The sections named are those of the HDF5 File Format Specification Version 3.0.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from kdcache.errors import CorruptCacheError
from kdcache.format import hdf5_messages as messages
from kdcache.format.arrays import ArrayLayout
from kdcache.format.hdf5_messages import Cursor, Refusal, require
from kdcache.format.lookup3 import lookup3

SUPERBLOCK_BYTES = 48
MAX_ARRAYS = 32
_MAX_GAP_BYTES = 1 << 17  # two alignments; what lies between is hashed when a cache is opened
_MAX_METADATA_BYTES = 1 << 17  # the largest file that our writer makes needs 80,000
_PREFIX_BYTES = 8  # of an object header: signature, version, flags, size of its messages
_MESSAGE_HEADER_BYTES = 4
_CHECKSUM_BYTES = 4

# Flags that our writer sets on each message (IV.A.1.b: 1 constant, 4 never shared).
_SHARED = 2
_ROOT_FLAGS = {
    messages.NIL: 0,
    messages.LINK_INFO: 0,
    messages.LINK: 0,
    messages.GROUP_INFO: 1,
    messages.ATTRIBUTE: 0,
    messages.ATTRIBUTE_INFO: 4,
}
_ARRAY_FLAGS = {
    messages.NIL: 0,
    messages.DATASPACE: 0,
    messages.DATATYPE: 1,
    messages.FILL_VALUE: 1,
    messages.LAYOUT: 1,
}

_Messages = list[tuple[int, int, bytes]]


@dataclass(frozen=True)
class ParsedFile:
    """What a file holds: the text of its root attribute, its arrays in the order of their offsets, its rows N.

    `headers` are the (start, stop) of everything else that our writer puts there; all other bytes are zero.
    """

    attribute: str
    arrays: dict[str, ArrayLayout]
    rows: int
    headers: tuple[tuple[int, int], ...]


def parse(read: Callable[[int, int], bytes], size: int, *, name: str) -> ParsedFile:
    """Return what a file of `size` bytes holds.

    Args:
        read: `read(offset, length)` returns exactly `length` bytes or raises; it is never asked for bytes
            outside the file.
        size: Bytes of the file, from the file system.
        name: What to call the file in an error.

    Raises:
        CorruptCacheError: The file is not, byte by byte, of the form that kdcache writes.
    """
    try:
        return examine(read, size)
    except Refusal as refusal:
        raise CorruptCacheError(
            f"{name}: {refusal}. Expected an HDF5 file as kdcache writes it (docs/format.md); nothing of it was "
            "used. Fetch or copy it again, and compare its sha256 with the manifest of where it came from."
        ) from None


def examine(read: Callable[[int, int], bytes], size: int) -> ParsedFile:
    """`parse` for our own header builder: raises Refusal, which names the reason alone."""
    return _Parser(read, size).parse()


def refuse_slack(read: Callable[[int, int], bytes], size: int, parsed: ParsedFile, *, name: str) -> None:
    """Refuses a file with anything but zeros between headers and payload: nothing travels along that no reader shows.

    Raises:
        CorruptCacheError: naming the first byte of the gap.
    """
    known = sorted([*parsed.headers, *((a.offset, a.stop) for a in parsed.arrays.values()), (size, size)])
    cursor = 0
    for start, stop in known:  # no gap is long, or the file would not have been parsed
        if start > cursor and any(read(cursor, start - cursor)):
            raise CorruptCacheError(f"{name}: bytes between its arrays, from byte {cursor} on, are not zero")
        cursor = stop


class _Parser:
    """One pass over one file; `spans` collects (start, stop) of everything that was found in it."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self._budget = _MAX_METADATA_BYTES
        self._spans: list[tuple[int, int]] = []

    def parse(self) -> ParsedFile:
        links, attribute = self._root(self._superblock())
        arrays = []
        for name, address in links.items():
            try:
                arrays.append(self._array(name, address))
            except Refusal as refusal:
                raise Refusal(f"array {name!r}: {refusal}") from None
        rows = {array.rows for array in arrays}
        require(len(rows) == 1, f"arrays have different numbers of rows: {sorted(rows)[:4]}")
        for (_, stop), (start, _) in pairwise([*sorted(self._spans), (self._size, self._size)]):
            require(stop <= start, f"two things overlap at byte {start}")
            require(start - stop <= _MAX_GAP_BYTES, f"{start - stop} bytes from byte {stop} on belong to nothing")
        arrays.sort(key=lambda array: array.offset)
        payload = {array.offset for array in arrays}
        headers = tuple(sorted(span for span in self._spans if span[0] not in payload))
        return ParsedFile(attribute, {array.name: array for array in arrays}, rows.pop(), headers)

    def _fetch(self, offset: int, length: int) -> bytes:
        self._check_inside(offset, length)
        require(length <= self._budget, f"more than {_MAX_METADATA_BYTES} bytes of metadata")
        self._budget -= length
        data = self._read(offset, length)
        require(len(data) == length, f"the file ended at byte {offset + len(data)} while it was read")
        return data

    def _claim(self, offset: int, length: int) -> None:
        self._check_inside(offset, length)
        self._spans.append((offset, offset + length))

    def _check_inside(self, offset: int, length: int) -> None:
        stop = offset + length
        require(stop <= self._size, f"bytes {offset} to {stop} lie outside the file, which has {self._size}")

    def _superblock(self) -> int:
        """Superblock, version 3 (II.A), at byte 0; returns the address of the root group's header."""
        require(self._size >= SUPERBLOCK_BYTES, f"only {self._size} bytes long")
        block = self._fetch(0, SUPERBLOCK_BYTES)
        self._claim(0, SUPERBLOCK_BYTES)
        cursor = Cursor(block, "the superblock")
        cursor.expect(messages.SIGNATURE, "no HDF5 signature at byte 0: not a cache")
        version = cursor.uint(1)
        require(version == 3, f"superblock version is {version}, not 3")
        cursor.expect(b"\x08\x08", "addresses or lengths are not of 8 bytes")
        cursor.expect(b"\x00", "superblock flags are set (left open by a writer)")
        base, extension, end, root = (cursor.uint(8) for _ in range(4))
        _check_sum(block, "the superblock")
        require(base == 0, f"base address is {base}, not 0 (user block)")
        require(extension == messages.UNDEFINED_ADDRESS, "the file has a superblock extension")
        require(end == self._size, f"{self._size} bytes long, its superblock says {end} (truncated or grown)")
        return root

    def _root(self, address: int) -> tuple[dict[str, int], str]:
        """Links by name, and the text of the attribute, from the root group's header."""
        links: dict[str, int] = {}
        attributes: list[str] = []
        once: set[int] = set()
        for kind, flags, body in self._header(address, "the root group", _ROOT_FLAGS):
            if kind == messages.LINK:
                name, target = messages.decode_link(body)
                require(name not in links, f"two arrays are called {name!r}")
                links[name] = target
            elif kind == messages.ATTRIBUTE:
                attributes.append(messages.decode_attribute(body))
            else:
                require(kind not in once, f"message {kind:#x} of the root group is repeated")
                once.add(kind)
                _ROOT_CHECKS[kind](body)
            _check_flags(kind, flags, _ROOT_FLAGS)
        require(len(attributes) == 1, f"{len(attributes)} root attributes instead of one")
        require(once == set(_ROOT_CHECKS), "the root group lacks a message")
        require(0 < len(links) <= MAX_ARRAYS, f"{len(links)} arrays, 1 to {MAX_ARRAYS} are allowed")
        return links, attributes[0]

    def _array(self, name: str, address: int) -> ArrayLayout:
        """Where one array lies, from its data set's header; its bytes are claimed."""
        found: dict[int, bytes] = {}
        found_flags: dict[int, int] = {}
        for kind, flags, body in self._header(address, "the array", _ARRAY_FLAGS):
            require(kind not in found, f"message {kind:#x} is repeated")
            found[kind], found_flags[kind] = body, flags
        require(set(found) == set(_ARRAY_FLAGS) - {messages.NIL}, "a message is missing")
        shape = messages.decode_dataspace(found[messages.DATASPACE])
        require(len(shape) > 0 and all(shape), f"shape {shape} is empty or scalar")
        dtype = messages.decode_datatype(found[messages.DATATYPE])
        messages.check_fill_value(found[messages.FILL_VALUE])
        layout = messages.decode_layout(found[messages.LAYOUT])
        for kind, flags in found_flags.items():  # last: the content tells more than its flags do
            _check_flags(kind, flags, _ARRAY_FLAGS)

        item_bytes = messages.item_bytes_of(dtype)
        require(layout.item_bytes == item_bytes, f"chunks have elements of {layout.item_bytes} bytes, not {item_bytes}")
        chunk = (messages.chunk_rows(item_bytes * math.prod(shape[1:]), shape[0]), *shape[1:])
        require(layout.chunk == chunk, f"chunk {layout.chunk} of {shape}, expected {chunk}")
        require(layout.single == (layout.chunk == shape), "chunk index does not fit the number of chunks")
        length = messages.stored_bytes(shape, layout.chunk[0], item_bytes)
        self._claim(layout.offset, length)
        require(layout.offset % messages.alignment(length) == 0, f"starts at byte {layout.offset}, which is misaligned")
        return ArrayLayout(name, dtype, shape, layout.offset)

    def _header(self, address: int, what: str, allowed: dict[int, int]) -> _Messages:
        """Messages of an object header, version 2 (IV.A.1.b), its checksum compared; continued headers are refused.

        (type, flags, body) of each, padding left out; `allowed` has the types of message that may occur.
        """
        prefix = Cursor(self._fetch(address, _PREFIX_BYTES), f"the header of {what}")
        prefix.expect(b"OHDR\x02", f"no version 2 header of {what} at byte {address}")
        flags = prefix.uint(1)
        # Flags 1: the size has two bytes. Times, attribute order and thresholds would set others: never written.
        require(flags == 1, f"header flags of {what} are {flags:#x}, not 1 (times, attribute order or thresholds)")
        block = self._fetch(address, _PREFIX_BYTES + prefix.uint(2) + _CHECKSUM_BYTES)
        _check_sum(block, f"the header of {what}")
        self._claim(address, len(block))
        cursor = Cursor(block[_PREFIX_BYTES:-_CHECKSUM_BYTES], f"the header of {what}")
        found: _Messages = []
        # HDF5 leaves a gap that is too small for a message as zeros at the end.
        is_padded = False
        while cursor.left >= _MESSAGE_HEADER_BYTES:
            kind, length, message_flags = cursor.uint(1), cursor.uint(2), cursor.uint(1)
            body = cursor.take(length)
            name = messages.MESSAGE_NAMES.get(kind, "unknown")
            require(kind in allowed, f"unexpected message {kind:#x} ({name}) in the header of {what}")
            require(not message_flags & _SHARED, f"message {kind:#x} ({name}) of {what} is shared: it lies elsewhere")
            if kind == messages.NIL:
                _check_flags(kind, message_flags, allowed)
                is_padded = True
                # Otherwise a changed type byte would make an array vanish.
                require(not any(body), f"padding in the header of {what} is not zero")
            else:
                found.append((kind, message_flags, body))
        # libhdf5 takes a gap only where there is no padding that could have filled it.
        require(not (cursor.left and is_padded), f"a gap and padding in the header of {what}")
        require(not any(cursor.take(cursor.left)), f"bytes behind the messages in the header of {what}")
        return found


def _check_flags(kind: int, flags: int, allowed: dict[int, int]) -> None:
    require(flags == allowed[kind], f"flags {flags:#x} on message {kind:#x} ({messages.MESSAGE_NAMES.get(kind)})")


def _check_sum(block: bytes, what: str) -> None:
    """Compare the lookup3 checksum in the last four bytes of `block`."""
    (stored,) = struct.unpack("<I", block[-_CHECKSUM_BYTES:])
    require(lookup3(block[:-_CHECKSUM_BYTES]) == stored, f"wrong checksum of {what}")


_ROOT_CHECKS: dict[int, Callable[[bytes], None]] = {
    messages.LINK_INFO: messages.check_link_info,
    messages.GROUP_INFO: messages.check_group_info,
    messages.ATTRIBUTE_INFO: messages.check_attribute_info,
}
