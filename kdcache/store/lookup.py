"""From sample ids to positions: arithmetic for consecutive integers, a sorted index for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import CorruptCacheError, UsageError
from kdcache.format.identity import show_id


class IdIndex:
    """Positions of the samples of one view.

    Consecutive integers need no memory; other ids cost their own size plus 8 bytes a sample and are
    sorted once (1 M integers: 0.1 s).
    """

    def __init__(self, first: int | None, ids: np.ndarray | None, order: np.ndarray | None, count: int) -> None:
        self._first = first
        self._ids = ids
        self._order = order
        self._count = count

    @classmethod
    def of_range(cls, first: int, count: int) -> IdIndex:
        """Ids first, first + 1, ..., first + count - 1."""
        return cls(first, None, None, count)

    @classmethod
    def of_array(cls, ids: np.ndarray, path: Path) -> IdIndex:
        """Any ids, in stored order.

        Raises:
            CorruptCacheError: an id stands twice.
        """
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        if twice.size:
            raise CorruptCacheError(
                f"{path}: the sample id {show_id(ordered[twice[0]])} stands twice; run `kdcache verify`"
            )
        return cls(None, ordered, order, len(ids))

    @property
    def sample_ids(self) -> np.ndarray:
        """(samples,) ids in stored order."""
        if self._ids is None or self._order is None:
            first = self._first or 0
            return np.arange(first, first + self._count, dtype=np.int64)
        stored = np.empty_like(self._ids)
        stored[self._order] = self._ids
        return stored

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """(N,) int64 positions of N ids, -1 where unknown."""
        if self._ids is None or self._order is None:
            # Compare before subtracting: an id near the int64 limits would wrap round.
            first = self._first or 0
            known = (wanted >= first) & (wanted <= first + (self._count - 1))
            return np.where(known, np.where(known, wanted, first) - first, -1)
        at = np.minimum(np.searchsorted(self._ids, wanted), self._count - 1)
        return np.where(self._ids[at] == wanted, self._order[at], -1)


def as_row_numbers(rows: Any) -> np.ndarray:
    """(N,) int64 row numbers; booleans and floats are refused, since they would pick other rows silently."""
    given = np.asarray(rows)
    if given.dtype.kind not in "iu" and given.size:
        raise UsageError(f"rows must be integers, found {given.dtype}; ask for sample ids with rows() or find() first")
    return np.ascontiguousarray(given, np.int64)
