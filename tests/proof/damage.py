"""Caches of many forms, kept in memory as they were, so that one damage after another can be put on the disk.

A damage is a new content for some files (None: the file is gone). Each is written under another name and moved over
the old file, so that what is checked then is read from the damaged file and from nothing older.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from recipes import ONE_FILE, Recipe, make

from kdcache.errors import CorruptCacheError, IncompleteCacheError
from kdcache.format.arrays import ArrayLayout
from kdcache.format.hdf5_parser import parse
from kdcache.format.head import HEAD_FILE
from kdcache.store import cache as caches
from kdcache.store.parts import Part
from kdcache.store.verify import VerifyReport, verify

Damage = Mapping[str, bytes | None]
REFUSALS = (CorruptCacheError, IncompleteCacheError)

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class OtherDump:
    """The files of a dump with the same headers and other logits, and all its rows."""

    files: dict[str, bytes]
    rows: Columns

    @staticmethod
    def of(path: Path) -> OtherDump:
        with caches.open(path) as cache:
            return OtherDump(contents(path), columns(cache.gather(np.arange(len(cache)))))


@dataclass
class Subject:
    """A sound cache, the bytes of its files by name, and all its rows."""

    recipe: Recipe
    path: Path
    others: list[OtherDump] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert verify(self.path).ok
        self.files = contents(self.path)
        with caches.open(self.path) as cache:
            self.catalog = cache.catalog
            self.root = cache.root
            self.rows = len(cache)
            self.truth = columns(cache.gather(np.arange(self.rows)))
        self._regions = {name: regions(name, data) for name, data in self.files.items()}
        self._arrays = {name: arrays(name, self.files[name]) for name in self.containers}
        self._damaged: set[str] = set()

    @property
    def containers(self) -> list[str]:
        """Names of the files that hold rows."""
        return [name for name in self.files if name.endswith(".h5") and name != HEAD_FILE]

    def parts_of(self, name: str) -> list[Part]:
        """The parts that lie in a file: one, or one a view."""
        return [part for part in self.catalog.parts if part.path.name == Path(name).name]

    def arrays_of(self, name: str) -> dict[str, ArrayLayout]:
        """The arrays of a file as a whole."""
        return self._arrays[name]

    def regions_of(self, name: str) -> dict[str, list[tuple[int, int]]]:
        """What a file consists of."""
        return self._regions[name]

    def first_row(self, part: Part) -> int:
        """The number of a part's first row in the cache."""
        return self.catalog.views.index(part.view) * self.catalog.samples + part.start

    def affected(self, damage: Damage) -> np.ndarray:
        """(n,) rows of which a stored byte changed: all of a file that is gone or of another size."""
        rows: list[int] = []
        for name in self.containers:
            if name not in damage:
                continue
            old, new = self.files[name], damage[name]
            for part in self.parts_of(name):
                hit = np.full(part.rows, new is None or len(new) != len(old))
                for array in part.arrays.values() if new is not None and len(new) == len(old) else ():
                    span = slice(array.offset, array.stop)
                    changed = np.frombuffer(old[span], np.uint8) != np.frombuffer(new[span], np.uint8)
                    hit |= changed.reshape(part.rows, -1).any(axis=1)
                rows += (np.flatnonzero(hit) + self.first_row(part)).tolist()
        return np.array(sorted(rows), np.int64)

    def apply(self, damage: Damage) -> None:
        """Puts a damage on the disk; it must change something."""
        assert any(data != self.files.get(name) for name, data in damage.items()), "a damage without effect"
        for name, data in damage.items():
            self._damaged.add(name)
            put(self._file(name), data)

    def restore(self) -> None:
        """Puts the sound files back."""
        for name in self._damaged:
            put(self._file(name), self.files.get(name))
        self._damaged.clear()

    def _file(self, name: str) -> Path:
        return self.path if self.path.suffix == ".h5" else self.path / name

    def read(self, rows: np.ndarray, *, access: str = "mmap", truth: Columns | None = None) -> set[int]:
        """Opens the cache anew and reads `rows` one by one, then all at once, then those that their ids lead to.

        Every answer is right, bit by bit, or a refusal. Returns the rows that were refused.
        """
        truth = self.truth if truth is None else truth
        everything = np.arange(self.rows)
        try:
            cache = caches.open(self.path, access=access)
        except REFUSALS:
            return set(rows.tolist())
        with cache:
            refused = {row for row in rows.tolist() if _is_refused(cache, [row], truth, [row])}
            assert _is_refused(cache, everything, truth, everything) or not refused
            try:
                found = np.concatenate([cache.rows(self.recipe.ids(), view) for view in cache.views])
            except REFUSALS:
                return refused
            # An id that leads elsewhere leads to a row that is refused.
            if found.tolist() != everything.tolist():
                assert all(
                    _is_refused(cache, found[[row]], truth, [row]) for row in np.flatnonzero(found != everything)
                )
        return refused

    def check(
        self, damage: Damage, rng: np.random.Generator, *, missing: bool = False, truth: Columns | None = None
    ) -> set[int]:
        """Damages the cache, asserts that `verify` finds it and that no wrong row is read, and mends it again.

        Args:
            damage: what to put on the disk.
            rng: which of the affected rows, and of the others, are read, and by which access.
            missing: whether `verify` must find nothing worse than missing files.
            truth: all rows as they must be read, where not as they were.

        Returns:
            The affected rows that were read and not refused.
        """
        self.apply(damage)
        try:
            report: VerifyReport = verify(self.path)
            assert report.problems
            assert report.missing == missing
            rows = self.affected(damage)
            some = rng.choice(rows, min(len(rows), 8), replace=False) if len(rows) else rows
            read = np.unique([*some, *rows[:1], *rows[-1:], *rng.integers(self.rows, size=2)]).astype(np.int64)
            refused = self.read(read, access=("mmap", "pread")[int(rng.integers(2))], truth=truth)
            return set(np.intersect1d(rows, read).tolist()) - refused
        finally:
            self.restore()


