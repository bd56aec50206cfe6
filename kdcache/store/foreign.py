"""A file that somebody else wrote: which format it has, its sha256, and rows of its arrays from a reading process.

Only the first bytes and the hash are read here; what parses the file runs in a process of its own
(`kdcache.store.foreign_child`). What comes back is compared with what was announced, and what was announced with the
size of the file, before anything is allocated.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kdcache.errors import DataError, StorageError, UsageError
from kdcache.format.identity import MAX_ID_BYTES
from kdcache.format.schema import MAX_ROWS
from kdcache.store.foreign_listing import render_listing
from kdcache.store.foreign_process import ReadingProcess
from kdcache.store.foreign_wire import BLOCK_BYTES, MAX_BLOCK_ROWS, clipped

_MAX_UNPACKED = 1032  # bytes out of one: the most that deflate can do
_MAX_ROW_BYTES = 256 << 20
_NUMBERS = re.compile(r"<[fiu][248]|\|[iub]1")
_TEXT = re.compile(r"\|S([1-9]\d{0,3})")
_HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ForeignArray:
    """An array of a foreign file: its rows come as `dtype`, little-endian numbers or fixed-length text."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Limits:
    """Of a reading process: address space beyond that of the interpreter (MiB), and seconds by the clock."""

    memory_mib: int
    seconds: int


