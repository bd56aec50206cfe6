"""`.npy` and `.npz` that somebody else wrote, in the process that reads them: rows as a stream, never a whole array.

Only an array that is stored column by column (Fortran order) is read whole, within the memory limit.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from kdcache.errors import DataError
from kdcache.store.foreign_column import Column, listed, plain_dtype
from kdcache.store.foreign_wire import ONLY_ARRAY

DESCRIPTORS = 0
_PIECE_BYTES = 1 << 20  # a member of a zip file is unpacked into as much again, twice
_MAX_DEFLATE_RATIO = 1032  # of the format itself: 258 bytes from 2 bits
_READERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


@dataclass(frozen=True)
class _Stored:
    """An array in the .npy format inside a stream of `size` bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    header_bytes: int
    open: Callable[[], AbstractContextManager[IO[bytes]]]


def open_source(fd: int, format: str, *, memory_bytes: int) -> NpySource | NpzSource:
    """The file behind a descriptor."""
    return NpySource(fd) if format == "npy" else NpzSource(fd)


class NpySource:
    """One array, which is called `array`."""

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        self._stored = _read_header(ONLY_ARRAY, size, lambda: io.BufferedReader(_Slice(fd)))

    def column(self, name: str) -> Column | None:
        """The array, if `name` is `array`."""
        return _column(self._stored) if name == ONLY_ARRAY else None

    def listing(self, limit: int) -> list[dict[str, Any]]:
        """The one array."""
        return [listed(ONLY_ARRAY, self._stored.shape, str(self._stored.dtype))]


class NpzSource:
    """A zip file of arrays, as `numpy.savez` writes it."""

    def __init__(self, fd: int) -> None:
        self._size = os.fstat(fd).st_size
        self._archive = zipfile.ZipFile(os.fdopen(fd, "rb", closefd=False))
        members = self._archive.infolist()
        if any(member.filename.endswith("data.pkl") for member in members):
            raise DataError(
                "this is a file of torch.save, which holds pickled objects; kdcache never unpickles. Load it where you "
                "trust it and save the arrays with numpy.savez or safetensors"
            )
        self._members = {m.filename.removesuffix(".npy"): m for m in members if m.filename.endswith(".npy")}
        if len(self._members) < sum(member.filename.endswith(".npy") for member in members):
            raise DataError("two arrays have one name")

    def column(self, name: str) -> Column | None:
        """The array of that name; None if there is none.

        Raises:
            DataError: compressed by another method than deflate, encrypted, or sizes that cannot be.
        """
        member = self._members.get(name)
        return None if member is None else _column(self._stored(name, member))

    def listing(self, limit: int) -> list[dict[str, Any]]:
        """The first arrays; one that cannot be read is listed with the reason in place of its type."""
        found = []
        for name, member in list(self._members.items())[:limit]:
            try:
                stored = self._stored(name, member)
                found.append(listed(name, stored.shape, str(stored.dtype)))
            except Exception as error:  # zipfile and NumPy's header parser raise a dozen types between them
                found.append(listed(name, (), f"not readable: {error}"))
        return found

    def _stored(self, name: str, member: zipfile.ZipInfo) -> _Stored:
        is_plain = member.compress_type == zipfile.ZIP_STORED
        if not is_plain and member.compress_type != zipfile.ZIP_DEFLATED:
            raise DataError(f"array {name}: zip method {member.compress_type}; expected stored or deflated")
        if member.flag_bits & 1:
            raise DataError(f"array {name} is encrypted; write the file without a password")
        limit = member.compress_size * (1 if is_plain else _MAX_DEFLATE_RATIO) + (0 if is_plain else 1024)
        if member.compress_size > self._size or member.file_size > limit:
            raise DataError(f"array {name}: {member.file_size} bytes cannot come from {member.compress_size}")
        return _read_header(name, member.file_size, lambda: self._archive.open(member))


def _read_header(name: str, size: int, open_stream: Callable[[], AbstractContextManager[IO[bytes]]]) -> _Stored:
    with open_stream() as stream:
        version = npy_format.read_magic(stream)
        if version not in _READERS:
            raise DataError(f"array {name}: version {version} of the .npy format; expected 1.0 or 2.0")
        shape, is_fortran, dtype = _READERS[version](stream)
        header_bytes = stream.tell()
    expected = header_bytes + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (any(length < 0 for length in shape) or expected != size):
        raise DataError(f"array {name}: {shape} of {dtype} needs {expected} bytes, and {size} are there; it is damaged")
    return _Stored(name, shape, dtype, is_fortran and len(shape) > 1, header_bytes, open_stream)


def _column(stored: _Stored) -> Column:
    dtype = plain_dtype(stored.name, stored.dtype)
    return Column(stored.name, stored.shape, dtype, partial(_whole if stored.is_fortran else _streamed, stored))


def _streamed(stored: _Stored, rows: int) -> Iterator[np.ndarray]:
    length, shape = stored.shape[0], stored.shape[1:]
    with stored.open() as stream:
        _fill(stored, stream, np.empty(stored.header_bytes, np.uint8))
        for start in range(0, length, rows):
            block = np.empty((min(rows, length - start), *shape), stored.dtype)
            _fill(stored, stream, block.reshape(-1).view(np.uint8))
            yield block


def _whole(stored: _Stored, rows: int) -> Iterator[np.ndarray]:
    values = np.empty(stored.shape[::-1], stored.dtype)
    with stored.open() as stream:
        _fill(stored, stream, np.empty(stored.header_bytes, np.uint8))
        _fill(stored, stream, values.reshape(-1).view(np.uint8))
    for start in range(0, stored.shape[0], rows):
        yield values.T[start : start + rows]


def _fill(stored: _Stored, stream: IO[bytes], target: np.ndarray) -> None:
    view, got = target.data, 0
    while got < len(view):
        count = stream.readinto(view[got : got + _PIECE_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise DataError(f"array {stored.name} ends {len(view) - got} bytes early; the file is truncated")
        got += count


class _Slice(io.RawIOBase):
    """A descriptor from its start, with a position of its own: the descriptor's is shared with the parent."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads on from the position."""
        count = os.preadv(self._fd, [buffer], self._position)
        self._position += count
        return count

    def tell(self) -> int:
        return self._position
