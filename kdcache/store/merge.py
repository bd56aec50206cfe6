"""`kdcache.merge`: a cache as one file, or fewer of its views as a smaller cache; rows are checked on the way.

A one-file cache reads fastest and travels as one thing; a folder is easier to produce, extend and pull in
part. The rows, their checksums and their order are the same in both.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kdcache.errors import CorruptCacheError, KDCacheError, MismatchError, UsageError
from kdcache.format.headers import NO_ONE_FILE, FileHeader
from kdcache.format.schema import CRC_ARRAY, MAX_VIEWS
from kdcache.store import posix
from kdcache.store.dump import DumpFolder, open_dump
from kdcache.store.folder import MANIFEST
from kdcache.store.head_writer import copied_head, place_head
from kdcache.store.incoming import consecutive
from kdcache.store.parts import Catalog, read_catalog
from kdcache.store.plan import Plan, default_shard_rows
from kdcache.store.removal import remove_dump, remove_empty
from kdcache.store.scan import scan
from kdcache.store.shards import ContainerWriter, remove_temporaries

_FILE_NAMES = frozenset({".hdf5", ".hdf", ".npz", ".npy", ".safetensors"})  # meant for one file, surely
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def merge(
    source: str | Path,
    out: str | Path,
    *,
    views: Sequence[int] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Writes a cache of the same rows, or of some views of them: one file, or a folder of shards.

    Args:
        source: a finished cache.
        out: the file to make, if its name ends in `.h5`, else the folder. The shards of a folder are those of the
            source to the byte; a merge that was killed is finished by the same call.
        views: which views to take; all by default.
        overwrite: replace `out` if it exists.
        progress: called with the number of rows after each block.

    Returns:
        The root hash of the new cache.

    Raises:
        UsageError: `out` exists, is the source, or is named as a file of another kind; factored rows as one file.
        MismatchError: a view that the source does not have.
        CorruptCacheError: a damaged row in the source; nothing is written under `out`.
        IncompleteCacheError: shards of these views are missing in the source.
        StorageError: the disk refused.
    """
    target = Path(out)
    one_file = target.suffix == ".h5"
    if target.suffix in _FILE_NAMES:
        raise UsageError(f"{target} must end in .h5 to become one file; any other name becomes a folder")
    remove_temporaries(target.parent, target.name, of_the_dead=True)
    if one_file and posix.exists(target) and not overwrite:
        raise UsageError(f"{target} exists; choose another name or pass --overwrite")
    catalog = read_catalog(Path(source))
    if one_file and catalog.head is not None:
        raise UsageError(f"{source} cannot become {target}: {NO_ONE_FILE}")
    chosen = catalog.views if views is None else tuple(sorted(set(views)))
    unknown = sorted(set(chosen) - set(catalog.views))
    if unknown or not chosen:
        absent = f" (of its dump, the views {list(catalog.absent_views)} are not here)" if catalog.absent_views else ""
        raise MismatchError(f"{source} has the views {list(catalog.views)}{absent}, not {unknown}")
    if one_file:
        return _write_file(catalog, target, chosen, overwrite=overwrite, progress=progress)
    if os.path.realpath(target) == os.path.realpath(source):
        raise UsageError(f"{target} is the cache that is read; choose another name")
    return _write_folder(catalog, target, chosen, overwrite=overwrite, progress=progress)


