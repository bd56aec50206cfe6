"""`join`: a data set whose items carry the teacher's row of the same sample, for any DataLoader.

The rows travel through the loader's workers with the rest of the batch. `attach` gathers them in the
consuming process instead, which is faster, since nothing but ids crosses the process border.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
from torch.utils.data import Dataset

from kdcache.store.cache import Cache
from kdcache.train import ids
from kdcache.train.checks import Check
from kdcache.train.items import TEACHER_KEY, first_input, label_of, load_items, with_part
from kdcache.train.reading import BatchReader, Missing
from kdcache.train.rows import TeacherRow


def join(
    dataset: Any,
    cache: Cache,
    *,
    sample_ids: Any = None,
    id_key: str | None = None,
    missing: Missing = "error",
    check: Check = "sample",
    view: int = 0,
) -> JoinedDataset:
    """Puts each sample's cached teacher row beside its item, found by sample id.

    Tuple and list items get the row at their end, dict items under the key "teacher", a bare input x becomes
    (x, row). Single items hold a `TeacherRow`; `default_collate` makes `TeacherRows` tensors (N, C, ...) of them,
    which every loss of kdcache takes.

    Args:
        dataset: a map-style data set.
        cache: from `kdcache.open`.
        sample_ids: one id per item, where the data set does not say itself; see `kdcache.train.ids`.
        id_key: the key of dict items that holds the id.
        missing: samples that the cache lacks: "error" refuses them now, "skip" drops their items, "ce" gives
            them rows with `has_teacher` False, so that the loss uses their labels alone.
        check: besides ids and labels, compare the inputs with the dump's: "sample" some, "full" all, "ids" none.
        view: which view of the cache.

    Returns:
        A picklable data set, for workers of any start method.

    Raises:
        DataError: no ids to be had from the data set.
        CoverageError: the cache lacks samples.
        MismatchError: no such view, ids of another kind; later, on a batch: a label or an input that differs.
    """
    reader = BatchReader(cache, missing=missing, check=check, view=view)
    resolved = ids.resolve(dataset, sample_ids=sample_ids, id_key=id_key)
    rows = reader.cover(resolved)
    inner = np.arange(len(rows)) if missing != "skip" else np.flatnonzero(rows >= 0)
    return JoinedDataset(dataset, reader, resolved[inner], rows[inner], inner)


@final
class JoinedDataset(Dataset[Any]):
    """Made by `join`.

    Attributes:
        dataset: the joined data set.
        sample_ids: (N,) the id of each item.
    """

    def __init__(
        self, dataset: Any, reader: BatchReader, sample_ids: np.ndarray, rows: np.ndarray, inner: np.ndarray
    ) -> None:
        self.dataset = dataset
        self.sample_ids = sample_ids
        self._reader = reader
        self._rows = rows
        self._inner = inner

    @property
    def cache(self) -> Cache:
        """The cache."""
        return self._reader.cache

    @property
    def checked(self) -> str:
        """What is compared between items and cache, in words."""
        return self._reader.checked

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The items at some indices, with one gather for all of them (a DataLoader calls this)."""
        at = np.asarray(indices, np.int64)
        inner = self._inner[at].tolist()
        items = load_items(self.dataset, inner)
        batch = self._reader.read(
            self._rows[at],
            self.sample_ids[at],
            labels=[label_of(item) for item in items],
            input_at=lambda position: first_input(items[position]),
        )
        return [with_part(item, TeacherRow(batch, place), key=TEACHER_KEY) for place, item in enumerate(items)]
