"""What `join` and `attach` share: coverage when they are made, then one gather and the checks for each batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np

from kdcache.errors import CoverageError, UsageError
from kdcache.format.identity import show_ids
from kdcache.store.cache import Cache
from kdcache.store.rows import TeacherRows
from kdcache.train.checks import Check, InputCheck, check_labels

Missing: TypeAlias = Literal["error", "ce", "skip"]


class BatchReader:
    """Rows of a cache for batches of items, checked against these items.

    Args:
        cache: an open cache.
        missing: what to do about samples that it does not hold.
        check: how far inputs are compared.
        view: which view.

    Raises:
        UsageError: another `missing` or `check`.
    """

    def __init__(self, cache: Cache, *, missing: Missing, check: Check, view: int) -> None:
        if missing not in ("error", "ce", "skip"):
            raise UsageError(f"missing must be error, ce or skip, found {missing!r}")
        self.cache = cache
        self.missing = missing
        self.view = view
        self._inputs = InputCheck(cache, check)

    @property
    def checked(self) -> str:
        """What is compared, in words."""
        return self._inputs.note

    @property
    def compares_inputs(self) -> bool:
        """Whether `read` has a use for inputs."""
        return self._inputs.active

    def cover(self, sample_ids: np.ndarray) -> np.ndarray:
        """Rows (N,) int64 of a whole data set, -1 where the cache has none.

        Raises:
            CoverageError: some are missing and `missing` is "error", or all of them are.
            MismatchError: no such view, or ids of another kind.
        """
        rows = self.cache.find(sample_ids, self.view)
        absent = np.flatnonzero(rows < 0)
        if len(absent) and len(absent) == len(rows):
            raise CoverageError(
                f"none of the {len(rows)} samples of the data set is in {self.cache.path.name} (it holds "
                f"{show_ids(self.cache.sample_ids[:6])}, the data set {show_ids(sample_ids[:6])}): it is the cache of "
                "another data set, or the ids are of another kind. Pass the ids of the dump as sample_ids="
            )
        self._check_missing(sample_ids, absent, "the data set")
        return rows

    def find(self, sample_ids: np.ndarray) -> np.ndarray:
        """Rows (N,) int64 of a batch, -1 where the cache has none.

        Raises:
            CoverageError: some are missing and `missing` is "error".
            MismatchError: no such view, or ids of another kind.
        """
        rows = self.cache.find(sample_ids, self.view)
        self._check_missing(sample_ids, np.flatnonzero(rows < 0), "a batch")
        return rows

    def read(
        self, rows: np.ndarray, sample_ids: np.ndarray, *, labels: Any, input_at: Callable[[int], Any] | None
    ) -> TeacherRows:
        """One batch as tensors, after its labels and some of its inputs have been compared.

        Args:
            rows: (N,) as `find` gives them.
            sample_ids: (N,) of the items.
            labels: the items' labels, see `check_labels`.
            input_at: the first input at a position of the batch; None where inputs cannot be had.

        Raises:
            MismatchError: a label or an input differs.
            CorruptCacheError: the cache is damaged.
        """
        stored = self.cache.gather(rows)
        if not stored.has_teacher.all():
            stored = replace(stored, sample_id=sample_ids)  # the cache has no id for a row it does not hold
        check_labels(labels, stored, self.cache.path.name)
        if self._inputs.active and input_at is not None:
            self._inputs.compare(self._inputs.choose(sample_ids), input_at, stored)
        return stored.tensors()

    def _check_missing(self, sample_ids: np.ndarray, absent: np.ndarray, whole: str) -> None:
        if len(absent) and self.missing == "error":
            raise CoverageError(
                f"{len(absent)} of the {len(sample_ids)} samples of {whole} are not in {self.cache.path.name}: "
                f"{show_ids(sample_ids[absent[:6]])}. Dump them as well, or choose missing='skip' to leave them out or "
                "missing='ce' to train them on their labels alone (--missing skip|ce)"
            )