def parse_views(text: str) -> tuple[int, ...]:
    """The views that a text such as `0-3` or `0,2,5` names.

    Raises:
        UsageError: another text, or a number that no cache has.

    >>> parse_views("0-2,5")
    (0, 1, 2, 5)
    """
    found: set[int] = set()
    for piece in text.split(","):
        match = _RANGE.fullmatch(piece.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MAX_VIEWS:
            raise UsageError(
                f"--views is {text!r:.50}; expected numbers below {MAX_VIEWS} and ranges of them, such as 0-3 or 0,2,5"
            )
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _write_file(
    catalog: Catalog, target: Path, views: tuple[int, ...], *, overwrite: bool, progress: Callable[[int], None] | None
) -> str:
    ids = None if catalog.first_id is None else (catalog.first_id, catalog.first_id + catalog.samples - 1)
    header = FileHeader(catalog.schema, catalog.classes, catalog.samples, views, ids, catalog.provenance)
    with posix.translated("create", target.parent):
        posix.make_folder(target.parent)
    writer = ContainerWriter(target, catalog.schema, catalog.samples * len(views), header.dump(), hash_file=False)
    try:
        _copy(catalog, writer, views, None, progress)
        root = writer.finish_with_digests(
            lambda payload, rows: replace(header, payload_sha256=payload, rows_blake2b=rows).dump()
        )
        if not writer.publish(replace=overwrite):
            raise UsageError(f"{target} appeared while it was written; choose another name or pass --overwrite")
    except BaseException:
        writer.abandon()
        raise
    return root


def _write_folder(
    catalog: Catalog, target: Path, views: tuple[int, ...], *, overwrite: bool, progress: Callable[[int], None] | None
) -> str:
    if overwrite:
        remove_dump(target)
    elif posix.exists(target / MANIFEST):
        raise UsageError(f"{target} exists; choose another name or pass --overwrite")
    if catalog.classes.names is None:  # a header has room for the hash of a long list alone, a manifest needs the names
        catalog = replace(catalog, classes=replace(catalog.classes, sha256=None))
    rows = catalog.shard_rows or default_shard_rows(catalog.schema.row_bytes)
    plan = Plan(
        schema=catalog.schema,
        classes=catalog.classes,
        shard_rows=rows,
        samples=catalog.samples,
        provenance=catalog.provenance,
        views=views,
        extents=catalog.extents,
        head=None if catalog.head is None else catalog.head.record,
    )
    dump = open_dump(target, plan)
    try:
        dump.own()
        if catalog.head is not None:
            place_head(dump, copied_head(catalog.head))
        for number in range(plan.shard_count):
            _write_shard(catalog, dump, number, progress)
        manifest = dump.finish(dump.all_records() or [], samples=catalog.samples)
    except BaseException:
        dump.disown()
        dump.leave()
        with contextlib.suppress(KDCacheError):  # in other hands
            remove_dump(target)
            remove_empty(target)
        raise
    dump.disown()
    dump.leave()
    if manifest is None:
        raise CorruptCacheError(f"{target} was removed while it was written")
    return manifest.root


def _write_shard(catalog: Catalog, dump: DumpFolder, number: int, progress: Callable[[int], None] | None) -> None:
    """One shard of the new folder, unless a merge that was killed has left it."""
    view, start, stop = dump.plan.span(number)
    index = number % dump.plan.shards_per_view
    if not dump.claim(view, index):
        return
    same = (r.clamped for r in catalog.shards if (r.view, r.start, r.stop) == (view, start, stop))
    writer = dump.container(view, index, start, stop)
    try:
        _copy(catalog, writer, (view,), (start, stop), progress, clamped=next(same, 0))
        record = writer.record(view=view, start=start, ids=consecutive(writer.read_array("sample_id")))
        dump.commit(writer, record, index)
    except BaseException:
        writer.abandon()
        raise
    finally:
        dump.release(view, index)


def _copy(
    catalog: Catalog,
    writer: ContainerWriter,
    views: tuple[int, ...],
    samples: tuple[int, int] | None,
    progress: Callable[[int], None] | None,
    clamped: int = 0,
) -> None:
    for view, positions, block in scan(catalog, views=views, samples=samples):
        rows = {name: array for name, array in block.items() if name not in ("view", CRC_ARRAY)}
        writer.append(rows, view=view, positions=positions, clamped=clamped)
        clamped = 0
        if progress is not None:
            progress(len(positions))
