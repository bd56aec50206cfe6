"""`join`: a data set whose items carry the teacher's row of the same sample, for any DataLoader.

The rows travel through the loader's workers with the rest of the batch. `attach` gathers them in the
consuming process instead, which is faster, since nothing but ids crosses the process border.

Of a cache of augmented views the items come as the teacher saw them: pixels, row, labels and digest of an item belong
to one and the same drawn view, so that a change of epoch cannot part them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
from torch.utils.data import Dataset

from kdcache.store.cache import Cache
from kdcache.train import ids
from kdcache.train.cache_views import Augment, choice_of, pipeline_of
from kdcache.train.checks import Check
from kdcache.train.class_map import ClassMap
from kdcache.train.items import TEACHER_KEY, first_input, label_of, with_input, with_part
from kdcache.train.reading import BatchReader, Missing
from kdcache.train.rows import TeacherRow
from kdcache.train.view_order import ViewChoice, ViewOrder
from kdcache.train.viewed import ViewedItems


def join(
    dataset: Any,
    cache: Cache,
    *,
    sample_ids: Any = None,
    id_key: str | None = None,
    missing: Missing = "error",
    check: Check = "sample",
    view: int | None = None,
    views: int | None = None,
    view_order: ViewOrder | None = None,
    augment: Augment | None = None,
    transform: Callable[[Any], Any] | None = None,
    class_map: ClassMap | None = None,
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
        view: this view of the cache alone.
        views: the first so many views of the cache; all of them by default.
        view_order: which of several views an access takes: "epoch" that of `set_epoch`'s number (e mod views),
            "random" any; by default the epoch's once it was told, before that any.
        augment: the pipeline of the dump, where it is a transform of your own: the transform, or what
            `kdcache.views` makes of it. One that ships with kdcache is built from the cache's provenance.
        transform: the student's own normalisation and scaling of the first input, after the shared view and after
            it was compared with the dump's.
        class_map: of items whose labels are not the teacher's classes; stored labels are compared through it. The rows
            stay the teacher's: `class_map.rows(rows, labels)` maps them.

    Returns:
        A picklable data set, for workers of any start method.

    Raises:
        DataError: no ids to be had from the data set; later: the pipeline failed.
        CoverageError: the cache lacks samples, or the data set some that MixUp and CutMix need.
        MismatchError: no such views, another pipeline than the dump's, ids of another kind; later, on a batch: a label
            or an input that differs.
        UsageError: the dump's pipeline has to be given; later: `view_order="epoch"` and nobody told the epoch.
    """
    reader = BatchReader(cache, missing=missing, check=check, class_map=class_map)
    choice = choice_of(cache, view=view, views=views, view_order=view_order)
    replay = pipeline_of(cache, augment)
    resolved = ids.resolve(dataset, sample_ids=sample_ids, id_key=id_key)
    positions = reader.cover(resolved)
    mixes = replay is not None and replay.mix is not None
    items = ViewedItems(dataset, resolved, replay, cache.sample_ids if mixes else None)
    inner = np.arange(len(positions)) if missing != "skip" else np.flatnonzero(positions >= 0)
    return JoinedDataset(dataset, items, reader, resolved[inner], positions[inner], inner, choice, transform)


@final
class JoinedDataset(Dataset[Any]):
    """Made by `join`.

    Attributes:
        dataset: the joined data set.
        sample_ids: (N,) the id of each item.
    """

    def __init__(
        self,
        dataset: Any,
        items: ViewedItems,
        reader: BatchReader,
        sample_ids: np.ndarray,
        positions: np.ndarray,
        inner: np.ndarray,
        choice: ViewChoice,
        transform: Callable[[Any], Any] | None,
    ) -> None:
        self.dataset = dataset
        self.sample_ids = sample_ids
        self._items = items
        self._reader = reader
        self._positions = positions
        self._inner = inner
        self._choice = choice
        self._transform = transform

    @property
    def cache(self) -> Cache:
        """The cache."""
        return self._reader.cache

    @property
    def checked(self) -> str:
        """What is compared between items and cache, in words."""
        return self._reader.checked

    @property
    def views(self) -> tuple[int, ...]:
        """The views that items come in."""
        assert self._choice.views is not None
        return self._choice.views

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch, from 0, to all workers, those that live on included; before the loader is iterated.

        Raises:
            UsageError: below 0.
        """
        self._choice.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The items at some indices, with one gather for all of them (a DataLoader calls this)."""
        at = np.asarray(indices, np.int64)
        sample_ids = self.sample_ids[at]
        views = self._choice.take(sample_ids)
        viewed = self._items.load(self._inner[at].tolist(), views)
        batch = self._reader.read(
            self._reader.rows(self._positions[at], views),
            sample_ids,
            labels=[label_of(one.item) for one in viewed],
            partners=[one.label_b for one in viewed] if self._items.is_mixed else None,
            input_at=lambda position: first_input(viewed[position].item),
        )
        items = [one.labelled for one in viewed] if self._items.is_mixed else [one.item for one in viewed]
        if self._transform is not None:
            items = [with_input(item, self._transform(first_input(item))) for item in items]
        return [with_part(item, TeacherRow(batch, place), key=TEACHER_KEY) for place, item in enumerate(items)]
