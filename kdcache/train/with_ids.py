"""`with_ids`: a data set whose items carry their sample id and view, so that `attach` finds the teacher's rows later.

Ids cross the border between worker and training process as a few bytes; rows of 1000 classes are two
kilobytes. They are a type of their own, so that a label is never taken for an id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from torch.utils.data import Dataset
from torch.utils.data._utils.collate import default_collate_fn_map

from kdcache.errors import UsageError
from kdcache.format.identity import as_sample_ids
from kdcache.store.cache import Cache
from kdcache.train import ids
from kdcache.train.cache_views import Augment, as_replay, choice_of, pipeline_of
from kdcache.train.items import SAMPLE_ID_KEY, load_items, with_part
from kdcache.train.replay import Replay
from kdcache.train.view_order import ViewChoice, ViewOrder, own_choice
from kdcache.train.viewed import ViewedItems


@final
@dataclass(slots=True, eq=False)  # not frozen: one is made for every item, see TeacherRow
class SampleId:
    """The id of one item, an integer or bytes, and the view it is in; None where items come as they are."""

    value: int | bytes
    view: int | None = None


@final
@dataclass(frozen=True, eq=False)
class SampleIds:
    """The ids of a batch: what `default_collate` makes of `SampleId`s.

    Attributes:
        values: (N,) int64 or fixed-length bytes.
        views: (N,) int64; None where items come as they are.
    """

    values: np.ndarray
    views: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: np.ndarray) -> SampleIds:
        """Those at some positions."""
        return SampleIds(self.values[index], None if self.views is None else self.views[index])


def with_ids(
    dataset: Any,
    *,
    sample_ids: Any = None,
    id_key: str | None = None,
    cache: Cache | None = None,
    augment: Augment | None = None,
    view: int | None = None,
    views: int | None = None,
    view_order: ViewOrder | None = None,
    seed: int = 0,
) -> IdentifiedDataset:
    """Puts each sample's id into its item, for `kdcache.attach`, and the item into a view.

    Tuple and list items get a `SampleId` at their end, dict items under the key "sample_id" (which replaces an
    id of that name), a bare input x becomes (x, id). The label of a mixed view (MixUp, CutMix) becomes a
    `MixedLabel` of both labels, which the losses take.

    Args:
        dataset: a map-style data set.
        sample_ids: one id per item, where the data set does not say itself; see `kdcache.train.ids`.
        id_key: the key of dict items that holds the id.
        cache: the one to attach, where it was dumped with augmentation: items come in its views.
        augment: the pipeline, where the cache does not name it, or without a cache: by name, a transform, or what
            `kdcache.views` makes of it.
        view: this view alone.
        views: the first so many of the cache; without a cache the views 0 to `views` - 1, or by default a new view
            in each epoch.
        view_order: as in `kdcache.join`.
        seed: of the views without a cache, where `augment` does not bring its own.

    Returns:
        A picklable data set of the same length.

    Raises:
        DataError: no ids to be had from the data set; later: the pipeline failed.
        UsageError: views of an unknown pipeline.
        MismatchError: the cache lacks these views, or was dumped with another pipeline.

    >>> item = with_ids([("x", 0), ("y", 1)])[1]
    >>> item[2].value
    1
    """
    resolved = ids.resolve(dataset, sample_ids=sample_ids, id_key=id_key)
    partner_ids = None
    if cache is not None:
        replay = pipeline_of(cache, augment)
        choice = choice_of(cache, view=view, views=views, view_order=view_order)
        partner_ids = cache.sample_ids if replay is not None and replay.mix is not None else None
    else:
        replay = None if augment is None else as_replay(augment, seed=seed)
        choice = own_choice(view=view, views=views, view_order=view_order)
        if replay is None and any(value is not None for value in (view, views, view_order)):
            raise UsageError(
                "view=, views= and view_order= choose among views of a pipeline, and there is none: give augment=, or "
                "the cache that was dumped with one"
            )
    has_views = replay is not None or (cache is not None and len(cache.views) > 1)
    items = ViewedItems(dataset, resolved, replay, partner_ids)
    return IdentifiedDataset(dataset, resolved, items, replay, choice if has_views else None)


@final
class IdentifiedDataset(Dataset[Any]):
    """Made by `with_ids`.

    Attributes:
        dataset: the data set itself.
        sample_ids: (N,) the id of each item.
        replay: the pipeline of its views; None where items come as they are.
        views: the views that items come in; None where they come as they are, or in views without end.
    """

    def __init__(
        self,
        dataset: Any,
        sample_ids: np.ndarray,
        items: ViewedItems,
        replay: Replay | None,
        choice: ViewChoice | None,
    ) -> None:
        self.dataset = dataset
        self.sample_ids = sample_ids
        self.replay = replay
        self.views = None if choice is None else choice.views
        self._items = items
        self._choice = choice

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch, from 0, to all workers, those that live on included; before the loader is iterated.

        Raises:
            UsageError: below 0.
        """
        if self._choice is not None:
            self._choice.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The items at some indices (a DataLoader calls this)."""
        sample_ids = self.sample_ids[np.asarray(indices, np.int64)]
        if self._choice is None:
            items = load_items(self.dataset, indices)
            return [_with_id(item, SampleId(value)) for item, value in zip(items, sample_ids.tolist(), strict=True)]
        views = self._choice.take(sample_ids)
        viewed = self._items.load(indices, views)
        return [
            _with_id(one.labelled, SampleId(value, view))
            for one, value, view in zip(viewed, sample_ids.tolist(), views, strict=True)
        ]


def collate_ids(
    batch: Sequence[SampleId], *, collate_fn_map: dict[type | tuple[type, ...], Callable[..., Any]] | None = None
) -> SampleIds:
    """The ids of a batch (registered with `default_collate` when this module is imported)."""
    values = [sample.value for sample in batch]
    integers = set(map(type, values)) == {int}  # the rule, and three times faster than looking at each
    found = np.array(values, np.int64) if integers else as_sample_ids(values)
    views = [sample.view for sample in batch if sample.view is not None]
    return SampleIds(found, np.array(views, np.int64) if len(views) == len(batch) else None)


def _with_id(item: Any, sample_id: SampleId) -> Any:
    if isinstance(item, tuple):  # first, since asking whether it is a Mapping takes a third of the time
        return (*item, sample_id)
    if isinstance(item, Mapping):
        return {**item, SAMPLE_ID_KEY: sample_id}
    return with_part(item, sample_id, key=SAMPLE_ID_KEY)


default_collate_fn_map[SampleId] = collate_ids
