"""The rows that `kdcache verify` looks at beside the data set: some samples of a cache, replayed in all its views."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from torch.utils.data import Dataset

from kdcache.errors import MismatchError, UsageError
from kdcache.format.identity import show_id, show_ids
from kdcache.stages.loaded_data import NO_LABEL, LoadedData
from kdcache.store.cache import Cache
from kdcache.store.rows import TeacherRows
from kdcache.train.cache_views import Augment, pipeline_of
from kdcache.train.ids import resolve
from kdcache.train.viewed import Viewed, ViewedItems


@final
class ReplayedRows(Dataset[Any]):
    """Items as the teacher saw them, one for each of some rows of a cache.

    Attributes:
        stored: those rows (N,).
    """

    def __init__(self, items: ViewedItems, positions: np.ndarray, stored: TeacherRows) -> None:
        self.stored = stored
        self._items = items
        self._positions = positions

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The items of some rows."""
        return [viewed.item for viewed in self.load(indices)]

    def load(self, indices: list[int]) -> list[Viewed]:
        """The items of some rows with the labels that they are mixed with."""
        return self._items.load(self._positions[indices].tolist(), self.stored.view[indices].tolist())


def replayed_rows(
    cache: Cache,
    loaded: LoadedData,
    *,
    sample_ids: Any,
    id_key: str | None,
    augment: Augment | None,
    sample: int,
    seed: int,
) -> ReplayedRows:
    """Some samples of a cache in its views; only in the first where nothing says how the others were made.

    Args:
        cache: open.
        loaded: the data set.
        sample_ids: as in `kdcache.join`.
        id_key: as in `kdcache.join`.
        augment: as in `kdcache.join`.
        sample: how many samples.
        seed: of the random ones.

    Raises:
        UsageError: no samples, or the pipeline of the dump has to be given.
        MismatchError: the data set lacks some of the samples, or another pipeline than the dump's.
        CoverageError: it lacks samples that MixUp and CutMix need.
    """
    replay = pipeline_of(cache, augment)
    own = loaded.sample_ids if sample_ids is None and id_key is None else None
    ids = resolve(loaded.dataset, sample_ids=sample_ids, id_key=id_key) if own is None else own
    chosen = choose_rows(cache, sample, seed)
    slots = range(len(cache.views) if replay is not None else 1)
    stored = cache.gather(np.concatenate([chosen + slot * cache.num_samples for slot in slots]))
    positions = _positions(ids, stored.sample_id[: len(chosen)], cache, loaded.name)
    mixes = replay is not None and replay.mix is not None
    items = ViewedItems(loaded.dataset, ids, replay, cache.sample_ids if mixes else None)
    return ReplayedRows(items, np.tile(positions, len(slots)), stored)


def choose_rows(cache: Cache, count: int, seed: int) -> np.ndarray:
    """(n,) rows of the first view in order: first and last of the shards, up to half of `count`, and random ones.

    Raises:
        UsageError: fewer than one.
    """
    if count < 1:
        raise UsageError(f"--sample must be at least 1, found {count}")
    samples = cache.num_samples
    if samples <= count:
        return np.arange(samples)
    generator = np.random.default_rng(seed)
    parts = [part for part in cache.catalog.parts if part.view == cache.views[0]]
    edges = np.unique([row for part in parts for row in (part.start, part.start + part.rows - 1)])
    room = max(1, count // 2)
    if len(edges) > room:
        inner = generator.choice(edges[1:-1], max(0, room - 2), replace=False)
        edges = np.concatenate([edges[[0, -1]][:room], inner])
    others = np.setdiff1d(generator.choice(samples, count, replace=False), edges)
    return np.sort(np.concatenate([edges, others[: count - len(edges)]]))


def contradictions(labels: np.ndarray, stored: np.ndarray) -> int:
    """Rows whose two labels are known and not equal."""
    return int(((labels != stored) & (labels != NO_LABEL) & (stored != NO_LABEL)).sum())


def _positions(ids: np.ndarray, wanted: np.ndarray, cache: Cache, name: str) -> np.ndarray:
    """Positions in the data set of the sampled ids."""
    if ids.dtype.kind != wanted.dtype.kind:
        raise MismatchError(
            f"the sample ids of {cache.path.name} are like {show_id(wanted[0])}, those of {name} like "
            f"{show_id(ids[0])}: it is another data set, or its ids are made in another way"
        )
    where = {value: position for position, value in enumerate(ids.tolist())}
    found = np.array([where.get(value, -1) for value in wanted.tolist()])
    missing = np.flatnonzero(found < 0)
    if missing.size:
        raise MismatchError(
            f"{name} lacks {missing.size} of the {len(found)} samples that were picked from {cache.path.name} "
            f"({show_ids(wanted[missing])}): it is another data set or split, or its ids are made in another way"
        )
    return found
