"""A data set that grew after its dump: the new samples go behind those that are stored, which are not touched.

The rows of a folder that grew are not in the order of the data set any more, so every later command on it takes the
samples in their stored order. Before the first shard is added, what is stored is compared with the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from kdcache.errors import MismatchError
from kdcache.format.identity import ids_sha256, input_digest, show_id, show_ids
from kdcache.stages.loaded_data import NO_LABEL, LoadedData
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.store.folder import MANIFEST, read_manifest
from kdcache.store.posix import exists
from kdcache.store.stored_ids import stored_ids
from kdcache.store.writer import dump_folder_of
from kdcache.train.checks import label_array
from kdcache.train.diagnosis import diagnose
from kdcache.train.items import first_input, label_of, load_items
from kdcache.train.replay import Replay
from kdcache.train.viewed import ViewedItems

_COMPARED = 256
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class StoredOrder:
    """The samples of a data set in the order of a folder's rows.

    Attributes:
        places: (N,) positions in the data set, those of stored samples first.
        stored: how many of them are stored.
        extents: of the plan that stores all of them.
        views: of the folder.
        id_dtype: of the folder.
    """

    places: np.ndarray
    stored: int
    extents: tuple[int, ...]
    views: tuple[int, ...]
    id_dtype: np.dtype[Any]

    @property
    def grows(self) -> bool:
        """Whether samples come to it."""
        return self.stored < len(self.places)


@dataclass(frozen=True)
class Growth:
    """What came to a cache, and what the data set says now about samples that were there before.

    Attributes:
        samples_before: of the cache.
        samples_added: new ones.
        inputs_compared: old samples, chosen at random, whose inputs are as they were.
        labels_compared: old samples whose labels were compared.
        labels_changed: those with another label now; the cache keeps the one that it has.
        changed_ids: the first of them.
    """

    samples_before: int
    samples_added: int
    inputs_compared: int
    labels_compared: int
    labels_changed: int
    changed_ids: tuple[str | int, ...]


def stored_order(out: Path, ids: np.ndarray, *, overwrite: bool) -> StoredOrder | None:
    """The order of a finished folder that grew or is to grow; None where rows are in the order of the data set.

    Args:
        out: the target of the dump.
        ids: (N,) of the data set, distinct.
        overwrite: the target is replaced.

    Raises:
        MismatchError: the folder has samples that the data set lacks, or no room for its longer ids.
        IncompleteCacheError: shards are gone, and which samples they held cannot be told.
    """
    folder, one_file = dump_folder_of(out)
    if overwrite or one_file or not exists(folder / MANIFEST):
        return None
    manifest = read_manifest(folder)
    if not manifest.extents and manifest.samples >= len(ids):
        return None
    dtype = np.dtype(manifest.schema.id_dtype)
    if dtype.kind != ids.dtype.kind:
        return None  # another data set; the comparison of the plans says so
    stored = stored_ids(folder, manifest)
    places, missing = _places(stored, ids)
    if len(missing):
        raise MismatchError(
            f"{out} holds {len(stored)} samples, of which this data set of {len(ids)} lacks {len(missing)} "
            f"({show_ids(missing)}): a cache takes further samples and loses none. Use another --out for a new dump, "
            "or --overwrite to replace this one"
        )
    if ids.dtype.itemsize > dtype.itemsize:
        raise MismatchError(
            f"{out} has room for sample ids of {dtype.itemsize} bytes, and the data set has one of "
            f"{ids.dtype.itemsize}: use another --out for a new dump, or --overwrite to replace this one"
        )
    is_new = np.ones(len(ids), bool)
    is_new[places] = False
    extents = manifest.extents or (manifest.samples,)
    extents = (*extents, len(ids)) if is_new.any() else manifest.extents
    return StoredOrder(np.concatenate([places, np.flatnonzero(is_new)]), len(stored), extents, manifest.views, dtype)


def in_order(data: LoadedData, ids: np.ndarray, order: StoredOrder) -> tuple[LoadedData, np.ndarray]:
    """The data set and its ids in the stored order; what identifies the data stays that of its own order."""
    known = data.provenance.get("ids_sha256") or ids_sha256(ids)
    dataset = _InOrder(data.dataset, order.places)
    ordered = replace(data, dataset=dataset, provenance={**data.provenance, "ids_sha256": known})
    return ordered, ids[order.places].astype(order.id_dtype)


def compare_stored(
    out: Path, data: LoadedData, ids: np.ndarray, replay: Replay | None, order: StoredOrder, *, seed: int = 0
) -> Growth:
    """Compares what is stored with the data set that has grown: inputs of some samples, labels of all where it can.

    Labels of all samples are compared where the data set has them as an array (`labels` or `targets`) that agrees with
    its items, else those of the samples whose inputs are compared.

    Args:
        out: the folder.
        data: in the stored order.
        ids: (N,) of it.
        replay: the pipeline of the dump.
        order: of the folder.
        seed: of the samples.

    Raises:
        MismatchError: an input is another one now, or the views mix samples, which other samples would change.
    """
    if replay is not None and replay.mix is not None:
        raise MismatchError(
            f"{out} holds views that mix samples with others of the whole data set, and further samples would change "
            "all of them: use another --out for a new dump, or --overwrite to replace this one"
        )
    with open_cache(out) as cache:
        view = cache.views[0]
        parts = [part for part in cache.catalog.parts if part.view == view and exists(part.path)]
        present = np.concatenate([np.arange(part.start, part.start + part.rows) for part in parts])
        chosen = np.sort(np.random.default_rng(seed).choice(present, min(_COMPARED, len(present)), replace=False))
        viewed = ViewedItems(data.dataset, ids, replay).load(chosen.tolist(), [view] * len(chosen))
        _compare_inputs(cache, out, chosen, [first_input(one.item) for one in viewed])
        labels = [NO_LABEL if (label := label_of(one.item)) is None else label for one in viewed]
        at, found = _labels(data.dataset, present, chosen, labels)
        changed = at[_differ(cache, at, found)]
        return Growth(
            samples_before=order.stored,
            samples_added=len(ids) - order.stored,
            inputs_compared=len(chosen),
            labels_compared=len(at) if cache.has_labels else 0,
            labels_changed=len(changed),
            changed_ids=tuple(
                value.decode(errors="replace") if isinstance(value, bytes) else value
                for value in ids[changed[:_SHOWN]].tolist()
            ),
        )


class _InOrder(Dataset[Any]):
    """A data set whose items stand in another order."""

    def __init__(self, dataset: Any, places: np.ndarray) -> None:
        self.dataset = dataset
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.places[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return load_items(self.dataset, self.places[np.asarray(indices, np.int64)].tolist())


def _places(stored: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each stored id is in `ids`, and those that are nowhere."""
    sorter = np.argsort(ids, kind="stable")
    at = np.minimum(np.searchsorted(ids, stored, sorter=sorter), len(ids) - 1)
    places: np.ndarray = sorter[at]
    return places, stored[ids[places] != stored]


