"""Writes rows of one cache into another: one file, or a folder of shards; as they are, or encoded anew on the way.

What `merge` and `convert` share. Every row is checked before it is written, and a folder whose making was killed is
finished by the same call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kdcache.errors import CorruptCacheError, KDCacheError, MismatchError, UsageError
from kdcache.format.headers import NO_ONE_FILE, FileHeader
from kdcache.format.schema import CRC_ARRAY
from kdcache.store import posix
from kdcache.store.dump import DumpFolder, open_dump
from kdcache.store.folder import MANIFEST, read_manifest
from kdcache.store.head_writer import copied_head, place_head
from kdcache.store.incoming import consecutive
from kdcache.store.parts import Catalog
from kdcache.store.plan import Plan, default_shard_rows, plan_of_manifest
from kdcache.store.removal import remove_dump, remove_empty
from kdcache.store.scan import scan
from kdcache.store.shards import ContainerWriter, remove_temporaries

_FILE_NAMES = frozenset({".hdf5", ".hdf", ".npz", ".npy", ".safetensors"})  # meant for one file, surely

Block = Mapping[str, np.ndarray]
Recode = Callable[[Block], tuple[dict[str, np.ndarray], int]]


@dataclass(frozen=True)
class Rewriting:
    """What is written.

    Attributes:
        source: the cache that is read.
        result: what is to be said of the new one: schema, provenance, extents, rows of a shard, head.
        views: those that are written, ascending.
        recode: makes the encoding's new arrays from a block of stored ones, and counts what was clamped; None leaves
            them.
    """

    source: Catalog
    result: Catalog
    views: tuple[int, ...]
    recode: Recode | None = None


def chosen_views(catalog: Catalog, name: str | Path, views: Sequence[int] | None) -> tuple[int, ...]:
    """The views to write, all by default.

    Raises:
        MismatchError: one that the cache does not have.
    """
    chosen = catalog.views if views is None else tuple(sorted(set(views)))
    unknown = sorted(set(chosen) - set(catalog.views))
    if unknown or not chosen:
        absent = f" (of its dump, the views {list(catalog.absent_views)} are not here)" if catalog.absent_views else ""
        raise MismatchError(f"{name} has the views {list(catalog.views)}{absent}, not {unknown}")
    return chosen


def check_target(source: str | Path, target: Path, *, overwrite: bool) -> None:
    """Refuses a target before the source is read.

    Raises:
        UsageError: it exists, is the source, or is named as a file of another kind.
    """
    if target.suffix in _FILE_NAMES:
        raise UsageError(f"{target} must end in .h5 to become one file; any other name becomes a folder")
    remove_temporaries(target.parent, target.name, of_the_dead=True)
    if target.suffix == ".h5":
        if posix.exists(target) and not overwrite:
            raise UsageError(f"{target} exists; choose another name or pass --overwrite")
    elif os.path.realpath(target) == os.path.realpath(source):
        raise UsageError(f"{target} is the cache that is read; choose another name")


def write_cache(
    job: Rewriting,
    source: str | Path,
    target: Path,
    *,
    overwrite: bool,
    progress: Callable[[int], None] | None,
) -> str:
    """Writes the rows; returns the root hash of the new cache.

    Raises:
        UsageError: rows that one file cannot hold; the target appeared meanwhile.
        CorruptCacheError: a damaged row in the source; nothing is written under the target.
        IncompleteCacheError: shards of these views are missing in the source.
        StorageError: the disk refused.
    """
    if target.suffix != ".h5":
        return _write_folder(job, target, overwrite=overwrite, progress=progress)
    if job.result.head is not None:
        raise UsageError(f"{source} cannot become {target}: {NO_ONE_FILE}")
    return _write_file(job, target, overwrite=overwrite, progress=progress)


def _write_file(job: Rewriting, target: Path, *, overwrite: bool, progress: Callable[[int], None] | None) -> str:
    catalog, views = job.result, job.views
    ids = None if catalog.first_id is None else (catalog.first_id, catalog.first_id + catalog.samples - 1)
    header = FileHeader(catalog.schema, catalog.classes, catalog.samples, views, ids, catalog.provenance)
    with posix.translated("create", target.parent):
        posix.make_folder(target.parent)
    writer = ContainerWriter(target, catalog.schema, catalog.samples * len(views), header.dump(), hash_file=False)
    try:
        _copy(job, writer, views, None, progress)
        root = writer.finish_with_digests(
            lambda payload, rows: replace(header, payload_sha256=payload, rows_blake2b=rows).dump()
        )
        if not writer.publish(replace=overwrite):
            raise UsageError(f"{target} appeared while it was written; choose another name or pass --overwrite")
    except BaseException:
        writer.abandon()
        raise
    return root


def _write_folder(job: Rewriting, target: Path, *, overwrite: bool, progress: Callable[[int], None] | None) -> str:
    catalog = job.result
    if catalog.head is not None:
        catalog.head.keep()  # refused before anything is written, whose values nobody looks at who copies bytes
    if overwrite:
        remove_dump(target)
    if catalog.classes.names is None:  # a header has room for the hash of a long list alone, a manifest needs the names
        catalog = replace(catalog, classes=replace(catalog.classes, sha256=None))
    rows = catalog.shard_rows or default_shard_rows(catalog.schema.row_bytes)
    plan = Plan(
        schema=catalog.schema,
        classes=catalog.classes,
        shard_rows=rows,
        samples=catalog.samples,
        provenance=catalog.provenance,
        views=job.views,
        extents=catalog.extents,
        head=None if catalog.head is None else catalog.head.record,
    )
    was_there = posix.exists(target / MANIFEST)
    exists = f"{target} exists; choose another name or pass --overwrite"
    if was_there and not _is_finished_dump_of(plan, target):
        raise UsageError(exists)
    dump = open_dump(target, plan)  # clears away what a call left that was killed when it had written the manifest
    if was_there and dump.finished:
        dump.leave()
        raise UsageError(exists)
    try:
        dump.own()
        if catalog.head is not None:
            place_head(dump, copied_head(catalog.head))
        for number in range(plan.shard_count):
            _write_shard(job, dump, number, progress)
        manifest = dump.finish(dump.all_records() or [], samples=catalog.samples)
    except BaseException as error:
        dump.disown()
        dump.leave()
        if not isinstance(error, Exception):
            raise  # Ctrl-C: the same call goes on with the shards that are there
        with contextlib.suppress(KDCacheError):  # in other hands
            if not posix.exists(target / MANIFEST):  # what is finished stays, and is whole
                remove_dump(target)
                remove_empty(target)
        raise
    dump.disown()
    dump.leave()
    if manifest is None:
        raise CorruptCacheError(f"{target} was removed while it was written")
    return manifest.root


def _is_finished_dump_of(plan: Plan, folder: Path) -> bool:
    try:
        return plan_of_manifest(read_manifest(folder), samples_known=True).to_json() == plan.to_json()
    except KDCacheError:
        return False


def _write_shard(job: Rewriting, dump: DumpFolder, number: int, progress: Callable[[int], None] | None) -> None:
    """One shard of the new folder, unless a merge that was killed has left it."""
    view, start, stop = dump.plan.span(number)
    index = number % dump.plan.shards_per_view
    if not dump.claim(view, index):
        return
    try:
        writer = dump.container(view, index, start, stop)
        try:
            _copy(job, writer, (view,), (start, stop), progress, clamped=_clamped(job, view, start, stop))
            record = writer.record(view=view, start=start, ids=consecutive(writer.read_array("sample_id")))
            dump.commit(writer, record, index)
        except BaseException:
            writer.abandon()
            raise
    finally:
        dump.release(view, index)


def _clamped(job: Rewriting, view: int, start: int, stop: int) -> int:
    """Values of these samples that were clamped before: of a shard as it was, else of all the view in its first."""
    if job.result.shard_rows == job.source.shard_rows and job.result.extents == job.source.extents:
        return sum(r.clamped for r in job.source.shards if (r.view, r.start, r.stop) == (view, start, stop))
    return sum(r.clamped for r in job.source.shards if r.view == view) if start == 0 else 0


def _copy(
    job: Rewriting,
    writer: ContainerWriter,
    views: tuple[int, ...],
    samples: tuple[int, int] | None,
    progress: Callable[[int], None] | None,
    clamped: int = 0,
) -> None:
    for view, positions, block in scan(job.source, views=views, samples=samples):
        rows = {name: array for name, array in block.items() if name not in ("view", CRC_ARRAY)}
        if job.recode is not None:
            encoded, more = job.recode(block)
            stored = {spec.name for spec in job.source.schema.encoding.specs}
            rows = {**{name: array for name, array in rows.items() if name not in stored}, **encoded}
            clamped += more
        writer.append(rows, view=view, positions=positions, clamped=clamped)
        clamped = 0
        if progress is not None:
            progress(len(positions))
