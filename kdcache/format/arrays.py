"""What a row-aligned array is: its name, its element type, the shape of one row, and where it lies in a file.

These two records are all that the format, the writer and the reader exchange about an array, so that
neither HDF5 nor NumPy internals travel between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kdcache.errors import CorruptCacheError

MAX_LAYOUTS = 32


@dataclass(frozen=True)
class ArraySpec:
    """An array to be stored: `dtype` in NumPy's notation (`<f2`, `<i8`, `|S12`), `row_shape` without the N."""

    name: str
    dtype: str
    row_shape: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.row_shape)

    def shape(self, rows: int) -> tuple[int, ...]:
        """Shape of the whole array with `rows` rows."""
        return (rows, *self.row_shape)


@dataclass(frozen=True)
class ArrayLayout:
    """A stored array: rows lie back to back from `offset` (bytes from the start of the file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def rows(self) -> int:
        """Number of rows N, the first dimension."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of payload, padding of the last chunk not counted."""
        return _item_bytes(self.dtype) * math.prod(self.shape)

    @property
    def stop(self) -> int:
        """First byte behind the payload."""
        return self.offset + self.nbytes

    @property
    def spec(self) -> ArraySpec:
        """What it stores, without where."""
        return ArraySpec(self.name, self.dtype, self.shape[1:])


@lru_cache(maxsize=64)  # a manifest of 8,192 shards asks 60,000 times
def _item_bytes(dtype: str) -> int:
    return np.dtype(dtype).itemsize


def layouts_to_json(layouts: dict[str, ArrayLayout]) -> dict[str, Any]:
    """`[offset, type, shape]` by name, as in a manifest."""
    return {name: [layout.offset, layout.dtype, list(layout.shape)] for name, layout in layouts.items()}


def layouts_from_json(value: Any, *, where: str) -> dict[str, ArrayLayout]:
    """The layouts that a manifest lists; whether they fit a file is for `schema.check_layout` to say.

    Raises:
        CorruptCacheError: not an object of `[offset, type, shape]`.
    """
    if not isinstance(value, dict) or len(value) > MAX_LAYOUTS:
        raise CorruptCacheError(f"{where}: arrays must be an object of at most {MAX_LAYOUTS} entries")
    arrays = {}
    for name, entry in value.items():
        shaped = isinstance(entry, list) and len(entry) == 3 and type(entry[0]) is int and isinstance(entry[1], str)
        if not shaped or not isinstance(entry[2], list) or not _is_shape(entry[2]):
            raise CorruptCacheError(f"{where}: array {name!r:.80} needs [offset, type, shape]")
        arrays[name] = ArrayLayout(name, entry[1], tuple(entry[2]), entry[0])
    return arrays


def _is_shape(value: list[Any]) -> bool:
    """Whether it is a list of one or more integers from 0 to 2**48 - 1; a manifest has up to 60,000 of them."""
    return {int} == set(map(type, value)) and min(value) >= 0 and max(value) < 2**48