class Subjects:
    """Builds the sound cache of a form when it is first asked for, and dumps with equal headers beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Subject] = {}

    def of(self, recipe: Recipe, *, others: int = 0) -> Subject:
        """The cache of a form, with at least `others` dumps of other logits."""
        place = self._folder / recipe.name
        if recipe.name not in self._made:
            self._made[recipe.name] = Subject(recipe, make(place, recipe, 0))
        subject = self._made[recipe.name]
        while len(subject.others) < others:
            subject.others.append(OtherDump.of(make(place, recipe, len(subject.others) + 1)))
        return subject


def _is_refused(cache: caches.Cache, rows: Any, truth: Columns, expected: Any) -> bool:
    """Whether a gather is refused; else it gives the expected rows of the truth."""
    try:
        gathered = cache.gather(rows)
    except REFUSALS:
        return True
    assert not wrong(gathered, truth, np.asarray(expected)), f"rows {rows}"
    return False


def columns(rows: Any) -> Columns:
    """All arrays of gathered rows by name."""
    optional = {"label": rows.label, "input_digest": rows.input_digest}
    given = {name: array for name, array in optional.items() if array is not None}
    return {**rows.arrays, "sample_id": rows.sample_id, "view": rows.view, **given}


def wrong(gathered: Any, truth: Columns, rows: np.ndarray) -> list[str]:
    """Names of the arrays that are not, bit by bit, those rows of the truth."""
    found = columns(gathered)
    assert set(found) == set(truth)
    return [name for name, array in found.items() if array.tobytes() != truth[name][rows].tobytes()]


def arrays(name: str, data: bytes) -> dict[str, ArrayLayout]:
    """The arrays of a container as a whole."""
    return parse(lambda offset, length: data[offset : offset + length], len(data), name=name).arrays


def regions(name: str, data: bytes) -> dict[str, list[tuple[int, int]]]:
    """(start, stop) of what a file consists of: its arrays, its header, and the slack in between; or it as a whole."""
    if not name.endswith(".h5"):
        return {Path(name).name: [(0, len(data))]}
    parsed = parse(lambda offset, length: data[offset : offset + length], len(data), name=name)
    stored = {array.name: [(array.offset, array.stop)] for array in parsed.arrays.values()}
    known = sorted([*parsed.headers, *(span for spans in stored.values() for span in spans), (len(data), len(data))])
    slack, cursor = [], 0
    for start, stop in known:
        slack += [(cursor, start)] if start > cursor else []
        cursor = max(cursor, stop)
    return {**stored, "header": list(parsed.headers), "slack": slack}


def contents(path: Path) -> dict[str, bytes]:
    """The files of a cache or a dump by name, the lock file left out; a one-file cache as `teacher.h5`."""
    if path.is_file():
        return {ONE_FILE: path.read_bytes()}
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def put(path: Path, data: bytes | None) -> None:
    """Gives a file a new content in a new file of the same name, or removes it."""
    if data is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(".fresh")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def flipped(data: bytes, bit: int) -> bytes:
    """The same bytes but for one bit, counted from the first of the first byte."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bits_of(spans: list[tuple[int, int]], some: int | None, rng: np.random.Generator) -> Iterator[int]:
    """The numbers of all bits in some spans of a file, or of `some` of them."""
    bits = np.concatenate([np.arange(start * 8, stop * 8) for start, stop in spans])
    yield from (bits if some is None else rng.choice(bits, some, replace=False)).tolist()
