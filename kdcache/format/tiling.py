"""How the samples of each view are cut into shards: every `shard_rows` of them, anew from each extent.

A cache of a data set that grew has more than one extent: the sample counts at which it was finished, ascending, of
which the last is its number of samples. What was finished is never cut anew, so its shards stay as they are.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from kdcache.errors import CorruptCacheError

MAX_EXTENTS = 4096


@dataclass(frozen=True)
class Tiling:
    """The ranges of samples of a view's shards; nothing is laid out, so hostile numbers cost nothing.

    Args:
        shard_rows: rows of a shard, fewer at the end of an extent.
        extents: ascending sample counts, at least one.

    >>> [Tiling(40, (100, 150)).span(index) for index in range(5)]
    [(0, 40), (40, 80), (80, 100), (100, 140), (140, 150)]
    """

    shard_rows: int
    extents: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of shards."""
        return self._counts[-1]

    def span(self, index: int) -> tuple[int, int]:
        """(first sample, sample behind the last) of shard `index`."""
        extent = bisect_right(self._counts, index)
        begun, before = (self.extents[extent - 1], self._counts[extent - 1]) if extent else (0, 0)
        start = begun + (index - before) * self.shard_rows
        return start, min(start + self.shard_rows, self.extents[extent])

    def stop_of(self, start: int) -> int:
        """The sample behind the last of the shard that begins at `start`, which is below the number of samples."""
        return min(start + self.shard_rows, self.extents[bisect_right(self.extents, start)])

    def extends(self, shorter: Tiling) -> bool:
        """Whether it has all the shards of another one, as its first, and more."""
        count = len(shorter.extents)
        return self.shard_rows == shorter.shard_rows and self.extents[:count] == shorter.extents != self.extents

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        """Shards up to the end of each extent."""
        pieces = (stop - start for start, stop in pairwise((0, *self.extents)))
        return tuple(accumulate(-(-rows // self.shard_rows) for rows in pieces))


def extents_from_json(value: Any, samples: int | None, *, where: str) -> tuple[int, ...]:
    """The extents of a manifest or plan: the field `extents`, which is there only where there is more than one.

    Raises:
        CorruptCacheError: not two or more ascending counts of which the last is `samples`.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_EXTENTS or not all(type(n) is int for n in value):
        raise CorruptCacheError(f"{where}: extents must be a list of 2 to {MAX_EXTENTS} numbers of samples")
    if value[0] < 1 or any(left >= right for left, right in pairwise(value)) or value[-1] != samples:
        raise CorruptCacheError(f"{where}: extents must ascend from 1 or more to the number of samples")
    return tuple(value)