class ForeignFile:
    """A regular file, opened for reading; use it as a context manager, which also ends the process that reads it.

    Args:
        path: of the file; links to it are followed.
        check: called a few times a second while the file is read; what it raises ends the reading.

    Raises:
        UsageError: no such file, or not a regular one.
        DataError: none of the formats that are read.
    """

    def __init__(self, path: Path, *, check: Callable[[], None] = lambda: None) -> None:
        self.name = clipped(path.name)
        self._check = check
        self._process: ReadingProcess | None = None
        self._arrays: dict[str, ForeignArray] = {}
        self._step = 0
        self._fd = _open(path)
        try:
            self._status = os.fstat(self._fd)
            self.format = _format_of(self._fd, self.size, self.name)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._status.st_size

    def __enter__(self) -> ForeignFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_process()
        os.close(self._fd)

    def listing(self, limits: Limits) -> str:
        """What the file holds, one line an array: name, shape, type."""
        return render_listing(self._ask({}, limits).get("listing"))

    def select(self, wanted: Mapping[str, str], limits: Limits) -> dict[str, ForeignArray]:
        """Finds arrays and starts to read them.

        Args:
            wanted: names of arrays by role; only the role `ids` may be text.
            limits: of the reading process.

        Returns:
            The arrays by role, as the file declares them.

        Raises:
            UsageError: an array that is not there; the message lists those that are.
            DataError: an array that is not read (objects, filters of plug-ins, links into other files ...), or the
                process came to grief.
        """
        answer = self._ask(wanted, limits)
        if "missing" in answer:
            missing = clipped(str(answer["missing"]))
            raise UsageError(f"{self.name} has no array {missing!r}; it holds\n{render_listing(answer.get('listing'))}")
        self._arrays = {role: self._array(name, role, answer.get("arrays")) for role, name in wanted.items()}
        step = answer.get("step")
        self._step = step if type(step) is int else 0
        return self._arrays

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """The rows of the selected arrays, block by block: arrays (n, ...) by role, in memory of their own.

        Raises:
            DataError: the file is damaged or claims what cannot be, or the process came to grief.
        """
        process, rows = self._ready()
        for start in range(0, rows, self._step):
            count = min(self._step, rows - start)
            block = {role: np.empty((count, *a.shape[1:]), a.dtype) for role, a in self._arrays.items()}
            for values in block.values():
                process.rows(values.reshape(-1).view(np.uint8).data)
            yield block
        process.end()

    def sha256(self, progress: Callable[[int], None] = lambda count: None) -> str:
        """Of all its bytes; the process that reads it waits meanwhile, at nobody's expense.

        Args:
            progress: called with the number of bytes after each piece.
        """
        if self._process is None:
            return self._sha256(progress)
        with self._process.pausing():
            return self._sha256(progress)

    def check_unchanged(self) -> None:
        """Refuses a file that was written to since it was opened.

        Raises:
            DataError: its size or its time of modification differ.
        """
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise DataError(f"{self.name} was changed while it was read; wait for its writer, then import it again")

    def _sha256(self, progress: Callable[[int], None]) -> str:
        state, position = hashlib.sha256(), 0
        try:
            while block := os.pread(self._fd, _HASH_BLOCK_BYTES, position):
                self._check()
                state.update(block)
                position += len(block)
                progress(len(block))
        except OSError as error:
            raise StorageError(f"could not read {self.name}: {error.strerror or error}") from error
        return state.hexdigest()

    def _ask(self, wanted: Mapping[str, str], limits: Limits) -> dict[str, Any]:
        self._end_process()
        request = {
            "format": self.format,
            "arrays": dict(wanted),
            "memory_bytes": limits.memory_mib << 20,
            "cpu_seconds": limits.seconds,
        }
        try:
            self._process = ReadingProcess(
                self._fd, name=self.name, request=request, seconds=limits.seconds, check=self._check
            )
        except OSError as error:
            raise StorageError(f"could not start a process to read {self.name}: {error.strerror or error}") from error
        return self._process.answer()

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.__exit__(None, None, None)
            self._process = None

    def _array(self, name: str, role: str, announced: Any) -> ForeignArray:
        entry = announced.get(role) if isinstance(announced, dict) else None
        shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= MAX_ROWS for n in shape):
            raise self._suspect(f"the shape {shape!r:.80} of array {name}")
        if len(shape) > 32 or not isinstance(dtype, str) or not _is_sent(dtype):
            raise self._suspect(f"the type {dtype!r:.80} of array {name}")
        return ForeignArray(name, tuple(shape), np.dtype(dtype))

    def _ready(self) -> tuple[ReadingProcess, int]:
        """The process and the number of rows it will send, once what it announced is found possible."""
        assert self._process is not None, "select() comes first"
        arrays = list(self._arrays.values())
        lengths = {array.shape[0] if array.shape else 0 for array in arrays}
        row_bytes = sum(array.row_bytes for array in arrays)
        rows = min(lengths)
        if len(lengths) != 1 or rows < 1 or row_bytes < 1:
            raise self._suspect(f"arrays of {sorted(lengths)} rows")
        if row_bytes > _MAX_ROW_BYTES:
            raise DataError(f"{self.name}: a row takes {row_bytes:,} bytes, more than the limit of {_MAX_ROW_BYTES:,}")
        if any(math.prod(a.shape) * a.dtype.itemsize > _unpacked(self.size) for a in arrays if a.dtype.kind != "S"):
            raise DataError(
                f"{self.name}: a file of {self.size:,} bytes cannot hold {rows:,} rows of {row_bytes:,} bytes, however "
                "well it is compressed; it is damaged, or made to do harm"
            )
        if not (0 < self._step <= MAX_BLOCK_ROWS and (self._step == 1 or self._step * row_bytes <= BLOCK_BYTES)):
            raise self._suspect(f"blocks of {self._step} rows")
        return self._process, rows

    def _suspect(self, what: str) -> DataError:
        return DataError(f"{self.name}: the process that reads it announced {what}; suspect the file")


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise StorageError(f"could not open {path}: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is not a regular file; expected HDF5, .npz, .npy or safetensors")
    return fd


def _format_of(fd: int, size: int, name: str) -> str:
    """By the first bytes; names of files promise nothing."""
    head = os.pread(fd, 16, 0)
    offset = 0
    while offset < size:  # HDF5 may begin behind a block of its user's: at 512, 1024, 2048 ...
        if os.pread(fd, 8, offset) == b"\x89HDF\r\n\x1a\n":
            return "HDF5"
        offset = 2 * offset or 512
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "npz"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return "safetensors"
    is_pickle = head[:1] == b"\x80" and head[1:2] < b"\x06"
    hint = "; it looks like a pickle, and kdcache never unpickles" if is_pickle else ""
    raise DataError(f"{name} is not HDF5, .npz, .npy or safetensors by its first bytes{hint}")


def _is_sent(dtype: str) -> bool:
    text = _TEXT.fullmatch(dtype)
    return _NUMBERS.fullmatch(dtype) is not None if text is None else int(text[1]) <= MAX_ID_BYTES


def _unpacked(size: int) -> int:
    return _MAX_UNPACKED * size + (1 << 20)
