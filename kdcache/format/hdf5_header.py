"""Builds everything of an HDF5 file but its rows: h5py writes the header, into memory, and never sees the disk.

libhdf5 must not write the real file: on a full disk it crashes in `close()` in 9 of 13 write modes, it never
fsyncs, and it truncates files that others hold. So it writes to a sparse image here, where the rows take no
space; the writer splices rows and header with plain POSIX calls. It takes about 6 ms, and 70 ms for a 200 GB
file of six arrays (libhdf5 counts through its 2.3 million chunks), with a few KB of memory.

The price is that we rely on how libhdf5 lays out a file. Hence each header is read back by our own parser, and
a build of h5py that behaves otherwise is an error and not a damaged cache.

Bytes depend on the arguments alone, and offsets on the length of the attribute, not on its text.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h5py
import numpy as np
from h5py import h5a, h5d, h5p, h5s, h5t

from kdcache.errors import KDCacheError, UsageError
from kdcache.format import hdf5_messages as messages
from kdcache.format.arrays import ArrayLayout, ArraySpec
from kdcache.format.hdf5_parser import MAX_ARRAYS, SUPERBLOCK_BYTES, examine
from kdcache.format.lookup3 import lookup3

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_HDF5_CHUNK_LIMIT_BYTES = 1 << 32
_MAX_FILE_BYTES = 1 << 60
_LIBVER = ("v110", "v110")
# What the attribute and a link add to the root group beside their text: message headers and fixed fields
# (IV.A.2.m, IV.A.2.g), and for the attribute also the Attribute Info message (22) and some slack.
_ATTRIBUTE_OVERHEAD_BYTES = 96
_LINK_OVERHEAD_BYTES = 15
_STRING_DTYPE = re.compile(r"\|S([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class FileLayout:
    """A file of `size` bytes: where its arrays lie, and `metadata`, the (offset, bytes) pieces around their rows.

    The pieces are sorted and do not touch; every byte that belongs neither to a piece nor to a row is zero.
    """

    size: int
    arrays: dict[str, ArrayLayout]
    metadata: tuple[tuple[int, bytes], ...]


def build_layout(specs: Sequence[ArraySpec], rows: int, attribute: str) -> FileLayout:
    """Lay out an HDF5 file that holds `rows` rows of each array of `specs`, in that order, and a root attribute.

    Args:
        specs: 1 to 32 arrays with distinct names of a-z, 0-9 and _.
        rows: Number of rows N, at least 1.
        attribute: Text of the root attribute `kdcache`, 1 to 59,999 bytes as UTF-8.

    Returns:
        The layout: rows back to back, arrays of 1 MiB and more at multiples of 65,536 bytes, of
        16 KiB and more of 4,096, others of 8.

    Raises:
        UsageError: The arguments cannot be stored in this format.
        KDCacheError: This build of h5py lays files out in another way.

    >>> layout = build_layout([ArraySpec("logits", "<f2", (10,)), ArraySpec("label", "<i8")], 1797, '{"format": 1}')
    >>> [(array.name, array.shape) for array in layout.arrays.values()]
    [('logits', (1797, 10)), ('label', (1797,))]
    """
    text = _checked_attribute(attribute)
    _check_specs(specs, rows)
    image = _SparseImage()
    image.write(_empty_file([spec.name for spec in specs], len(text)))
    try:
        _write_attribute(image, text)
        for spec in specs:
            _create_array(image, spec, rows)
        parsed = examine(image.read_at, image.size)
    except (OSError, RuntimeError, TypeError, ValueError, messages.Refusal) as error:
        raise _unsuitable(str(error)) from error
    if [array.spec for array in parsed.arrays.values()] != list(specs) or parsed.rows != rows:
        raise _unsuitable(f"arrays came out as {list(parsed.arrays.values())}")
    return FileLayout(image.size, parsed.arrays, image.pieces())


def _checked_attribute(attribute: str) -> bytes:
    try:
        text = attribute.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"The root attribute is not valid Unicode text: {error}. Escape it as JSON does.") from error
    if b"\0" in text:
        raise UsageError("The root attribute contains NUL, at which HDF5 tools would cut it. Escape it as JSON does.")
    if not 0 < len(text) < messages.MAX_ATTRIBUTE_BYTES:
        raise UsageError(
            f"The root attribute has {len(text)} bytes, expected 1 to {messages.MAX_ATTRIBUTE_BYTES - 1}. "
            "Keep long texts, such as class names, beside the file."
        )
    return text


def _check_specs(specs: Sequence[ArraySpec], rows: int) -> None:
    if rows < 1:
        raise UsageError(f"Cannot store {rows} rows: a file holds at least 1. Leave it out instead.")
    if not 0 < len(specs) <= MAX_ARRAYS:
        raise UsageError(f"Cannot store {len(specs)} arrays in one file: 1 to {MAX_ARRAYS} fit.")
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise UsageError(f"Array names must differ, found {names}.")
    total = 0
    for spec in specs:
        if not messages.NAME.fullmatch(spec.name):
            raise UsageError(f"Array name {spec.name!r} cannot be stored: use 1 to 64 of a-z, 0-9 and _.")
        if spec.dtype not in messages.NUMERIC_DTYPES and not _STRING_DTYPE.fullmatch(spec.dtype):
            known = ", ".join(sorted(messages.NUMERIC_DTYPES))
            raise UsageError(f"Array {spec.name!r} has dtype {spec.dtype!r}, expected one of {known} or |S<n>.")
        if len(spec.row_shape) > messages.MAX_ROW_DIMENSIONS or any(length < 1 for length in spec.row_shape):
            raise UsageError(
                f"Array {spec.name!r} has rows of shape {spec.row_shape}, expected at most "
                f"{messages.MAX_ROW_DIMENSIONS} dimensions, none of them empty."
            )
        if spec.row_bytes >= _HDF5_CHUNK_LIMIT_BYTES:
            raise UsageError(f"Array {spec.name!r} has rows of {spec.row_bytes} bytes; HDF5 stores less than 4 GiB.")
        total += (rows + messages.MAX_CHUNK_ROWS) * spec.row_bytes
    if total > _MAX_FILE_BYTES:
        raise UsageError(f"{rows} rows would need {total} bytes, more than one file can hold. Use more shards.")


def _unsuitable(reason: str) -> KDCacheError:
    return KDCacheError(
        f"h5py {h5py.version.version} with HDF5 {h5py.version.hdf5_version} wrote a header that kdcache does not "
        f"accept: {reason}. Install another h5py (3.8, 3.11 and 3.16 are known to work) and report this."
    )


def _empty_file(names: Iterable[str], attribute_bytes: int) -> bytes:
    """An HDF5 file without content: superblock and root group, as libhdf5 writes them but for three things.

    h5py has no call for when a group leaves compact storage (after 8 links by default), and h5py 3.11 cannot be
    kept from stamping the root group with the time. And the padding is sized for what is to come, so that the root
    group stays one block at the start of the file. HDF5 File Format Specification Version 3.0, II.A and IV.A.1.b.
    """
    to_come = [_ATTRIBUTE_OVERHEAD_BYTES + attribute_bytes, *(_LINK_OVERHEAD_BYTES + len(name) for name in names)]
    padding = bytes(sum(to_come))
    body = b"".join(
        struct.pack("<BHB", kind, len(data), flags) + data
        for kind, flags, data in (
            (messages.LINK_INFO, 0, messages.NO_DENSE_STORAGE),
            (messages.GROUP_INFO, 1, messages.GROUP_INFO_BODY),
            (messages.NIL, 0, padding),
        )
    )
    root = b"OHDR\x02" + struct.pack("<BH", 1, len(body)) + body  # flags 1: the size field has two bytes
    root += struct.pack("<I", lookup3(root))
    addresses = (0, messages.UNDEFINED_ADDRESS, SUPERBLOCK_BYTES + len(root), SUPERBLOCK_BYTES)
    superblock = messages.SIGNATURE + b"\x03\x08\x08\x00" + struct.pack("<4Q", *addresses)
    return superblock + struct.pack("<I", lookup3(superblock)) + root


def _open(image: _SparseImage, alignment: int) -> h5py.File:
    # The alignment of HDF5 belongs to an open file, so each array is added in an opening of its own.
    # HDF5's own metadata stays below the threshold of the larger alignments.
    threshold = {
        messages.LARGE_ALIGNMENT: messages.LARGE_ARRAY_BYTES,
        messages.PAGE_ALIGNMENT: messages.PAGED_ARRAY_BYTES,
    }
    return h5py.File(
        image, "r+", libver=_LIBVER, alignment_threshold=threshold.get(alignment, 1), alignment_interval=alignment
    )


def _write_attribute(image: _SparseImage, text: bytes) -> None:
    kind = h5t.C_S1.copy()
    kind.set_size(len(text))
    kind.set_strpad(h5t.STR_NULLPAD)
    kind.set_cset(h5t.CSET_UTF8)
    with _open(image, messages.alignment(0)) as file:
        attribute = h5a.create(file.id, messages.ATTRIBUTE_NAME.encode(), kind, h5s.create(h5s.SCALAR))
        attribute.write(np.array(text, f"S{len(text)}"), mtype=kind)


def _create_array(image: _SparseImage, spec: ArraySpec, rows: int) -> None:
    """Add one data set: chunks allocated now, next to each other, and never filled, so nothing is written."""
    shape = spec.shape(rows)
    chunk = (messages.chunk_rows(spec.row_bytes, rows), *spec.row_shape)
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_chunk(chunk)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    dtype = np.dtype(spec.dtype)
    stored = messages.stored_bytes(shape, chunk[0], dtype.itemsize)
    with _open(image, messages.alignment(stored)) as file:
        h5d.create(file.id, spec.name.encode(), h5t.py_create(dtype), h5s.create_simple(shape), properties)


class _SparseImage(io.RawIOBase):
    """A file in memory that keeps what is written and reads as zero elsewhere; h5py takes it for a file."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self._position = 0
        self._written: list[tuple[int, bytes]] = []

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def write(self, data: ReadableBuffer) -> int:
        piece = bytes(data)
        self._written.append((self._position, piece))
        self._position += len(piece)
        self.size = max(self.size, self._position)
        return len(piece)

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self.size - self._position))
        view[:length] = self.read_at(self._position, length)
        self._position += length
        return length

    def read_at(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, zeros where nothing was written."""
        data = bytearray(length)
        for start, piece in self._written:
            first, stop = max(start, offset), min(start + len(piece), offset + length)
            if first < stop:
                data[first - offset : stop - offset] = piece[first - start : stop - start]
        return bytes(data)

    def pieces(self) -> tuple[tuple[int, bytes], ...]:
        """Return what was written as sorted (offset, bytes) that do not touch."""
        spans: list[tuple[int, int]] = []
        for start, stop in sorted((start, start + len(piece)) for start, piece in self._written):
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
            else:
                spans.append((start, stop))
        return tuple((start, self.read_at(start, stop - start)) for start, stop in spans)
