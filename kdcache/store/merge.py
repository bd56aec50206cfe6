"""`kdcache.merge`: a cache as one file, or fewer of its views as a smaller cache; rows are checked on the way.

A one-file cache reads fastest and travels as one thing; a folder is easier to produce, extend and pull in
part. The rows, their checksums and their order are the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kdcache.errors import UsageError
from kdcache.format.schema import MAX_VIEWS
from kdcache.store.parts import read_catalog
from kdcache.store.rewrite import Rewriting, check_target, chosen_views, write_cache

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
    check_target(source, target, overwrite=overwrite)
    catalog = read_catalog(Path(source))
    job = Rewriting(catalog, catalog, chosen_views(catalog, source, views))
    return write_cache(job, source, target, overwrite=overwrite, progress=progress)


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
