"""`with_ids`: a data set whose items carry their sample id, so that `attach` finds the teacher's rows later.

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

from kdcache.format.identity import as_sample_ids
from kdcache.train import ids
from kdcache.train.items import SAMPLE_ID_KEY, load_items, with_part


@final
@dataclass(slots=True, eq=False)  # not frozen: one is made for every item, see TeacherRow
class SampleId:
    """The id of one item: an integer or bytes."""

    value: int | bytes


@final
@dataclass(frozen=True, eq=False)
class SampleIds:
    """The ids of a batch, (N,) int64 or fixed-length bytes: what `default_collate` makes of `SampleId`s."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


def with_ids(dataset: Any, *, sample_ids: Any = None, id_key: str | None = None) -> IdentifiedDataset:
    """Puts each sample's id into its item, for `kdcache.attach`.

    Tuple and list items get a `SampleId` at their end, dict items under the key "sample_id" (which replaces an
    id of that name), a bare input x becomes (x, id).

    Args:
        dataset: a map-style data set.
        sample_ids: one id per item, where the data set does not say itself; see `kdcache.train.ids`.
        id_key: the key of dict items that holds the id.

    Returns:
        A picklable data set of the same length.

    Raises:
        DataError: no ids to be had from the data set.

    >>> with_ids([("x", 0), ("y", 1)])[1]
    ('y', 1, SampleId(value=1))
    """
    return IdentifiedDataset(dataset, ids.resolve(dataset, sample_ids=sample_ids, id_key=id_key))


@final
class IdentifiedDataset(Dataset[Any]):
    """Made by `with_ids`.

    Attributes:
        dataset: the data set itself.
        sample_ids: (N,) the id of each item.
    """

    def __init__(self, dataset: Any, sample_ids: np.ndarray) -> None:
        self.dataset = dataset
        self.sample_ids = sample_ids

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> Any:
        return _with_id(self.dataset[index], self.sample_ids[index].item())

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The items at some indices (a DataLoader calls this)."""
        values = self.sample_ids[np.asarray(indices, np.int64)].tolist()
        items = load_items(self.dataset, indices)
        return [_with_id(item, value) for item, value in zip(items, values, strict=True)]


def collate_ids(
    batch: Sequence[SampleId], *, collate_fn_map: dict[type | tuple[type, ...], Callable[..., Any]] | None = None
) -> SampleIds:
    """The ids of a batch (registered with `default_collate` when this module is imported)."""
    values = [sample.value for sample in batch]
    integers = set(map(type, values)) == {int}  # the rule, and three times faster than looking at each
    return SampleIds(np.array(values, np.int64) if integers else as_sample_ids(values))


def _with_id(item: Any, value: int | bytes) -> Any:
    if isinstance(item, tuple):  # first, since asking whether it is a Mapping takes a third of the time
        return (*item, SampleId(value))
    if isinstance(item, Mapping):
        return {**item, SAMPLE_ID_KEY: SampleId(value)}
    return with_part(item, SampleId(value), key=SAMPLE_ID_KEY)


default_collate_fn_map[SampleId] = collate_ids