def _compare_inputs(cache: Cache, out: Path, chosen: np.ndarray, inputs: list[Any]) -> None:
    stored = cache.gather(chosen)
    found = np.array([input_digest(value) for value in inputs], np.uint64)
    if stored.input_digest is None or (found == stored.input_digest).all():
        return
    diagnosis = diagnose(cache, stored, found)
    raise MismatchError(
        f"{out} would grow by samples of another data set: the input of sample "
        f"{show_id(stored.sample_id[diagnosis.sample])} is not the one that was dumped. Likely cause: "
        f"{diagnosis.text}. Nothing was added"
    )


def _labels(dataset: Any, present: np.ndarray, chosen: np.ndarray, labels: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) positions of samples and (n,) labels of these: of all that are present, or of the chosen."""
    of_items = label_array(labels)
    if of_items is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    inner = dataset.dataset
    column = next((c for name in ("labels", "targets") if (c := getattr(inner, name, None)) is not None), None)
    known = label_array(column)
    if known is None or len(known) != len(inner) or not np.array_equal(known[dataset.places[chosen]], of_items):
        return chosen, of_items
    return present, known[dataset.places[present]]


def _differ(cache: Cache, at: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(n,) whether a label is known on both sides, and another one."""
    if not cache.has_labels:
        return np.zeros(len(at), bool)
    stored = np.concatenate([cache.stored("label", start, stop) for start, stop in _runs(at)] or [found])
    differs: np.ndarray = (found != stored) & (found != NO_LABEL) & (stored != NO_LABEL)
    return differs


def _runs(at: np.ndarray) -> list[tuple[int, int]]:
    """Ascending positions as ranges of consecutive ones."""
    if not len(at):
        return []
    borders = np.flatnonzero(np.diff(at) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(at, borders)]
