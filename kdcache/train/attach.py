"""`attach`: a loader whose batches carry the teacher's rows, gathered in the process that trains.

Workers send ids, not rows: a batch of 256 rows of 1000 float16 classes is half a megabyte less to copy
between processes. The gather itself takes under 1 us a row and no lock.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch.utils.data import Subset

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.format.identity import as_sample_ids
from kdcache.store.cache import Cache
from kdcache.store.rows import TeacherRows
from kdcache.train.cache_views import choice_of, pipeline_of
from kdcache.train.checks import Check
from kdcache.train.class_map import ClassMap
from kdcache.train.items import SAMPLE_ID_KEY, TEACHER_KEY, first_input, label_of
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.reading import BatchReader, Missing
from kdcache.train.with_ids import IdentifiedDataset, SampleId, SampleIds, collate_ids


def attach(
    loader: Any,
    cache: Cache,
    *,
    missing: Missing = "error",
    check: Check = "sample",
    view: int | None = None,
    class_map: ClassMap | None = None,
) -> AttachedLoader:
    """Replaces the sample ids in each batch of a loader by the teacher's rows of these samples.

    Args:
        loader: an iterable of batches that hold ids, as a DataLoader over `with_ids(dataset)` gives them: lists
            or tuples with a `SampleIds` in them, or dicts with the ids under "sample_id".
        cache: from `kdcache.open`.
        missing: samples that the cache lacks: "error" refuses them (now, where the loader's data set comes from
            `with_ids`; otherwise in their batch), "skip" takes their rows out of the batch (a batch of nothing
            else is left out), "ce" gives them rows with `has_teacher` False.
        check: besides ids and labels, compare the inputs with the dump's: "sample" some, "full" all, "ids" none.
            Inputs are compared as they stand in the batch, after collate: one that mixes or pads inputs is refused.
        view: the view that all batches are in, where their ids do not say; by default the cache's only one. Of a
            cache with augmentation, `with_ids(dataset, cache=cache)` gives items in its views.
        class_map: of items whose labels are not the teacher's classes; stored labels are compared through it. The rows
            stay the teacher's: `class_map.rows(rows, labels)` maps them.

    Returns:
        An iterable with the loader's length. In place of the ids stands a `TeacherRows` of tensors (pinned where
        the loader pins), in dicts under "teacher". Other attributes are the loader's.

    Raises:
        CoverageError: the cache lacks samples.
        MismatchError: no such view, items of another pipeline than the dump's, ids of another kind; later, on a batch:
            a label or an input that differs.
        UsageError: several views, and a batch does not say which one its items are in.
    """
    reader = BatchReader(cache, missing=missing, check=check, class_map=class_map)
    if view is not None:
        choice_of(cache, view=view)  # refuses a view that the cache does not hold
    source, known = _known_source(getattr(loader, "dataset", None))
    if source is not None:
        _check_views(source, cache, view)
    if known is not None and len(known):
        reader.cover(known)
    return AttachedLoader(loader, reader, view=view)


@final
class AttachedLoader:
    """Made by `attach`; attributes that it does not have itself are those of `loader`."""

    def __init__(self, loader: Any, reader: BatchReader, *, view: int | None) -> None:
        self.loader = loader
        self._reader = reader
        self._view = view

    @property
    def cache(self) -> Cache:
        """The cache."""
        return self._reader.cache

    @property
    def checked(self) -> str:
        """What is compared between items and cache, in words."""
        return self._reader.checked

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        pin = bool(getattr(self.loader, "pin_memory", False)) and torch.cuda.is_available()
        for batch in self.loader:
            attached = self._attached(batch, pin=pin)
            if attached is not None:
                yield attached

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch to the loader, its samplers and its data set, to each that has a `set_epoch`.

        Before the loader is iterated. Data sets of `with_ids`, also parts of others, take their views by it.
        """
        parts = [self.loader, *(getattr(self.loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))]
        parts.append(getattr(parts[2], "sampler", None))
        parts += _identified(parts[3])
        seen: list[Any] = []
        for part in parts:
            if hasattr(part, "set_epoch") and not any(part is other for other in seen):
                part.set_epoch(epoch)
                seen.append(part)

    def _attached(self, batch: Any, *, pin: bool) -> Any | None:
        place, sample_ids = _ids_in(batch)
        positions = self._reader.find(sample_ids.values)
        if self._reader.missing == "skip" and not bool((positions >= 0).all()):
            keep = np.flatnonzero(positions >= 0)
            if not len(keep):
                return None
            batch = _take(batch, keep, len(positions))
            positions, sample_ids = positions[keep], sample_ids.take(keep)
        labels = label_of(batch)
        first, second = (labels.first, labels.second) if isinstance(labels, MixedLabels) else (labels, None)
        teacher = self._reader.read(
            self._reader.rows(positions, self._views(sample_ids)),
            sample_ids.values,
            labels=first,
            partners=second,
            input_at=_input_at(batch, len(positions)) if self._reader.compares_inputs else None,
        )
        return _put(batch, place, teacher.pin_memory() if pin else teacher)

    def _views(self, sample_ids: SampleIds) -> list[int]:
        """The views that the items of a batch are in."""
        if sample_ids.views is None:
            return [_fixed_view(self.cache, self._view)] * len(sample_ids)
        views: list[int] = sample_ids.views.tolist()
        if self._view is not None and set(views) - {self._view}:
            raise MismatchError(
                f"attach is told that all batches are in view {self._view}, and the ids of one name the views "
                f"{sorted(set(views))}: leave view= out"
            )
        return views


