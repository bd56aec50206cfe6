"""Which sample each index of a data set is: an id from the data, never a position in a loader.

In this order: `sample_ids=`, the attribute `dataset.sample_ids`, a named key of dict items, the index. A
`Subset` is looked through, so that its own index never poses as an id, and so is a `ConcatDataset` of parts
that do not share ids. Any other wrapper must say: its index may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from kdcache.errors import DataError, UsageError
from kdcache.format.identity import as_sample_ids, show_ids

_WAY_OUT = "pass sample_ids=, one id per item, or give the data set an attribute sample_ids"


def resolve(dataset: Any, *, sample_ids: Any = None, id_key: str | None = None) -> np.ndarray:
    """The sample id of every index of a map-style data set.

    Args:
        dataset: anything with `len` and items by index.
        sample_ids: N integers or texts, one per index; overrides everything else.
        id_key: the key of dict items that holds the id. A column of that name is read at once where the data
            set has columns (`column_names`, as Hugging Face data sets do); otherwise every item is loaded once.

    Returns:
        (N,) int64 or fixed-length bytes. Equal ids are allowed: an oversampled item is the same sample.

    Raises:
        DataError: no length, no ids to be had, or ids that do not fit the data set.
        UsageError: more than one source of ids.

    >>> resolve(Subset(range(10), [7, 2]))
    array([7, 2])
    """
    size = length(dataset)
    declared = getattr(dataset, "sample_ids", None)
    if sample_ids is not None:
        if id_key is not None:
            raise UsageError("both sample_ids= and id_key= are given: pass one of them")
        return _checked(sample_ids, size, "sample_ids=")
    if declared is not None:
        if id_key is not None:
            raise UsageError(
                f"id_key={id_key!r} is given, but the data set has an attribute sample_ids, which comes first: "
                "leave id_key out, or pass the ids of that key as sample_ids="
            )
        return _checked(declared, size, "dataset.sample_ids")
    if id_key is not None:
        return _checked(_by_key(dataset, id_key, size), size, f"id_key={id_key!r}")
    ids, owners = _structural(dataset)
    _check_parts(ids, owners)
    return ids


def length(dataset: Any) -> int:
    """len(dataset).

    Raises:
        DataError: an iterable data set, or one without a length.
    """
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"{type(dataset).__name__} is an IterableDataset: its items have no index and so no ids. Make it "
            "map-style (items by index, a length), with sample_ids"
        )
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        raise DataError(
            f"{type(dataset).__name__} has no length: expected a map-style data set with __len__ and __getitem__"
        ) from None


def _checked(values: Any, size: int, source: str) -> np.ndarray:
    ids = as_sample_ids(values)
    if len(ids) != size:
        raise DataError(f"{source} holds {len(ids)} ids, the data set {size} items: expected one id per item")
    return ids


def _structural(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N,), and of each the identity (N,) of the innermost data set that it belongs to."""
    size = length(dataset)
    declared = getattr(dataset, "sample_ids", None)
    if declared is not None:
        return _checked(declared, size, f"{type(dataset).__name__}.sample_ids"), np.full(size, id(dataset))
    if isinstance(dataset, Subset):
        ids, owners = _structural(dataset.dataset)
        indices = np.asarray(dataset.indices, dtype=np.int64)
        return ids[indices], owners[indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_structural(part) for part in dataset.datasets]
        if len({ids.dtype.kind for ids, _ in parts}) > 1:
            raise DataError(f"the parts of a ConcatDataset have integer and text ids: {_WAY_OUT}")
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([owners for _, owners in parts])
    inner = _wrapped(dataset)
    if inner is not None:
        raise DataError(
            f"{type(dataset).__name__} wraps another data set (attribute {inner!r}), so its index may not be the "
            f"sample's id: {_WAY_OUT} (if it keeps order and length: sample_ids=kdcache.train.ids.resolve(inner))"
        )
    return np.arange(size), np.full(size, id(dataset))


def _wrapped(dataset: Any) -> str | None:
    """The attribute in which a wrapper holds another data set, or several."""
    for name, value in getattr(dataset, "__dict__", {}).items():
        values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        if _is_dataset(value) or any(_is_dataset(inner) for inner in values):
            return str(name)
    return None


def _is_dataset(value: Any) -> bool:
    """A data set of torch, or one of Hugging Face, which does not derive from torch's."""
    return isinstance(value, Dataset) or (hasattr(value, "column_names") and hasattr(value, "set_format"))


def _check_parts(ids: np.ndarray, owners: np.ndarray) -> None:
    """Refuses one id for samples of different data sets (two parts that both count from 0)."""
    if not len(ids) or bool((owners == owners[0]).all()):
        return
    order = np.argsort(ids, kind="stable")
    same = ids[order][1:] == ids[order][:-1]
    clash = order[1:][same & (owners[order][1:] != owners[order][:-1])]
    if len(clash):
        shared = np.unique(ids[clash])
        raise DataError(
            f"the parts of a ConcatDataset share {len(shared)} sample ids ({show_ids(shared[:6])}): {_WAY_OUT}, "
            "that tells the parts apart as the dump did"
        )


def _by_key(dataset: Any, id_key: str, size: int) -> Any:
    column = _column(dataset, id_key)
    return [_key_of(dataset[index], id_key, index) for index in range(size)] if column is None else column


def _column(dataset: Any, id_key: str) -> Any:
    """A whole column without loading items, or None where the data set has no columns."""
    if isinstance(dataset, Subset):
        column = _column(dataset.dataset, id_key)
        return None if column is None else [column[int(index)] for index in dataset.indices]
    if id_key in (getattr(dataset, "column_names", None) or ()):
        return list(dataset[id_key])
    return None


def _key_of(item: Any, id_key: str, index: int) -> Any:
    if not isinstance(item, Mapping):
        raise DataError(f"id_key={id_key!r} needs dict items, item {index} is a {type(item).__name__}")
    if id_key not in item:
        raise DataError(f"item {index} has no key {id_key!r}, its keys are {', '.join(map(str, item))}")
    value = item[id_key]
    return value.item() if hasattr(value, "item") else value
