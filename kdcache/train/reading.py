"""What `join` and `attach` share: coverage when they are made, then one gather and the checks for each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np

from kdcache.errors import CoverageError, MismatchError, UsageError
from kdcache.format.identity import show_id, show_ids
from kdcache.store.cache import Cache
from kdcache.store.rows import TeacherRows
from kdcache.train.checks import Check, InputCheck, check_labels, label_array
from kdcache.train.class_map import ClassMap

Missing: TypeAlias = Literal["error", "ce", "skip"]


class BatchReader:
    """Rows of a cache for batches of items, checked against these items.

    A sample has a position among the samples of the cache, and a row for each view of it.

    Args:
        cache: an open cache.
        missing: what to do about samples that it does not hold.
        check: how far inputs are compared.
        class_map: of items whose labels are classes of the student, not of the cache.

    Raises:
        UsageError: no cache, another `missing` or `check`.
    """

    def __init__(self, cache: Cache, *, missing: Missing, check: Check, class_map: ClassMap | None = None) -> None:
        if not isinstance(cache, Cache):
            raise UsageError(
                f"the cache is a {type(cache).__name__}, expected what kdcache.open returns: it comes second, as in "
                "kdcache.join(dataset, cache) and kdcache.attach(loader, cache)"
            )
        if missing not in ("error", "ce", "skip"):
            raise UsageError(f"missing must be error, ce or skip, found {missing!r}")
        self.cache = cache
        self.missing = missing
        self._class_map = class_map
        self._inputs = InputCheck(cache, check)
        self._slots = {view: slot for slot, view in enumerate(cache.views)}

    @property
    def checked(self) -> str:
        """What is compared, in words."""
        return self._inputs.note

    @property
    def compares_inputs(self) -> bool:
        """Whether `read` has a use for inputs."""
        return self._inputs.active

    def cover(self, sample_ids: np.ndarray) -> np.ndarray:
        """Positions (N,) int64 of the samples of a whole data set, -1 where the cache has none.

        Raises:
            CoverageError: some are missing and `missing` is "error", or all of them are.
            MismatchError: ids of another kind.
        """
        positions = self.cache.find(sample_ids, self.cache.views[0])
        absent = np.flatnonzero(positions < 0)
        if len(absent) and len(absent) == len(positions):
            raise CoverageError(
                f"none of the {len(positions)} samples of the data set is in {self.cache.path.name} (it holds "
                f"{show_ids(self.cache.first_ids(6))}, the data set {show_ids(sample_ids[:6])}): it is the cache of "
                "another data set, or the ids are of another kind. Give it the ids of the dump (sample_ids=, an "
                "attribute sample_ids, or the array sample_id of npz:FILE)"
            )
        self._check_missing(sample_ids, absent, "the data set")
        return positions

    def find(self, sample_ids: np.ndarray) -> np.ndarray:
        """Positions (N,) int64 of the samples of a batch, -1 where the cache has none.

        Raises:
            CoverageError: some are missing and `missing` is "error".
            MismatchError: ids of another kind.
        """
        positions = self.cache.find(sample_ids, self.cache.views[0])
        self._check_missing(sample_ids, np.flatnonzero(positions < 0), "a batch")
        return positions

    def rows(self, positions: np.ndarray, views: Sequence[int]) -> np.ndarray:
        """Rows (N,) int64 of samples, each in its view; -1 where the position is.

        Raises:
            MismatchError: the cache has no such view.
        """
        if len(self._slots) == 1 and set(views) <= self._slots.keys():
            return positions
        try:
            slots = np.array([self._slots[view] for view in views], np.int64)
        except KeyError as error:
            raise MismatchError(
                f"a batch holds a sample in view {error.args[0]}, and {self.cache.path.name} has the views "
                f"{list(self.cache.views)}: build the loader over kdcache.with_ids(dataset, cache=cache)"
            ) from None
        return np.where(positions < 0, -1, positions + slots * self.cache.num_samples)

    def read(
        self,
        rows: np.ndarray,
        sample_ids: np.ndarray,
        *,
        labels: Any,
        partners: Any = None,
        input_at: Callable[[int], Any] | None,
    ) -> TeacherRows:
        """One batch as tensors, after its labels and some of its inputs have been compared.

        Args:
            rows: (N,) as `rows` gives them.
            sample_ids: (N,) of the items.
            labels: the items' labels, see `check_labels`.
            partners: the labels of those that the items are mixed with.
            input_at: the first input at a position of the batch; None where inputs cannot be had.

        Raises:
            MismatchError: a label or an input differs.
            CorruptCacheError: the cache is damaged.
        """
        stored = self.cache.gather(rows)
        if not stored.has_teacher.all():
            stored = replace(stored, sample_id=sample_ids)  # the cache has no id for a row it does not hold
        known = stored if self._class_map is None else self._class_map.with_labels(stored)
        check_labels(labels, known, self.cache.path.name, own=None if known is stored else stored.label)
        if partners is not None:
            self._check_partners(partners, known)
        if self._inputs.active and input_at is not None:
            compared = label_array(labels) is not None
            self._inputs.compare(self._inputs.choose(sample_ids), input_at, stored, labels_agree=compared)
        return stored.tensors()

    def _check_partners(self, partners: Any, stored: TeacherRows) -> None:
        found = label_array(partners)
        if found is None or stored.label_b is None or len(found) != len(stored):
            return
        differs = (found != stored.label_b) & stored.has_teacher
        if self._class_map is not None:  # the teacher's classes do not hold all labels
            differs &= stored.label_b != -1
        if differs.any():
            at = int(np.flatnonzero(differs)[0])
            raise MismatchError(
                f"sample {show_id(stored.sample_id[at])} is mixed with one of label {int(found[at])} in view "
                f"{int(stored.view[at])} here and of label {int(stored.label_b[at])} in {self.cache.path.name}: "
                "partners are drawn from the cache's samples in its order. Join with the cache itself (join, or "
                "with_ids(dataset, cache=cache)), and check that the data set's labels are those of the dump"
            )

    def _check_missing(self, sample_ids: np.ndarray, absent: np.ndarray, whole: str) -> None:
        if len(absent) and self.missing == "error":
            raise CoverageError(
                f"{len(absent)} of the {len(sample_ids)} samples of {whole} are not in {self.cache.path.name}: "
                f"{show_ids(sample_ids[absent[:6]])}. Dump them as well, or choose missing='skip' to leave them out or "
                "missing='ce' to train them on their labels alone (--missing skip|ce)"
            )