def _identified(dataset: Any) -> list[IdentifiedDataset]:
    """The data sets of `with_ids` that a data set consists of."""
    if isinstance(dataset, IdentifiedDataset):
        return [dataset]
    inner = [dataset.dataset] if isinstance(dataset, Subset) else getattr(dataset, "datasets", ())
    return [found for part in inner for found in _identified(part)] if isinstance(inner, (list, tuple)) else []


def _known_source(dataset: Any) -> tuple[IdentifiedDataset | None, np.ndarray | None]:
    """The data set of `with_ids` that a loader reads, if it is one, and the ids that it will serve."""
    if isinstance(dataset, IdentifiedDataset):
        return dataset, dataset.sample_ids
    if isinstance(dataset, Subset):
        source, inner = _known_source(dataset.dataset)
        return source, None if inner is None else inner[np.asarray(dataset.indices, np.int64)]
    return None, None


def _fixed_view(cache: Cache, view: int | None) -> int:
    """The view that items without one in their ids are in: the one that `attach` was told, or the only one."""
    if view is None and len(cache.views) > 1:
        raise UsageError(
            f"{cache.path.name} holds {len(cache.views)} views, and the ids do not say which of them the items are in: "
            "build the loader over kdcache.with_ids(dataset, cache=cache), with augment= where the pipeline of the "
            "dump is a transform of your own; or pass view= if all items are in one"
        )
    return cache.views[0] if view is None else view


def _check_views(source: IdentifiedDataset, cache: Cache, view: int | None) -> None:
    """Refuses items of another pipeline, or in other views, than the cache's."""
    if source.replay is None:
        if source.views is None:
            _fixed_view(cache, view)
        return
    pipeline_of(cache, source.replay)
    if source.views is None or not set(source.views) <= set(cache.views):
        found = "a new view in each epoch" if source.views is None else f"the views {list(source.views)}"
        raise MismatchError(
            f"with_ids gives {found}, and {cache.path.name} has the views {list(cache.views)}: build the data set as "
            "kdcache.with_ids(dataset, cache=cache)"
        )


def _ids_in(batch: Any) -> tuple[Any, SampleIds]:
    """Where the ids stand in a batch, and the ids."""
    if isinstance(batch, Mapping):
        if SAMPLE_ID_KEY in batch:
            return SAMPLE_ID_KEY, _as_ids(batch[SAMPLE_ID_KEY])
    elif isinstance(batch, (list, tuple)):
        for place in range(len(batch) - 1, -1, -1):
            part = batch[place]
            listed = isinstance(part, (list, tuple)) and len(part) > 0 and isinstance(part[0], SampleId)
            if isinstance(part, SampleIds) or listed:
                return place, _as_ids(part)
    raise DataError(
        f"a batch of the loader holds no sample ids (found {_outline(batch)}): build the loader over "
        "kdcache.with_ids(dataset), with a collate function that keeps the ids"
    )


def _as_ids(part: Any) -> SampleIds:
    if isinstance(part, SampleIds):
        return part
    if isinstance(part, (list, tuple)):
        return collate_ids([value if isinstance(value, SampleId) else SampleId(value) for value in part])
    return SampleIds(as_sample_ids(part))


def _outline(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, (list, tuple)):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch[:6])}"
    return f"a {type(batch).__name__}"


def _input_at(batch: Any, count: int) -> Callable[[int], Any] | None:
    """Access to single inputs of a batch, or None where it does not hold one input per row."""
    inputs = first_input(batch)
    if isinstance(inputs, (torch.Tensor, np.ndarray)):
        single = inputs.ndim > 0 and len(inputs) == count
    else:
        single = isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)) and len(inputs) == count
    return inputs.__getitem__ if single else None


def _put(batch: Any, place: Any, teacher: TeacherRows) -> Any:
    """The batch with the teacher's rows in place of the ids, of the same type."""
    if isinstance(batch, Mapping) and TEACHER_KEY in batch:
        raise DataError(f"the batches have a key {TEACHER_KEY!r} already, which kdcache would overwrite: rename it")
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)
        del changed[place]
        changed[TEACHER_KEY] = teacher
        return changed
    if isinstance(batch, Mapping):
        return {**{key: value for key, value in batch.items() if key != place}, TEACHER_KEY: teacher}
    parts = [*batch[:place], teacher, *batch[place + 1 :]]
    if isinstance(batch, tuple):
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return parts


def _take(part: Any, keep: np.ndarray, count: int) -> Any:
    """The kept rows of everything in a batch that has one entry per row."""
    if isinstance(part, (torch.Tensor, np.ndarray)):
        return part[keep] if part.ndim and len(part) == count else part
    if isinstance(part, SampleIds):
        return part.take(keep)
    if isinstance(part, MixedLabels):
        return MixedLabels(part.first[keep], part.second[keep], part.ratio[keep])
    if isinstance(part, Mapping):
        taken = {key: _take(value, keep, count) for key, value in part.items()}
        if not isinstance(part, MutableMapping):
            return taken
        changed = copy.copy(part)
        changed.update(taken)
        return changed
    if isinstance(part, (list, tuple)):
        if len(part) == count and not isinstance(part[0], (torch.Tensor, np.ndarray, Mapping, list, tuple)):
            return type(part)(part[position] for position in keep)
        parts = [_take(value, keep, count) for value in part]
        return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
    return part
