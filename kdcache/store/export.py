"""`kdcache.export`: the rows of a cache for tools that know nothing of it, as float32 raw logits.

A cache is already readable by any HDF5 tool; an export undoes the encoding as well. `h5` goes through h5py and
may be compressed, for archives; it is not a cache and cannot be opened as one. libhdf5 does not write to the
disk here either (on a full one it crashes in `close()`, measured): it writes to a file object that takes
everything, remembers the first error, and lets us raise it. zipfile gets the same one: it writes in `close` too.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import h5py
import numpy as np

from kdcache.errors import KDCacheError, UsageError
from kdcache.format.identity import canonical_json
from kdcache.store import posix
from kdcache.store.parts import Catalog, read_catalog
from kdcache.store.scan import scan
from kdcache.store.shards import remove_temporaries

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

    Of top-k rows, which do not have all logits, the arrays are written as they are stored (see docs/format.md).

    Args:
        path: a cache.
        out: the file to make.
        format: `npz` or `h5`; by default from the name of `out`.
        compress: `gzip`, or None.
        overwrite: replace `out` if it exists.

    Returns:
        The path of the file.

    Raises:
        UsageError: an unknown format, or `out` exists or is the cache.
        CorruptCacheError: a damaged row.
        StorageError: the disk refused; no part of `out` is left.
    """
    target = Path(out)
    kind = format or target.suffix.removeprefix(".")
    if kind not in ("npz", "h5"):
        raise UsageError(f"export format {kind!r} is not known; choose npz or h5, or name the file accordingly")
    if compress not in (None, "gzip"):
        raise UsageError(f"compression {compress!r} is not known; choose gzip or leave it out")
    if os.path.realpath(target) == os.path.realpath(path):
        raise UsageError(f"{target} is the cache that is read; choose another name")
    remove_temporaries(target.parent, target.name, of_the_dead=True)
    if posix.exists(target) and not overwrite:
        raise UsageError(f"{target} exists; choose another name or pass --overwrite")
    catalog = read_catalog(Path(path))
    if catalog.head is not None:
        catalog.head.keep()
    with posix.translated("write", target):
        posix.make_folder(target.parent)
        _write(catalog, target, kind, compress)
    return target


def _write(catalog: Catalog, target: Path, kind: str, compress: str | None) -> None:
    temporary = posix.new_temporary(target)
    try:
        fd = posix.create(temporary)
        try:
            sink = _ForgivingFile(fd, temporary)
            if kind == "npz":
                _write_npz(catalog, sink, compressed=compress is not None)
            else:
                _write_h5(catalog, sink, compress)
            sink.raise_error()
            posix.fsync(fd)
        finally:
            os.close(fd)
        posix.rename(temporary, target)
        posix.fsync_folder(target.parent)
    except BaseException:
        posix.drop(temporary)
        raise


def _columns(catalog: Catalog) -> dict[str, tuple[Any, tuple[int, ...]]]:
    rows = catalog.samples * len(catalog.views)
    encoding = catalog.schema.encoding
    logits = {"logits": ("<f4", (rows, *encoding.row_shape))}
    kept = {spec.name: (spec.dtype, spec.shape(rows)) for spec in encoding.specs}
    columns: dict[str, tuple[Any, tuple[int, ...]]] = {
        **(logits if encoding.has_all_logits else kept),
        "sample_id": (catalog.schema.id_dtype, (rows,)),
        "view": ("<u2", (rows,)),
    }
    labels = {"label": "<i8", "label_b": "<i8"} if not encoding.has_all_logits else {"label": "<i8"}
    stored = {spec.name for spec in catalog.schema.specs}
    return {**columns, **{name: (dtype, (rows,)) for name, dtype in labels.items() if name in stored}}


def _column(catalog: Catalog, name: str) -> Iterator[np.ndarray]:
    """The values of one column, block by block in the order of the rows."""
    for _, _, block in scan(catalog, block_bytes=_BLOCK_BYTES):
        is_decoded = name == "logits" and catalog.schema.encoding.has_all_logits
        yield catalog.schema.encoding.decode(block) if is_decoded else block[name]


def _write_npz(catalog: Catalog, sink: _ForgivingFile, *, compressed: bool) -> None:
    """One member an array, streamed: an .npy header, then the rows block by block."""
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(cast(IO[bytes], sink), "w", method, allowZip64=True) as archive:
        for name, (dtype, shape) in _columns(catalog).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for values in _column(catalog, name):
                    member.write(np.ascontiguousarray(values, dtype).tobytes())
                    sink.raise_error()


def _write_h5(catalog: Catalog, sink: _ForgivingFile, compress: str | None) -> None:
    with h5py.File(sink, "w") as file:
        for name, (dtype, shape) in _columns(catalog).items():
            chunks = (min(256, shape[0]), *shape[1:])
            data = file.create_dataset(name, shape, dtype, chunks=chunks, compression=compress)
            start = 0
            for values in _column(catalog, name):
                data[start : start + len(values)] = values
                start += len(values)
                sink.raise_error()
        file.attrs["provenance"] = np.bytes_(canonical_json({**catalog.provenance, "root": catalog.root}))


class _ForgivingFile:
    """A file for libhdf5 and zipfile. A failed call seems to succeed; `raise_error` raises it afterwards."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._position = 0
        self._size = 0
        self._error: OSError | KDCacheError | None = None

    def raise_error(self) -> None:
        """Raises the first error of any call."""
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
        there = min(len(raw), max(0, self._size - self._position))
        data = bytes(len(raw))
        try:
            data = posix.read_exactly(self._fd, self._position, there, self._path) + bytes(len(raw) - there)
        except KDCacheError as error:
            self._error = self._error or error
        raw[:] = data
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
