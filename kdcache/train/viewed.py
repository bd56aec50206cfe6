"""Items of a data set in a view: the same code for the dump and for the student, so that both see the same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from kdcache.errors import CoverageError, DataError
from kdcache.format.identity import show_id
from kdcache.train.items import first_input, label_of, load_items, with_input, with_label
from kdcache.train.mixed_labels import MixedLabel
from kdcache.train.replay import Replay


@final
@dataclass(slots=True, eq=False)  # not frozen: one is made for every item, see TeacherRow
class Viewed:
    """One item in a view.

    Attributes:
        item: the data set's, its first input replaced by the shared view.
        label_b: the partner's label in a mixed view, -1 if it has none; None where nothing is mixed.
        mix_ratio: the share of the item itself in a mixed view, else 1.
    """

    item: Any
    label_b: int | None = None
    mix_ratio: float = 1.0

    @property
    def labelled(self) -> Any:
        """The item for training: of a mixed view, its label is a `MixedLabel` of both."""
        if self.label_b is None or label_of(self.item) is None:
            return self.item
        return with_label(self.item, MixedLabel(_label_number(self.item), self.label_b, self.mix_ratio))


@final
class ViewedItems:
    """Loads items of a data set in views.

    Args:
        dataset: map-style.
        sample_ids: (N,) of its items.
        replay: the pipeline; None leaves the items as they are.
        partner_ids: (M,) ids of the cache's samples in their order, that MixUp and CutMix choose partners from.

    Raises:
        CoverageError: the data set lacks samples that could be partners.
    """

    def __init__(
        self, dataset: Any, sample_ids: np.ndarray, replay: Replay | None, partner_ids: np.ndarray | None = None
    ) -> None:
        self._dataset = dataset
        self._sample_ids = sample_ids
        self._replay = replay
        self._partners: np.ndarray | None = None
        if replay is not None and replay.mix is not None:
            self._partners = _positions(sample_ids if partner_ids is None else partner_ids, sample_ids)

    @property
    def is_mixed(self) -> bool:
        """Whether items are mixed with others."""
        return self._partners is not None

    def load(self, indices: Sequence[int], views: Sequence[int]) -> list[Viewed]:
        """The items at some indices, each in its view.

        Raises:
            DataError: the pipeline failed, or views that cannot be mixed.
        """
        items = load_items(self._dataset, list(indices))
        replay = self._replay
        if replay is None:
            return [Viewed(item) for item in items]
        ids = self._sample_ids[np.asarray(indices, np.int64)].tolist()
        if replay.mix is None:
            shared = replay.each([first_input(item) for item in items], ids, views)
            return [Viewed(with_input(item, value)) for item, value in zip(items, shared, strict=True)]
        assert self._partners is not None
        draws = [
            replay.mix.draw(replay.seed, sample_id, view, len(self._partners))
            for sample_id, view in zip(ids, views, strict=True)
        ]
        others = self._partners[[draw.partner for draw in draws]]
        partners = load_items(self._dataset, others.tolist())
        inputs = [first_input(item) for item in (*items, *partners)]
        shared = replay.each(inputs, [*ids, *self._sample_ids[others].tolist()], [*views, *views])
        mixed = []
        for place, draw in enumerate(draws):
            value, ratio = replay.mix(shared[place], shared[place + len(items)], draw)
            mixed.append(Viewed(with_input(items[place], value), _label_number(partners[place]), ratio))
        return mixed


def _positions(wanted: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Where each wanted id is in `present`: (M,) int64."""
    order = np.argsort(present, kind="stable")
    at = np.searchsorted(present, wanted, sorter=order)
    found = order[np.minimum(at, len(order) - 1)]
    absent = np.flatnonzero(present[found] != wanted)
    if len(absent):
        raise CoverageError(
            f"the views of this cache mix each sample with one of its {len(wanted)} samples, and the data set lacks "
            f"{len(absent)} of them (the first is {show_id(wanted[absent[0]])}): join the whole data set, and choose "
            "the samples to train on with a sampler"
        )
    return found


def _label_number(item: Any) -> int:
    label = label_of(item)
    if label is None:
        return -1
    try:
        return int(label)
    except (TypeError, ValueError):
        raise DataError(f"MixUp and CutMix mix class numbers, found a label of {type(label).__name__}") from None
