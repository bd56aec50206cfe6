"""What a data set's item is made of, in one place for the dump, `join` and `attach`.

Three forms are understood: a tuple or list (input, label, ...), a dict with named parts, and a bare input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache.errors import DataError

LABEL_KEYS = ("label", "labels", "target", "targets")
TEACHER_KEY = "teacher"
SAMPLE_ID_KEY = "sample_id"
# Of a dict item, these are not inputs of a model, also where its forward has an argument of that name: a transformers
# model that is given `labels` computes a loss of its own.
NOT_INPUTS = frozenset({*LABEL_KEYS, TEACHER_KEY, SAMPLE_ID_KEY})


def first_input(item: Any) -> Any:
    """The first input of an item or of a collated batch: what input digests are taken of.

    Element 0 of a tuple or list; of a dict the first value, in its own order, that is not a label, an id or
    text; a bare item itself.

    Raises:
        DataError: an empty item.

    >>> first_input({"label": 3, "image": "pixels.png", "pixels": [1, 2]})
    [1, 2]
    """
    if isinstance(item, Mapping):
        for key, value in item.items():
            if key not in NOT_INPUTS and not isinstance(value, (str, bytes)):
                return value
        raise DataError(f"no input among the keys of this item: {', '.join(map(str, item))}")
    if isinstance(item, (tuple, list)):
        if not item:
            raise DataError("an item of the data set is empty; expected (input, label, ...)")
        return item[0]
    return item


def with_input(item: Any, value: Any) -> Any:
    """The item with another first input, of the same form.

    >>> with_input(("pixels", 7), "view"), with_input({"label": 3, "x": 1}, 2), with_input("pixels", "view")
    (('view', 7), {'label': 3, 'x': 2}, 'view')
    """
    if isinstance(item, Mapping):
        for key, old in item.items():
            if key not in NOT_INPUTS and not isinstance(old, (str, bytes)):
                return {**item, key: value}
        raise DataError(f"no input among the keys of this item: {', '.join(map(str, item))}")
    if isinstance(item, (tuple, list)):
        parts = [value, *item[1:]]
        if isinstance(item, list):
            return parts
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    return value


def label_of(item: Any) -> Any | None:
    """The label of an item or of a collated batch, or None: element 1, or the value of a label key.

    >>> label_of(("pixels", 7)), label_of({"labels": 7}), label_of("pixels")
    (7, 7, None)
    """
    if isinstance(item, (tuple, list)):
        return item[1] if len(item) > 1 else None
    if isinstance(item, Mapping):
        return next((item[key] for key in LABEL_KEYS if key in item), None)
    return None


def with_label(item: Any, value: Any) -> Any:
    """The item with another label, of the same form; an item without a label stays as it is.

    >>> with_label(("pixels", 7), 3), with_label({"labels": 7, "x": 1}, 3), with_label("pixels", 3)
    (('pixels', 3), {'labels': 3, 'x': 1}, 'pixels')
    """
    if isinstance(item, (tuple, list)) and len(item) > 1:
        parts = [item[0], value, *item[2:]]
        if isinstance(item, list):
            return parts
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    if isinstance(item, Mapping):
        key = next((key for key in LABEL_KEYS if key in item), None)
        return item if key is None else {**item, key: value}
    return item


def with_part(item: Any, part: Any, *, key: str) -> Any:
    """The item with one more part: at the end of a tuple or list, under `key` in a dict, beside a bare input.

    Raises:
        DataError: a dict item that has the key already.

    >>> with_part((1, 2), 3, key="teacher"), with_part({"x": 1}, 3, key="teacher"), with_part(1, 3, key="teacher")
    ((1, 2, 3), {'x': 1, 'teacher': 3}, (1, 3))
    """
    if isinstance(item, tuple):
        return (*item, part)
    if isinstance(item, list):
        return [*item, part]
    if isinstance(item, Mapping):
        if key in item:
            raise DataError(
                f"the data set's items have a key {key!r} already, which kdcache would overwrite: rename it"
            )
        return {**item, key: part}
    return (item, part)


def load_items(dataset: Any, indices: list[int]) -> list[Any]:
    """Items by index, through the data set's own `__getitems__` where it has one.

    Raises:
        DataError: `__getitems__` returned another number of items.
    """
    if not callable(getattr(dataset, "__getitems__", None)):
        return [dataset[index] for index in indices]
    items = dataset.__getitems__(indices)
    if not isinstance(items, (list, tuple)) or len(items) != len(indices):
        raise DataError(
            f"{type(dataset).__name__}.__getitems__ returned {type(items).__name__} for {len(indices)} indices, "
            "expected a list of as many items"
        )
    return list(items)
