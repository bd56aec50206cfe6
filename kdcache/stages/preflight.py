"""Whether a dump fits on its disk: asked before the teacher is loaded, and again before the first shard.

Before the teacher is loaded the size is exact where the data set declares its classes or an unfinished dump is
there, else the least it can be (ids, labels, checksums and one logit a row). What the target holds already counts
in its favour: committed shards, what a killed process left, and with --overwrite the cache that is replaced.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdcache.errors import IncompleteCacheError, StorageError
from kdcache.format.hdf5_header import build_layout
from kdcache.format.headers import shard_header
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.format.strict_json import MAX_JSON_BYTES
from kdcache.stages.growth import StoredOrder
from kdcache.stages.loaded_data import LoadedData
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.store import posix
from kdcache.store.folder import MANIFEST, PLAN, SHARDS, read_manifest
from kdcache.store.plan import Plan, default_shard_rows, parse_plan, plan_of_manifest
from kdcache.store.posix import TEMPORARY_PREFIX
from kdcache.store.writer import dump_folder_of

_SPARE_BYTES = 16 << 20
_SPARE_FILES = 8  # plan, manifest, lock, folders, card, the one file


def check_space(out: Path, plan: Plan, *, overwrite: bool = False) -> None:
    """Refuses a dump whose rest does not fit on the disk of `out`, in bytes or in files.

    Args:
        out: the folder or the one file.
        plan: of the dump, or the least that is known of it.
        overwrite: what `out` holds will be removed first.

    Raises:
        StorageError: too little disk; nothing was written.
    """
    folder, one_file = dump_folder_of(out)
    free = free_bytes(out)  # before looking at what is there: other ranks are writing
    files = _free_files(out)
    held_bytes, held_files = _held(out, folder)
    left = planned_bytes(plan) * (2 if one_file else 1) - held_bytes
    left_files = 2 * plan.shard_count + _SPARE_FILES - held_files
    refusal = ""
    if left > 0 and free < left + _SPARE_BYTES:
        refusal = (
            f"{out} needs about {_megabytes(left)}, and {_megabytes(_SPARE_BYTES)} to spare, and its disk has "
            f"{_megabytes(free)} free; free some space, choose another --out, or a smaller --dtype or --top-k"
        )
    elif left > 0 and files is not None and files < left_files:
        refusal = (
            f"{out} needs {left_files:,} files and its disk has room for {files:,} (inodes, see df -i); remove some "
            "files, choose another --out, or larger --shard-rows"
        )
    if refusal and not (one_file and posix.is_file(out) and not overwrite):  # finished, perhaps just now
        raise StorageError(refusal)


def least_plan(
    out: Path, data: LoadedData, sample_ids: np.ndarray, order: StoredOrder | None, options: PrecomputeOptions
) -> Plan:
    """The plan of a dump as far as it is known without its teacher.

    Its classes are those of the dump at `out` that goes on, else those that the data set declares, else the fewest; its
    other facts are left out: they change no size by more than the length of a header.
    """
    folder, _ = dump_folder_of(out)
    views = tuple(range(options.views))
    if not options.overwrite and (found := _plan_there(folder)) is not None:
        if order is None or not order.grows:
            return found if len(found.views) >= len(views) else replace(found, views=views)
        return replace(found, samples=len(sample_ids), extents=order.extents, views=views)
    shape = (max(1 if options.top_k is None else 2, (not options.factored and data.num_classes) or 1),)
    id_dtype = "<i8" if sample_ids.dtype.kind == "i" else f"|S{sample_ids.dtype.itemsize}"
    has_labels = bool(data.num_classes)
    encoding = options.encoding.of(shape, labels=int(has_labels))
    schema = RowSchema(encoding, id_dtype, has_labels=has_labels, has_digests=True)
    return Plan(
        schema=schema,
        classes=ClassList.of(shape[0], None),
        shard_rows=options.shard_rows or default_shard_rows(schema.row_bytes),
        samples=len(sample_ids),
        provenance={},
        views=views,
    )


def planned_bytes(plan: Plan) -> int:
    """Bytes of all shards and of the head, exactly."""
    sizes: dict[tuple[int, ...], int] = {}
    total = 0
    for number in range(plan.shard_count):
        view, start, stop = plan.span(number)
        key = (stop - start, *(len(str(n)) for n in (view, start, stop)))  # all that the length of a header depends on
        if key not in sizes:
            teacher = plan.provenance.get("teacher", {})
            header = shard_header(plan.schema, plan.classes, teacher, view=view, start=start, stop=stop)
            sizes[key] = build_layout(plan.schema.specs, stop - start, header).size
        total += sizes[key]
    return total + (plan.head.size if plan.head else 0)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk where `path` is or will be."""
    folder = existing_folder(path)
    with posix.translated("look at", folder):
        return shutil.disk_usage(folder).free


def existing_folder(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    folder = path.absolute()
    while not posix.is_folder(folder):
        folder = folder.parent
    return folder


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e8 else 3}f} MB"


def _free_files(path: Path) -> int | None:
    """How many files the disk has room for, None where it has no such limit."""
    folder = existing_folder(path)
    with posix.translated("look at", folder):
        status = os.statvfs(folder)
    return status.f_favail if status.f_files > 0 else None


def _plan_there(folder: Path) -> Plan | None:
    """The plan of the dump in a folder, None where nothing is stored in it."""
    try:
        if posix.exists(folder / MANIFEST):
            return plan_of_manifest(read_manifest(folder), samples_known=True)
        text = posix.read_file(folder / PLAN, MAX_JSON_BYTES)
        stored = any(name.endswith(".h5") for name in posix.names_in(folder / SHARDS))
    except IncompleteCacheError:
        return None  # none yet, or another process has finished it and cleared it away
    plan = parse_plan(text, where=str(folder / PLAN)) if stored else None
    return None if plan is None or plan.samples is None else plan  # a `Writer` does not know how many rows will come


def _held(out: Path, folder: Path) -> tuple[int, int]:
    """Bytes and files that the dump at `out` has on the disk; of temporary files what they take there so far."""
    held_bytes = held_files = 0
    for path in _own_files(out, folder):
        with posix.translated("look at", path), contextlib.suppress(FileNotFoundError):  # in use by another process
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode):
                is_sparse = path.name.startswith(TEMPORARY_PREFIX)
                held_bytes += min(status.st_size, status.st_blocks * 512) if is_sparse else status.st_size
                held_files += 1
    return held_bytes, held_files


def _own_files(out: Path, folder: Path) -> Iterator[Path]:
    if folder != out:
        yield out
        temporary = f"{TEMPORARY_PREFIX}{out.name}-"
        yield from (out.parent / name for name in posix.names_in(out.parent) if name.startswith(temporary))
    for inner in (folder, folder / SHARDS):
        yield from (inner / name for name in posix.names_in(inner))
