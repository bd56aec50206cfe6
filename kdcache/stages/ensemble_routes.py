"""`--ensemble route:FILE.csv`: which teacher speaks about which sample, as a table says.

Columns `sample_id` and `teacher`; a teacher is the name of its cache, with or without `.h5`, or its number from 1 in
the order of --cache. Every sample of the data needs a line.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from kdcache.errors import CoverageError, UsageError
from kdcache.format.identity import as_sample_ids, show_ids
from kdcache.store import posix
from kdcache.store.cache import Cache
from kdcache.store.lookup import IdIndex
from kdcache.train.ensemble_rules import Rule

MAX_BYTES = 1 << 30
_COLUMNS = ("sample_id", "teacher")


Routes: TypeAlias = Callable[[np.ndarray], np.ndarray]


def load_routes(rule: Rule, caches: Sequence[Cache], sample_ids: np.ndarray) -> tuple[Routes | None, str | None]:
    """The number of the teacher of sample ids (N,), as (N,) int64, and the SHA-256 of the file; None for other rules.

    Args:
        rule: names the CSV file, or none.
        caches: of the teachers.
        sample_ids: of the data, all of which the file must name.

    Raises:
        UsageError: no such file, another table, a teacher that is none, or a sample twice.
        CoverageError: samples without a line.
    """
    if rule.file is None:
        return None, None
    path = Path(rule.file)
    if not posix.exists(path):
        columns = " and ".join(_COLUMNS)
        raise UsageError(f"there is no file {rule.file}: a route names a table with the columns {columns}")
    content = posix.read_file(path, MAX_BYTES)
    ids, teachers = _read(content, path, _numbers(caches), is_integer=sample_ids.dtype.kind == "i")
    known = as_sample_ids(ids)
    order = np.argsort(known, kind="stable")
    ranked = known[order]
    twice = np.flatnonzero(ranked[1:] == ranked[:-1])
    if len(twice):
        raise UsageError(f"{path.name} names the sample {show_ids(ranked[twice[:1]])} twice: give each one teacher")
    index, numbers = IdIndex.of_array(known, path), np.array(teachers, np.int64)
    absent = np.flatnonzero(index.find(sample_ids) < 0)
    if len(absent):
        raise CoverageError(
            f"{path.name} has no line for {len(absent)} of the {len(sample_ids)} samples: "
            f"{show_ids(sample_ids[absent[:6]])}. Name a teacher for each"
        )

    def routes(wanted: np.ndarray) -> np.ndarray:
        # Samples that take part have a line; others, of which nothing is learnt, have none.
        found: np.ndarray = numbers[np.maximum(index.find(wanted), 0)]
        return found

    return routes, hashlib.sha256(content).hexdigest()


def _numbers(caches: Sequence[Cache]) -> dict[str, int]:
    """Which teacher a cell means; a name that two caches have means none."""
    found = {str(number + 1): number for number in range(len(caches))}
    for names in ([cache.path.name for cache in caches], [cache.path.stem for cache in caches]):
        found.update({name: number for number, name in enumerate(names) if names.count(name) == 1})
    return found


def _read(
    content: bytes, path: Path, numbers: dict[str, int], *, is_integer: bool
) -> tuple[list[int] | list[str], list[int]]:
    try:
        text = content.decode("utf-8-sig")
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(lines, [])
        if not {*_COLUMNS} <= {*header}:
            raise UsageError(
                f"{path.name} has the columns {header!r:.200}, expected {' and '.join(_COLUMNS)}: a table of which "
                "teacher speaks about which sample"
            )
        places = [header.index(name) for name in _COLUMNS]
        ids: list[str] = []
        teachers: list[int] = []
        for line, cells in enumerate(lines, 2):
            if not cells:
                continue
            if len(cells) != len(header):
                raise UsageError(f"{path.name} line {line} has {len(cells)} cells, the header {len(header)}")
            sample_id, teacher = (cells[place].removeprefix("'") for place in places)
            if teacher not in numbers:
                known = ", ".join(numbers)
                raise UsageError(f"{path.name} line {line}: teacher {teacher!r:.80} is none of {known:.400}")
            ids.append(sample_id)
            teachers.append(numbers[teacher])
        if not ids:
            raise UsageError(f"{path.name} has no lines")
        return ([int(one) for one in ids] if is_integer else ids), teachers
    except (UnicodeDecodeError, csv.Error, ValueError, OverflowError) as error:
        raise UsageError(f"{path.name} is no table of samples and teachers (CSV in UTF-8): {error!s:.200}") from error
