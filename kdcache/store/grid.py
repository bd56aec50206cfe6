"""Where the rows of a cache lie: the arrays of all parts in one range of addresses each, mapped on first touch.

A row has a place on the grid, in which every part starts at a multiple of 4,096 rows (see `mapping`). Parts
are opened, checked against the manifest and mapped when one of their rows is first asked for, so opening a
folder of 1,000 shards costs nothing but its manifest.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import numpy as np

from kdcache.errors import UsageError
from kdcache.store.mapping import PreadRegion, Region, grid_rows
from kdcache.store.parts import Catalog, Part, open_part
from kdcache.store.posix import close_reader

_RESIDENCE_SAMPLE = 8


class Grid:
    """The arrays of a catalog's parts, addressed by grid row.

    Attributes:
        regions: by array name; empty after `close`.
        rows: grid rows, gaps included.
    """

    def __init__(self, catalog: Catalog, access: str, name: str) -> None:
        self._parts = catalog.parts
        self._name = name
        self._keeps_descriptors = access == "pread"
        slots = {view: slot for slot, view in enumerate(catalog.views)}
        self._starts = np.array([slots[p.view] * catalog.samples + p.start for p in catalog.parts], np.int64)
        self._grid_starts = np.concatenate([[0], np.cumsum([grid_rows(p.rows) for p in catalog.parts])])
        self._shift = self._grid_starts[:-1] - self._starts
        self.rows = int(self._grid_starts[-1])
        self.regions: dict[str, Region | PreadRegion] = {
            s.name: PreadRegion(s.dtype, s.row_shape)
            if self._keeps_descriptors
            else Region(self.rows, s.dtype, s.row_shape)
            for s in catalog.schema.specs
        }
        self._largest = catalog.schema.specs[0].name
        self._mapped = np.zeros(len(catalog.parts), bool)
        self._all_mapped = False
        self._expects_random = False
        self._descriptors: list[weakref.finalize[Any, Any]] = []
        self._guard = threading.Lock()
        self._guard_process = os.getpid()

    def locate(self, rows: np.ndarray) -> np.ndarray:
        """Grid rows (N,) of rows (N,), whose parts are mapped afterwards.

        Raises:
            UsageError: closed.
            CorruptCacheError, IncompleteCacheError: a part's file is not the one that the manifest lists.
        """
        if not self.regions:
            raise UsageError(f"{self._name} is closed; open it again")
        if len(self._starts) == 1:
            if not self._all_mapped:
                self._map(np.zeros(1, np.int64))
            return rows
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        if not self._all_mapped:
            self._map(parts)
        places: np.ndarray = rows + self._shift[parts]
        return places

    def prepare(self, start: int, stop: int) -> None:
        """Maps the parts of rows [start, stop), whose files are then known to hold what the manifest claims.

        For callers who make room for all of these rows before they locate them.

        Raises:
            UsageError, CorruptCacheError, IncompleteCacheError: as `locate`.
        """
        if not self.regions:
            raise UsageError(f"{self._name} is closed; open it again")
        if start < stop and not self._all_mapped:
            first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
            self._map(np.arange(first, last + 1))

    def part_of(self, row: int) -> Part:
        """The part that holds a row."""
        return self._parts[int(np.searchsorted(self._starts, row, side="right")) - 1]

    def advise(self, places: np.ndarray) -> None:
        """On a cold page cache asks for rows that were never touched at once, without read-ahead (8 times faster).

        On a warm one advice would halve the speed, so a few of them are looked at first.
        """
        region = self.regions[self._largest]
        if not places.size or region.resident(places[:_RESIDENCE_SAMPLE]):
            return
        if not self._expects_random:
            self._expects_random = True
            for number in np.flatnonzero(self._mapped).tolist():
                region.expect_random(True, int(self._grid_starts[number]), self._parts[number].rows)
        region.will_need(places)

    def close(self) -> None:
        """Lets maps and descriptors go."""
        self.regions = {}
        for close_descriptor in self._descriptors:
            close_descriptor()

    def _map(self, parts: np.ndarray) -> None:
        needed = np.unique(parts[~self._mapped[parts]])
        if not needed.size:
            return
        with self._lock():
            for number in needed[~self._mapped[needed]].tolist():
                self._open(number)
                self._mapped[number] = True
            self._all_mapped = bool(self._mapped.all())

    def _open(self, number: int) -> None:
        part, start = self._parts[number], int(self._grid_starts[number])
        fd = open_part(part)
        close_descriptor = weakref.finalize(self, close_reader, fd)
        close_descriptor.atexit = False
        try:
            for name, region in self.regions.items():
                region.place(fd, part.arrays[name].offset, start, part.rows)
        finally:
            if self._keeps_descriptors:
                self._descriptors.append(close_descriptor)
            else:  # a map outlives its descriptor
                close_descriptor()
        if self._expects_random:
            self.regions[self._largest].expect_random(True, start, part.rows)

    def _lock(self) -> threading.Lock:
        if self._guard_process != os.getpid():  # a lock that a thread of the parent held would hang a fork
            self._guard, self._guard_process = threading.Lock(), os.getpid()
        return self._guard
