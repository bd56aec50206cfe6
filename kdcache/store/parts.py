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
from kdcache.format.factored import Factored
from kdcache.format.hdf5_parser import parse
from kdcache.format.headers import FileHeader, parse_file_header
from kdcache.format.manifest import ClassList, ShardRecord
from kdcache.format.schema import CRC_ARRAY, RowSchema
from kdcache.store import posix
from kdcache.store.folder import MANIFEST, PLAN, SHARDS, VERSIONS, read_manifest
from kdcache.store.head import StoredHead


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

    def between(self, start: int, stop: int) -> Part:
        """Its rows of samples [start, stop), perhaps none."""
        first, last = max(start, self.start), min(stop, self.start + self.rows)
        if (first, last) == (self.start, self.start + self.rows):
            return self
        rows = max(0, last - first)
        return replace(self, start=first, rows=rows, arrays=slice_rows(self.arrays, first - self.start, rows))


@dataclass(frozen=True)
class Catalog:
    """What an opened cache consists of, before any row is read.

    `absent_views` are those of the dump of which the folder holds no shard at all: it is a smaller cache of the rest.
    `extents` are the numbers of samples at which a folder was finished before it grew, and its own; else empty.
    `head` is the last layer that factored rows need; nothing of it is read here.
    """

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
    shard_rows: int | None = None
    absent_views: tuple[int, ...] = ()
    extents: tuple[int, ...] = ()
    head: StoredHead | None = None

    def with_views(self, views: tuple[int, ...]) -> Catalog:
        """The same with some of the views; those left out are not said to be absent."""
        parts = tuple(part for part in self.parts if part.view in views)
        return replace(self, views=views, parts=parts, shards=tuple(r for r in self.shards if r.view in views))


def read_catalog(path: Path) -> Catalog:
    """The catalog of a folder or a one-file cache.

    Raises:
        IncompleteCacheError: nothing there, or a dump without a manifest.
        CorruptCacheError: a manifest or header that our writer did not write.
    """
    with posix.translated("open", path):
        real = Path(os.path.realpath(path))  # a link to a cache is fine, a link inside of one is not
        kind = posix.kind_of(real)
        if kind is None:
            os.stat(real.parent)  # tells a missing file from a folder that may not be searched
    if kind == "folder":
        return _folder(real, path)
    if kind is not None:
        return _file(real)
    if posix.is_folder(Path(f"{path}.parts")):
        raise IncompleteCacheError(f"{path} is not finished: run the same precompute command again to go on")
    raise IncompleteCacheError(
        f"{path} does not exist; check the path, or make a cache with `kdcache precompute --out {path.name}`"
    )


def part_of(record: ShardRecord, folder: Path) -> Part:
    """The part that a shard of a folder is."""
    path = folder / SHARDS / record.file
    return Part(path, record.view, record.start, record.rows, record.size, record.header_blake2b, record.arrays)


def open_part(part: Part) -> int:
    """A descriptor of the part's file, after its size and everything outside its payload were checked.

    Raises:
        IncompleteCacheError: the file is missing.
        CorruptCacheError: its size or its header is not what the manifest says.
    """
    fd, size = posix.open_regular(part.path, inside=part.header_blake2b is not None)
    try:
        if size != part.size:
            raise CorruptCacheError(
                f"{part.path}: {size} bytes, the manifest says {part.size}; it is truncated, grown or another file"
            )
        if part.header_blake2b is not None:
            refuse_hole(fd, part.path, part.arrays)
            found = header_digest(_reader(fd, part.path), part.arrays, size)
            if found != part.header_blake2b:
                raise CorruptCacheError(
                    f"{part.path}: its header is not the one the manifest lists; fetch or dump this shard again"
                )
    except BaseException:
        posix.close_reader(fd)
        raise
    return fd


def refuse_hole(fd: int, path: Path, arrays: dict[str, ArrayLayout]) -> None:
    """Refuses a sparse file of any size, all of whose row checksums would be hashed before one is found wrong.

    Whoever makes it pays nothing for its terabytes. A hole has at least 512 bytes: 128 checksums that are all zero.

    Raises:
        CorruptCacheError: row checksums that take no place on the disk.
    """
    layout = arrays[CRC_ARRAY]
    if posix.has_hole(fd, layout.offset, layout.stop):
        raise CorruptCacheError(f"{path}: row checksums were never written (a hole in a sparse file); fetch it again")


