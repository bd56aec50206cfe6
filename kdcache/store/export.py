"""`kdcache.export`: the rows of a cache for tools that know nothing of it, as float32 raw logits.

A cache is already readable by any HDF5 tool; an export undoes the encoding as well. `h5` goes through h5py and
may be compressed, for archives; it is not a cache and cannot be opened as one. libhdf5 does not write to the
disk here either (on a full one it crashes in `close()`, measured): it writes to a file object that takes
everything, remembers the first error, and lets us raise it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from kdcache.errors import UsageError
from kdcache.format.identity import canonical_json
from kdcache.store import posix
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.store.rows import TeacherRows

_BLOCK_BYTES = 16 << 20


def export(
    path: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    compress: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `logits` (N, C, ...) float32, `sample_id`, `view`, `label` of all rows, decoded.

    Args:
        path: a cache.
        out: the file to make.
        format: `npz` or `h5`; by default from the name of `out`.
        compress: `gzip`, or None.
        overwrite: replace `out` if it exists.

    Returns:
        The path of the file.

    Raises:
        UsageError: an unknown format, or `out` exists.
        CorruptCacheError: a damaged row.
        StorageError: the disk refused; no part of `out` is left.
    """
    target = Path(out)
    kind = format or target.suffix.removeprefix(".")
    if kind not in ("npz", "h5"):
        raise UsageError(f"export format {kind!r} is not known; choose npz or h5, or name the file accordingly")
    if compress not in (None, "gzip"):
        raise UsageError(f"compression {compress!r} is not known; choose gzip or leave it out")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; choose another name or pass --overwrite")
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}-{os.urandom(4).hex()}")
    with open_cache(path) as cache, posix.translated("write", target):
        posix.make_folder(target.parent)
        fd = posix.create(temporary)
        try:
            if kind == "npz":
                with os.fdopen(fd, "wb", closefd=False) as file:
                    _write_npz(cache, file, compressed=compress is not None)
            else:
                _write_h5(cache, _ForgivingFile(fd), compress)
            posix.fsync(fd)
            posix.rename(temporary, target)
            posix.fsync_folder(target.parent)
        finally:
            os.close(fd)
            posix.unlink(temporary)
    return target


def _blocks(cache: Cache) -> Iterator[tuple[int, TeacherRows]]:
    step = max(1, _BLOCK_BYTES // (4 * int(np.prod(cache.encoding.row_shape))))
    for start in range(0, len(cache), step):
        yield start, cache.gather(np.arange(start, min(start + step, len(cache))))


def _columns(cache: Cache) -> dict[str, tuple[Any, tuple[int, ...]]]:
    columns: dict[str, tuple[Any, tuple[int, ...]]] = {
        "logits": ("<f4", cache.shape),
        "sample_id": (cache.catalog.schema.id_dtype, (len(cache),)),
        "view": ("<u2", (len(cache),)),
    }
    if cache.has_labels:
        columns["label"] = ("<i8", (len(cache),))
    return columns


def _column(rows: TeacherRows, name: str) -> np.ndarray:
    values: np.ndarray = rows.dense() if name == "logits" else getattr(rows, name)
    return values


def _write_npz(cache: Cache, file: IO[bytes], *, compressed: bool) -> None:
    """One member an array, streamed: an .npy header, then the rows block by block."""
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method, allowZip64=True) as archive:
        for name, (dtype, shape) in _columns(cache).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for _, rows in _blocks(cache):
                    member.write(np.ascontiguousarray(_column(rows, name), dtype).tobytes())


def _write_h5(cache: Cache, sink: _ForgivingFile, compress: str | None) -> None:
    with h5py.File(sink, "w") as file:
        for name, (dtype, shape) in _columns(cache).items():
            chunks = (min(256, shape[0]), *shape[1:])
            data = file.create_dataset(name, shape, dtype, chunks=chunks, compression=compress)
            for start, rows in _blocks(cache):
                data[start : start + len(rows)] = _column(rows, name)
                sink.raise_error()
        file.attrs["provenance"] = np.bytes_(canonical_json({**cache.provenance, "root": cache.root}))
    sink.raise_error()


class _ForgivingFile:
    """What libhdf5 takes for a file. A failed write seems to succeed; `raise_error` raises it afterwards."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0
        self._size = 0
        self._error: OSError | None = None

    def raise_error(self) -> None:
        """Raises the first OSError of any write."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        raw = memoryview(data).cast("B")
        self._attempt(posix.pwrite_all, raw, self._position)
        self._position += len(raw)
        self._size = max(self._size, self._position)
        return len(raw)

    def readinto(self, buffer: Any) -> int:
        raw = memoryview(buffer).cast("B")
        data = os.pread(self._fd, len(raw), self._position)
        raw[: len(data)] = data
        raw[len(data) :] = bytes(len(raw) - len(data))
        self._position += len(raw)
        return len(raw)

    def read(self, size: int = -1) -> bytes:
        buffer = bytearray(self._size - self._position if size < 0 else size)
        self.readinto(buffer)
        return bytes(buffer)

    def truncate(self, size: int | None = None) -> int:
        self._size = self._position if size is None else size
        self._attempt(posix.truncate, self._size)
        return self._size

    def flush(self) -> None:
        """Nothing is held back; the caller syncs."""

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._error is None:
            try:
                call(self._fd, *arguments)
            except OSError as error:
                self._error = error
