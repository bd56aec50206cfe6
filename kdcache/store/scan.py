"""All rows of a cache in stored order, each checked: for whoever reads every row once (merge, export, verify).

By `pread` from one file at a time. Under a map a disk that fails ends the process (SIGBUS); here it is a
StorageError. In order this is as fast as a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from kdcache.errors import CorruptCacheError
from kdcache.format.checksums import row_crcs
from kdcache.format.identity import show_id
from kdcache.format.schema import CRC_ARRAY
from kdcache.store import posix
from kdcache.store.parts import Catalog, Part, open_part


def scan(
    catalog: Catalog,
    *,
    views: Sequence[int] | None = None,
    samples: tuple[int, int] | None = None,
    block_bytes: int = 8 << 20,
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """All rows, view by view.

    Args:
        catalog: of the cache.
        views: which, and in which order; all by default.
        samples: (first, behind the last) position; all by default.
        block_bytes: how much to read at a time.

    Yields:
        view, positions (n,) of the samples, and all stored arrays by name, (n, ...) each.

    Raises:
        CorruptCacheError, IncompleteCacheError: of a part or a row.
        StorageError: a read failed.
    """
    for view in catalog.views if views is None else views:
        for part in (part for part in catalog.parts if part.view == view):
            wanted = part if samples is None else part.between(*samples)
            if not wanted.rows:
                continue
            fd = open_part(part)
            try:
                for positions, block in checked_blocks(partial(_read, fd, part), wanted, catalog, block_bytes):
                    yield view, positions, block
            finally:
                posix.close_reader(fd)


def checked_blocks(
    read: Callable[[int, int], bytes], part: Part, catalog: Catalog, block_bytes: int = 8 << 20
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The rows of one part: positions of the samples, and all stored arrays by name.

    Raises:
        CorruptCacheError: a row's checksum, view or id is not what it must be; the message names the sample.
    """
    step = max(1, block_bytes // catalog.schema.row_bytes)
    for start in range(0, part.rows, step):
        stop = min(start + step, part.rows)
        block = {
            name: np.frombuffer(
                read(a.offset + start * a.spec.row_bytes, (stop - start) * a.spec.row_bytes), a.dtype
            ).reshape(a.spec.shape(stop - start))
            for name, a in part.arrays.items()
        }
        positions = np.arange(part.start + start, part.start + stop)
        crcs = row_crcs([block[n] for n in catalog.schema.crc_names], view=part.view, positions=positions)
        bad = np.flatnonzero((crcs != block[CRC_ARRAY]) | (block["view"] != part.view))
        if bad.size:
            first = show_id(block["sample_id"][bad[0]])
            raise CorruptCacheError(
                f"{part.path}: the checksum of {bad.size} rows does not match, the first is row {start + bad[0]} "
                f"(sample {first}). Run `kdcache verify`, then fetch or dump it again"
            )
        if catalog.first_id is not None and not bool((block["sample_id"] == catalog.first_id + positions).all()):
            raise CorruptCacheError(f"{part.path}: sample ids are not the consecutive range that the manifest says")
        yield positions, block


def _read(fd: int, part: Part, offset: int, length: int) -> bytes:
    return posix.read_exactly(fd, offset, length, part.path)
