"""The sample ids of a folder in the order of its rows, read from shards without any row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdcache.errors import IncompleteCacheError
from kdcache.format.manifest import Manifest, ShardRecord
from kdcache.store import posix
from kdcache.store.folder import SHARDS
from kdcache.store.parts import open_part, part_of


def read_ids(folder: Path, records: Sequence[ShardRecord]) -> np.ndarray:
    """(n,) sample ids of committed shards, each compared with its record first: a wrong id would lose a sample."""
    pieces = [_ids_of(folder, record) for record in records]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def stored_ids(folder: Path, manifest: Manifest) -> np.ndarray:
    """(samples,) ids of a finished folder; of a shard that is gone those of the same samples in another view.

    Raises:
        IncompleteCacheError: shards of some samples are gone in every view.
        CorruptCacheError: a shard that is not the one in the manifest.
    """
    held: dict[int, ShardRecord] = {}
    for record in manifest.shards:
        if record.start not in held and (record.ids is not None or posix.exists(folder / SHARDS / record.file)):
            held[record.start] = record
    missing = [record for record in manifest.shards if record.start not in held]
    if missing:
        raise IncompleteCacheError(
            f"{folder / SHARDS / missing[0].file} is missing, and which samples it held is known from no other shard: "
            "fetch it from a copy of this cache, or dump everything again with --overwrite"
        )
    return read_ids(folder, [held[start] for start in sorted(held)])


def _ids_of(folder: Path, record: ShardRecord) -> np.ndarray:
    part = part_of(record, folder)
    if record.ids is not None and not posix.exists(part.path):
        return np.arange(record.ids[0], record.ids[1] + 1, dtype=np.int64)
    fd = open_part(part)
    try:
        layout = record.arrays["sample_id"]
        raw = posix.read_exactly(fd, layout.offset, layout.nbytes, part.path)
    finally:
        posix.close_reader(fd)
    return np.frombuffer(raw, layout.dtype)
