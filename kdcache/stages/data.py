"""Data SPECs: `digits:train`, `npz:FILE`, `idx:FOLDER:train`, `folder:PATH` or `module:factory`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.format.identity import as_sample_ids
from kdcache.stages import data_digits, data_folder, data_idx, data_npz
from kdcache.stages.loaded_data import LoadedData, check_not_empty, check_unique_ids, data_provenance
from kdcache.stages.specs import PYTHON, Spec, SpecKind, call_factory, describe, one_line

__all__ = ["DATA", "LoadedData", "load_data"]

DATA = SpecKind(
    "data",
    {
        "digits": data_digits.USAGE,
        "npz": data_npz.USAGE,
        "idx": data_idx.USAGE,
        "folder": data_folder.USAGE,
    },
)

_LOADERS: Mapping[str, Callable[[str], LoadedData]] = {
    "digits": data_digits.load_digits,
    "npz": data_npz.load_npz,
    "idx": data_idx.load_idx,
    "folder": data_folder.load_folder,
}


def load_data(text: str) -> LoadedData:
    """The data set that a SPEC names.

    Raises:
        UsageError: an unknown scheme, a file or module that is not there, or a factory that returns no data set.
        DataError: data that cannot be used.
        KDCacheError: the factory raised.

    >>> data = load_data("digits:test")
    >>> len(data), data.dataset[0][0].shape
    (497, torch.Size([1, 8, 8]))
    """
    spec = DATA.parse(text)
    if spec.scheme == PYTHON:
        return _load_from_factory(spec)
    return _LOADERS[spec.scheme](spec.rest)


def _load_from_factory(spec: Spec) -> LoadedData:
    dataset = call_factory(spec, DATA)
    rows = _check_map_style(dataset, spec.rest)
    check_not_empty(rows, name=spec.rest)
    sample_ids = _sample_ids(dataset, rows, spec.rest)
    classes = class_names(dataset, spec.rest)
    num_classes = len(classes) if classes is not None else getattr(dataset, "num_classes", None)
    if not isinstance(num_classes, int):
        num_classes = None
    provenance = data_provenance(
        name=spec.rest,
        rows=rows,
        id_scheme=None if sample_ids is None else "sample_ids of the data set",
        sample_ids=sample_ids,
        inputs=None,
        classes=classes,
        factory=spec.rest,
    )
    return LoadedData(cast("Dataset[Any]", dataset), spec.rest, num_classes, classes, sample_ids, provenance)


def _check_map_style(dataset: object, name: str) -> int:
    """Number of samples of what a factory returned."""
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"{name} returned {describe(dataset)}, an IterableDataset: its rows cannot be asked for by number, so no "
            f"cached row can be joined to them; expected a data set with __len__ and __getitem__"
        )
    arrays = (str, bytes, Mapping, np.ndarray, torch.Tensor, type)
    if isinstance(dataset, arrays) or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"{name} returned {describe(dataset)}; expected a data set: an object with __len__ and __getitem__ whose "
            f"items are (x, label) or dicts"
        )
    try:
        return len(dataset)  # type: ignore[arg-type]
    except KDCacheError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} returned {describe(dataset)} without a length ({one_line(error)}); add __len__"
        ) from error


def _sample_ids(dataset: object, rows: int, name: str) -> np.ndarray | None:
    values = getattr(dataset, "sample_ids", None)
    if values is None:
        return None
    try:
        sample_ids = as_sample_ids(values)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    if len(sample_ids) != rows:
        raise DataError(f"{name}: {rows} samples, but sample_ids has {len(sample_ids)}; expected one id per sample")
    check_unique_ids(sample_ids, name=name)
    return sample_ids


def class_names(dataset: object, name: str) -> tuple[str, ...] | None:
    """The `classes` of a data set, as torchvision has them; anything else of that name is not ours to judge."""
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, (list, tuple)) or not all(isinstance(entry, str) for entry in classes):
        return None
    if len(set(classes)) < len(classes):
        raise DataError(f"{name}: two of its classes have one name; expected {len(classes)} different names")
    return tuple(classes) or None
