"""`kdcache.merge`: a folder of shards into one file, or one view of many; rows are checked on the way.

A one-file cache reads fastest and travels as one thing; a folder is easier to produce, extend and pull in
part. The rows, their checksums and their order are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdcache.errors import MismatchError, UsageError
from kdcache.format.headers import FileHeader
from kdcache.store import posix
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.store.rows import TeacherRows
from kdcache.store.shards import ContainerWriter, remove_temporaries

_BLOCK_BYTES = 8 << 20


def merge(
    source: str | Path,
    out: str | Path,
    *,
    views: Sequence[int] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Writes a one-file cache from a folder cache (or from another file).

    Args:
        source: a finished cache.
        out: the file to make; its name ends in `.h5`.
        views: which views to take; all by default.
        overwrite: replace `out` if it exists.
        progress: called with the number of rows after each block.

    Returns:
        The root hash of the new file.

    Raises:
        UsageError: `out` exists or does not end in `.h5`.
        MismatchError: a view that the source does not have.
        CorruptCacheError: a damaged row in the source; nothing is written under `out`.
        StorageError: the disk refused.
    """
    target = Path(out)
    if target.suffix != ".h5":
        raise UsageError(f"{target} must end in .h5: merge makes one file")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; choose another name or pass --overwrite")
    with open_cache(source) as cache:
        chosen = cache.views if views is None else tuple(sorted(set(views)))
        unknown = sorted(set(chosen) - set(cache.views))
        if unknown or not chosen:
            raise MismatchError(f"{cache.path} has the views {list(cache.views)}, not {unknown}")
        return _write(cache, target, chosen, overwrite=overwrite, progress=progress)


def _write(
    cache: Cache, target: Path, views: tuple[int, ...], *, overwrite: bool, progress: Callable[[int], None] | None
) -> str:
    catalog = cache.catalog
    ids = None if catalog.first_id is None else (catalog.first_id, catalog.first_id + catalog.samples - 1)
    header = FileHeader(catalog.schema, catalog.classes, catalog.samples, views, ids, catalog.provenance)
    with posix.translated("create", target.parent):
        posix.make_folder(target.parent)
    remove_temporaries(target.parent, target.name, of_the_dead=True)
    writer = ContainerWriter(target, catalog.schema, catalog.samples * len(views), header.dump(), hash_file=False)
    try:
        step = max(1, _BLOCK_BYTES // catalog.schema.row_bytes)
        for view in views:
            slot = cache.views.index(view)
            for start in range(0, catalog.samples, step):
                positions = np.arange(start, min(start + step, catalog.samples))
                rows = cache.gather(positions + slot * catalog.samples)
                writer.append(stored_arrays(rows), view=view, positions=positions)
                if progress is not None:
                    progress(len(positions))
        root = writer.finish_with_digests(
            lambda payload, rows: replace(header, payload_sha256=payload, rows_blake2b=rows).dump()
        )
        if not writer.publish(replace=overwrite):
            raise UsageError(f"{target} appeared while it was written; choose another name or pass --overwrite")
    except BaseException:
        writer.abandon()
        raise
    return root


def stored_arrays(rows: TeacherRows) -> dict[str, np.ndarray]:
    """The arrays of a container but `view` and `row_crc`, from gathered rows."""
    arrays: dict[str, np.ndarray] = {**rows.arrays, "sample_id": rows.sample_id}
    if rows.label is not None:
        arrays["label"] = rows.label
    if rows.input_digest is not None:
        arrays["input_digest"] = rows.input_digest
    return arrays