def _next_step(folder: Path, given: Path) -> str:
    """What a folder without a manifest is instead, and what to do."""
    if posix.exists(folder / VERSIONS):
        here = sorted(name for name in posix.names_in(folder) if posix.exists(folder / name / MANIFEST))
        newest = f"the current one is {given / here[-1]}" if here else "none of them is complete"
        return f"it is a folder of several versions of a cache, {newest}"
    return (
        "it is not a kdcache folder, or not all of it is there; give the path that `kdcache precompute --out` made, or "
        "fetch it again"
    )


def _folder(path: Path, given: Path) -> Catalog:
    if not posix.exists(path / MANIFEST):
        if posix.exists(path / PLAN):
            raise IncompleteCacheError(
                f"{path} is a dump that is not finished (no {MANIFEST}): run the same precompute command again to go on"
            )
        raise IncompleteCacheError(f"{path} holds no {MANIFEST}: {_next_step(path, given)}")
    manifest = read_manifest(path)
    parts = tuple(part_of(record, path) for record in manifest.shards)
    ranges = [r.ids for r in manifest.shards]
    first = ranges[0][0] if ranges[0] else None
    affine = first is not None and all(
        ids is not None and ids[0] == first + r.start for ids, r in zip(ranges, manifest.shards, strict=True)
    )
    here = _views_here(parts, manifest.views)
    shards = tuple(r for r in manifest.shards if r.view in here)
    return Catalog(
        schema=manifest.schema,
        classes=manifest.classes,
        samples=manifest.samples,
        views=here,
        first_id=first if affine else None,
        provenance=manifest.provenance,
        root=manifest.root,
        parts=tuple(part for part in parts if part.view in here),
        shards=shards,
        size_bytes=sum(r.size for r in shards) + (manifest.head.size if manifest.head else 0),
        created=manifest.created,
        shard_rows=manifest.shard_rows,
        absent_views=tuple(view for view in manifest.views if view not in here),
        extents=manifest.extents,
        head=None
        if manifest.head is None or not isinstance(manifest.schema.encoding, Factored)
        else StoredHead.of(path, manifest.head, manifest.schema.encoding),
    )


def _views_here(parts: tuple[Part, ...], views: tuple[int, ...]) -> tuple[int, ...]:
    """The views of which a shard is there; all of them where that is none, since such a cache is not a smaller one.

    One look at the first shard of each view, where nothing is missing.
    """
    if len(views) == 1:
        return views
    here = tuple(view for view in views if any(_is_name(p.path) for p in parts if p.view == view))
    return here or views


def _is_name(path: Path) -> bool:
    """Whether the name is taken, if only by a link to nowhere: that is damage, and no shard that was not fetched."""
    return posix.exists(path) or posix.is_link(path)


def _file(path: Path) -> Catalog:
    fd, size = posix.open_regular(path)
    try:
        read = _reader(fd, path)
        parsed = parse(read, size, name=str(path))
        header = parse_file_header(parsed.attribute, rows=parsed.rows, where=str(path))
        header.schema.check_arrays(parsed.arrays, parsed.rows, size, where=str(path))
        refuse_hole(fd, path, parsed.arrays)
        if rows_digest(read, parsed.arrays) != header.rows_blake2b:
            raise CorruptCacheError(
                f"{path}: its ids or row checksums are not those of its header; fetch or dump it again"
            )
        root = header_digest(read, parsed.arrays, size)
    finally:
        posix.close_reader(fd)
    parts = tuple(
        Part(
            path, view, 0, header.samples, size, None, slice_rows(parsed.arrays, slot * header.samples, header.samples)
        )
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


def slice_rows(arrays: dict[str, ArrayLayout], start: int, rows: int) -> dict[str, ArrayLayout]:
    """Where rows [start, start + rows) of some arrays lie."""
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
