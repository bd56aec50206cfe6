"""An open cache: rows by sample id, batches at memory speed, every row checked when first touched.

Nothing but paths is pickled, no library lock is held and no handle can break: the same object works in
forked, spawned and forkserver workers. A batch is one gather an array (0.3 us a row of 1000 float16);
the first touch of a row in a process costs a CRC on top (0.7 us).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import (
    CorruptCacheError,
    CoverageError,
    IncompleteCacheError,
    MismatchError,
    StorageError,
    UsageError,
)
from kdcache.format.checksums import row_crcs
from kdcache.format.encoding import Encoding
from kdcache.format.identity import as_sample_ids, show_id, show_ids
from kdcache.format.schema import CRC_ARRAY
from kdcache.store.buffers import blank, check_buffer, empty_rows, first_rows
from kdcache.store.grid import Grid
from kdcache.store.lookup import IdIndex, as_row_numbers
from kdcache.store.parts import Catalog, check_access, read_catalog
from kdcache.store.rows import TeacherRows


def open(path: str | os.PathLike[str], *, expect_root: str | None = None, access: str = "mmap") -> Cache:
    """Opens a folder cache or a one-file `.h5` for reading; nothing is written, ever.

    Args:
        path: the folder or the file.
        expect_root: the root hash that the cache must have, as `kdcache inspect` prints it.
        access: `mmap`, or `pread` for file systems where maps are slow.

    Raises:
        IncompleteCacheError: nothing there, or a dump that is not finished.
        CorruptCacheError: not what our writer wrote.
        MismatchError: another root hash than `expect_root`.
    """
    cache = _open(path, expect_root, access)
    if cache.catalog.head is not None:
        cache.catalog.head.keep()
    return cache


class Cache:
    """A cache opened by `kdcache.open`.

    Rows are numbered view by view: row = slot of the view * samples + position of the sample.

    Attributes:
        path: the folder or file.
        root: the root hash, which identifies the content.
        encoding: what a row's arrays mean.
        classes: the ordered class names, None where unknown.
        views: the views it holds.
        provenance: teacher, data, precision, versions, licence.
    """

    def __init__(self, path: Path, catalog: Catalog, access: str) -> None:
        self.path = path
        self.root = catalog.root
        self.encoding: Encoding = catalog.schema.encoding
        self.classes = catalog.classes.names
        self.views = catalog.views
        self.provenance: dict[str, Any] = catalog.provenance
        self._catalog = catalog
        self._access = access
        self._index: IdIndex | None = None
        self._accepted: Callable[[], TeacherRows | None] = _nothing
        self._grid = Grid(catalog, access, path.name)
        try:
            self._checked = np.zeros(self._grid.rows, bool)
        except MemoryError:
            raise StorageError(f"{self.path}: no memory for the marks of {len(self)} rows (1 byte each)") from None
        self._left_to_check = len(self)
        self._crc_names = catalog.schema.crc_names
        payload = {spec.name for spec in self.encoding.specs}
        self._beside = [name for name in self._crc_names if name != "sample_id" and name not in payload]
        self._single_view = self.views[0] if len(self.views) == 1 else None

    def __len__(self) -> int:
        return self._catalog.samples * len(self.views)

    def __repr__(self) -> str:
        return f"Cache({self.path.name!r}, shape={self.shape}, encoding={self.encoding.name} {self.encoding.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.root, self._access, self.views)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets maps and descriptors go; the object cannot be read afterwards."""
        self._grid.close()
        self._index = None

    def keep(self) -> None:
        """Maps every part now, so that reading goes on where somebody removes the files (POSIX keeps what is mapped).

        Raises:
            IncompleteCacheError, CorruptCacheError: a part is not there, or not the one that the manifest lists.
        """
        self._grid.prepare(0, len(self))

    @property
    def catalog(self) -> Catalog:
        """What the cache consists of: schema, class list, shards."""
        return self._catalog

    @property
    def num_classes(self) -> int:
        """C."""
        return self.encoding.num_classes

    @property
    def num_samples(self) -> int:
        """Samples of one view."""
        return self._catalog.samples

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, C, ...)."""
        return (len(self), *self.encoding.row_shape)

    @property
    def has_labels(self) -> bool:
        """Whether labels lie beside the logits."""
        return self._catalog.schema.has_labels

    @property
    def has_digests(self) -> bool:
        """Whether the dump took a digest of each input."""
        return self._catalog.schema.has_digests

    @property
    def sample_ids(self) -> np.ndarray:
        """(samples,) ids in stored order, int64 or fixed-length bytes."""
        self._grid.prepare(0, self._catalog.samples)
        return self._ids().sample_ids

    def first_ids(self, count: int) -> np.ndarray:
        """The ids of the first `count` samples, or of fewer, without looking at the others."""
        stop, first = min(count, self._catalog.samples), self._catalog.first_id
        return self.stored("sample_id", 0, stop) if first is None else np.arange(first, first + stop)

    def find(self, sample_ids: Any, view: int = 0) -> np.ndarray:
        """Rows of samples, -1 where the cache has none.

        Args:
            sample_ids: N ids: integers or text, as the data set has them.
            view: which view.

        Returns:
            (N,) int64.

        Raises:
            MismatchError: the cache has no such view, or ids of another kind (integers against text).
        """
        if view not in self.views:
            raise MismatchError(f"{self.path.name} has the views {list(self.views)}, not {view}")
        wanted = as_sample_ids(sample_ids)
        if not len(wanted):
            return np.empty(0, np.int64)
        if (wanted.dtype.kind == "i") != (self._catalog.schema.id_dtype == "<i8"):
            mine = "integers" if self._catalog.schema.id_dtype == "<i8" else "text"
            raise MismatchError(
                f"the sample ids of {self.path.name} are {mine}, the ones asked for are {wanted.dtype} "
                f"(for example {show_id(wanted[0])}); pass the ids that the data had when it was dumped"
            )
        positions = self._ids().find(wanted)
        slot = self.views.index(view)
        return np.where(positions < 0, -1, positions + slot * self._catalog.samples) if slot else positions

    def rows(self, sample_ids: Any, view: int = 0) -> np.ndarray:
        """Rows of samples; every one must be there.

        Args:
            sample_ids: N ids.
            view: which view.

        Returns:
            (N,) int64 positions for `gather`.

        Raises:
            CoverageError: naming the first ids that the cache does not hold.
            MismatchError: no such view, or ids of another kind.
        """
        found = self.find(sample_ids, view)
        if found.size and int(found.min()) < 0:
            missing = np.flatnonzero(found < 0)
            names = show_ids(as_sample_ids(sample_ids)[missing[:6]])
            raise CoverageError(
                f"{self.path.name} does not hold {len(missing)} of the {len(found)} samples asked for: {names}. "
                "Dump them as well, or choose missing='ce' or 'skip' when joining (--missing ce|skip)"
            )
        return found

    def gather(self, rows: Any, *, out: TeacherRows | None = None) -> TeacherRows:
        """The stored arrays of some rows, copied once, in the order asked for.

        Args:
            rows: (N,) integers as `rows` or `find` gives them; -1 gives zeros with `has_teacher` False.
            out: rows of an earlier call with at least N rows to be overwritten and returned; after an error their
                content is undefined.

        Returns:
            N rows of NumPy arrays.

        Raises:
            UsageError: a row below -1 or beyond the end, or `out` does not fit.
            CorruptCacheError: a row's checksum, view or id is not what it must be.
        """
        wanted = as_row_numbers(rows)
        missing = self._check_range(wanted)
        if missing is not None:
            wanted = np.where(missing, 0, wanted)
        grid = self._grid.locate(wanted)
        result = self._buffer(out, len(wanted))
        if self._left_to_check and self._access == "mmap":
            self._grid.advise(grid[~self._checked[grid]])
        regions = self._grid.regions
        for name, array in result.arrays.items():
            regions[name].take(grid, array)
        for name in self._beside:
            regions[name].take(grid, getattr(result, name))
        result.has_teacher.fill(True)
        self._fill_view(wanted, result.view)
        first = self._catalog.first_id
        if self._left_to_check or first is None or self._single_view is None:
            regions["sample_id"].take(grid, result.sample_id)
            if self._left_to_check:
                self._check_first_touch(wanted, grid, result)
        else:  # every row has been compared with this range, and arithmetic is faster than a gather
            np.add(wanted, first, out=result.sample_id)
        if missing is not None:
            blank(result, missing)
        return result

    def _buffer(self, out: TeacherRows | None, count: int) -> TeacherRows:
        schema = self._catalog.schema
        if out is None:
            return empty_rows(schema, count)
        if out is not self._accepted():
            check_buffer(out, schema)
            self._accepted = weakref.ref(out)
        return first_rows(out, count)

    def _fill_view(self, rows: np.ndarray, out: np.ndarray) -> None:
        if self._single_view is not None:
            out.fill(self._single_view)
        else:
            out[:] = np.asarray(self.views, np.uint16)[rows // self._catalog.samples]

    def stored(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A copy of one stored array over rows [start, stop), not checked row by row (see `verify`)."""
        spec = next((s for s in self._catalog.schema.specs if s.name == name), None)
        if spec is None:
            raise UsageError(f"{self.path.name} has no array {name!r}")
        stop = len(self) if stop is None else stop
        self._grid.prepare(start, stop)
        rows = np.arange(start, stop)
        target = np.empty(spec.shape(len(rows)), spec.dtype)
        places = self._grid.locate(rows)  # refuses a closed cache
        self._grid.regions[name].take(places, target)
        return target

    def _check_range(self, rows: np.ndarray) -> np.ndarray | None:
        if rows.ndim != 1:
            raise UsageError(f"rows must be one-dimensional, found shape {rows.shape}")
        # As unsigned numbers negative rows are huge, so one pass sees both ends.
        if not rows.size or int(rows.view(np.uint64).max()) < len(self):
            return None
        lowest, highest = int(rows.min()), int(rows.max())
        if lowest < -1 or highest >= len(self):
            wrong = lowest if lowest < -1 else highest
            raise UsageError(f"row {wrong} does not exist; {self.path.name} has rows 0 to {len(self) - 1}")
        return rows < 0

    def _check_first_touch(self, rows: np.ndarray, grid: np.ndarray, result: TeacherRows) -> None:
        fresh = np.flatnonzero(~self._checked[grid])
        if not fresh.size:
            return
        everything = len(fresh) == len(rows)
        at = grid if everything else grid[fresh]
        touched = result if everything else result.take(fresh)
        numbers = rows if everything else rows[fresh]
        positions = numbers % self._catalog.samples
        stored_crc, stored_view = np.empty(len(at), "<u4"), np.empty(len(at), "<u2")
        self._grid.regions[CRC_ARRAY].take(at, stored_crc)
        self._grid.regions["view"].take(at, stored_view)
        beside = {name: getattr(touched, name) for name in self._beside}
        stored: dict[str, np.ndarray] = {"sample_id": touched.sample_id, **beside, **touched.arrays}
        ordered = [stored[n] for n in self._crc_names]
        good = stored_view == touched.view
        if self._single_view is not None:
            good &= row_crcs(ordered, view=self._single_view, positions=positions) == stored_crc
        else:
            for view in self.views:
                chosen = np.flatnonzero(touched.view == view)
                crcs = row_crcs([a[chosen] for a in ordered], view=view, positions=positions[chosen])
                good[chosen] &= crcs == stored_crc[chosen]
        if self._catalog.first_id is not None:
            good &= touched.sample_id == self._catalog.first_id + positions
        if not good.all():
            bad = int(numbers[np.flatnonzero(~good)[0]])
            part = self._grid.part_of(bad)
            raise CorruptCacheError(
                f"{part.path}: row {bad} (sample {show_id(touched.sample_id[np.flatnonzero(~good)[0]])}) does not "
                "match its checksum; the file is damaged or rows were moved. Run `kdcache verify`, then fetch or dump "
                "it again"
            )
        self._checked[at] = True
        left = self._left_to_check - len(at)
        if left <= 0:  # a row twice in a batch, or in two threads, was counted twice: count anew
            left = len(self) - int(np.count_nonzero(self._checked))
        self._left_to_check = left  # in one step: another thread must never see a zero that is not true

    def _ids(self) -> IdIndex:
        if self._index is None:
            first = self._catalog.first_id
            if first is not None:
                self._index = IdIndex.of_range(first, self._catalog.samples)
            else:
                self._index = IdIndex.of_array(self.stored("sample_id", 0, self._catalog.samples), self.path)
        return self._index


def _nothing() -> None:
    return None


def _open(path: str | os.PathLike[str], expect_root: str | None, access: str) -> Cache:
    check_access(access)
    where = Path(os.path.abspath(path))
    catalog = read_catalog(where)
    if expect_root is not None and catalog.root != expect_root:
        raise MismatchError(f"{where} has the root hash {catalog.root}, expected {expect_root}; it is another dump")
    return Cache(where, catalog, access)


def _reopen(path: str, root: str, access: str, views: tuple[int, ...]) -> Cache:
    """The same cache with the same row numbers, also where shards of further views were fetched meanwhile."""
    opened = _open(path, root, access)
    if opened.views == views:
        return opened
    gone = [view for view in views if view not in opened.views]
    if gone:
        raise IncompleteCacheError(f"{path}: the shards of the views {gone} were removed while the cache was in use")
    return Cache(opened.path, opened.catalog.with_views(views), access)
