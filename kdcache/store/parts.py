"""The parts of a cache: runs of rows of one view that lie together in one file.

A folder has one part a shard, a one-file cache one part a view. From here on the reader does not care
which of the two it reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kdcache.errors import CorruptCacheError, IncompleteCacheError, UsageError
from kdcache.format.arrays import ArrayLayout
from kdcache.format.checksums import header_digest, rows_digest
from kdcache.format.hdf5_parser import parse
from kdcache.format.headers import FileHeader, parse_file_header
from kdcache.format.manifest import ClassList, ShardRecord
from kdcache.format.schema import RowSchema
from kdcache.store import posix
from kdcache.store.folder import MANIFEST, PLAN, SHARDS, read_manifest


@dataclass(frozen=True)
class Part:
    """Samples [start, start + rows) of `view`, stored in `path` at the offsets of `arrays`.

    `header_blake2b` is what the file's bytes outside the payload must hash to; None where that was
    checked when the cache was opened.
    """

    path: Path
    view: int
    start: int
    rows: int
    size: int
    header_blake2b: str | None
    arrays: dict[str, ArrayLayout]


@dataclass(frozen=True)
class Catalog:
    """What an opened cache consists of, before any row is read."""

    schema: RowSchema
    classes: ClassList
    samples: int
    views: tuple[int, ...]
    first_id: int | None
    provenance: dict[str, Any]
    root: str
    parts: tuple[Part, ...]
    shards: tuple[ShardRecord, ...]
    size_bytes: int
    created: str | None = None
    header: FileHeader | None = None


def read_catalog(path: Path) -> Catalog:
    """The catalog of a folder or a one-file cache.

    Raises:
        IncompleteCacheError: nothing there, or a dump without a manifest.
        CorruptCacheError: a manifest or header that our writer did not write.
    """
    with posix.translated("open", path):
        real = Path(os.path.realpath(path))  # a link to a cache is fine, a link inside of one is not
        is_folder, is_there = os.path.isdir(real), os.path.lexists(real)
        if not is_there:
            os.stat(real.parent)  # tells a missing file from a folder that may not be searched
    if is_folder:
        return _folder(real)
    if is_there:
        return _file(real)
    if Path(f"{path}.parts").is_dir():
        raise IncompleteCacheError(f"{path} is not finished: run the same precompute command again to go on")
    raise IncompleteCacheError(
        f"{path} does not exist; check the path, or make a cache with `kdcache precompute --out {path.name}`"
    )


def open_part(part: Part) -> int:
    """A descriptor of the part's file, after its size and everything outside its payload were checked.

    Raises:
        IncompleteCacheError: the file is missing.
        CorruptCacheError: its size or its header is not what the manifest says.
    """
    fd, size = posix.open_regular(part.path)
    try:
        if size != part.size:
            raise CorruptCacheError(
                f"{part.path}: {size} bytes, the manifest says {part.size}; it is truncated, grown or another file"
            )
        if part.header_blake2b is not None:
            found = header_digest(_reader(fd, part.path), part.arrays, size)
            if found != part.header_blake2b:
                raise CorruptCacheError(
                    f"{part.path}: its header is not the one the manifest lists; fetch or dump this shard again"
                )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _folder(path: Path) -> Catalog:
    if not (path / MANIFEST).exists():
        if (path / PLAN).exists():
            raise IncompleteCacheError(
                f"{path} is a dump that is not finished (no {MANIFEST}): run the same precompute command again to go on"
            )
        raise IncompleteCacheError(f"{path} holds no {MANIFEST}: it is not a kdcache folder, or not all of it is there")
    manifest = read_manifest(path)
    parts = tuple(
        Part(path / SHARDS / r.file, r.view, r.start, r.rows, r.size, r.header_blake2b, r.arrays)
        for r in manifest.shards
    )
    ranges = [r.ids for r in manifest.shards]
    first = ranges[0][0] if ranges[0] else None
    affine = first is not None and all(
        ids is not None and ids[0] == first + r.start for ids, r in zip(ranges, manifest.shards, strict=True)
    )
    return Catalog(
        schema=manifest.schema,
        classes=manifest.classes,
        samples=manifest.samples,
        views=manifest.views,
        first_id=first if affine else None,
        provenance=manifest.provenance,
        root=manifest.root,
        parts=parts,
        shards=manifest.shards,
        size_bytes=sum(r.size for r in manifest.shards),
        created=manifest.created,
    )


def _file(path: Path) -> Catalog:
    fd, size = posix.open_regular(path)
    try:
        read = _reader(fd, path)
        parsed = parse(read, size, name=str(path))
        header = parse_file_header(parsed.attribute, rows=parsed.rows, where=str(path))
        header.schema.check_arrays(parsed.arrays, parsed.rows, size, where=str(path))
        if rows_digest(read, parsed.arrays) != header.rows_blake2b:
            raise CorruptCacheError(
                f"{path}: its ids or row checksums are not those of its header; fetch or dump it again"
            )
        root = header_digest(read, parsed.arrays, size)
    finally:
        os.close(fd)
    parts = tuple(
        Part(path, view, 0, header.samples, size, None, _slice(parsed.arrays, slot * header.samples, header.samples))
        for slot, view in enumerate(header.views)
    )
    return Catalog(
        schema=header.schema,
        classes=header.classes,
        samples=header.samples,
        views=header.views,
        first_id=header.ids[0] if header.ids else None,
        provenance=header.provenance,
        root=root,
        parts=parts,
        shards=(),
        size_bytes=size,
        header=header,
    )


def _slice(arrays: dict[str, ArrayLayout], start: int, rows: int) -> dict[str, ArrayLayout]:
    return {
        name: replace(a, offset=a.offset + start * a.spec.row_bytes, shape=a.spec.shape(rows))
        for name, a in arrays.items()
    }


def _reader(fd: int, path: Path) -> Callable[[int, int], bytes]:
    return partial(_read, fd, path)


def _read(fd: int, path: Path, offset: int, length: int) -> bytes:
    return posix.read_exactly(fd, offset, length, path)


def check_access(access: str) -> None:
    """Refuses an unknown way of reading.

    Raises:
        UsageError: neither `mmap` nor `pread`.
    """
    if access not in ("mmap", "pread"):
        raise UsageError(f"access is {access!r}; choose mmap or pread")
