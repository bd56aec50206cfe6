"""What a row-aligned array is: its name, its element type, the shape of one row, and where it lies in a file.

These two records are all that the format, the writer and the reader exchange about an array, so that
neither HDF5 nor NumPy internals travel between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


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
