"""An array of a foreign file as the reading process sees it: what it is, and its rows block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy import char  # NumPy 2 loads it late, when the reading process can open nothing any more

from kdcache.errors import DataError
from kdcache.format.identity import MAX_ID_BYTES

_FLOAT_BYTES = (2, 4, 8)


@dataclass(frozen=True)
class Column:
    """One array; `blocks(n)` starts from the first row each time and yields up to n rows (n, ...) at once.

    `dtype` is that of the blocks: numbers of any byte order, fixed-length text, or `object` for bytes of any length.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[int], Iterator[np.ndarray]]
    chunk_rows: int = 1

    @property
    def is_text(self) -> bool:
        """Whether its elements are text."""
        return self.dtype.kind in "SUO"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of numbers."""
        return int(np.prod(self.shape[1:], dtype=object)) * self.dtype.itemsize


class Source(Protocol):
    """An opened foreign file."""

    def column(self, name: str) -> Column | None:
        """The array of that name; None if there is none."""

    def listing(self, limit: int) -> list[dict[str, Any]]:
        """`name`, `shape` and `dtype` (as text) of the first arrays."""


def listed(name: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """One line of a listing."""
    return {"name": name[:200], "shape": list(shape), "dtype": dtype[:40]}


def plain_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The same type, if it is one of numbers, flags or fixed-length text.

    Raises:
        DataError: objects, references, structures, complex numbers, floats that are not of 2, 4 or 8 bytes.
    """
    if dtype.hasobject:
        raise DataError(f"array {name} holds objects, which would have to be unpickled; kdcache never unpickles")
    if dtype.subdtype is not None or dtype.names is not None or dtype.kind not in "biufSU":
        raise DataError(f"array {name} holds elements of type {dtype}; expected plain numbers or text")
    if dtype.kind == "f" and dtype.itemsize not in _FLOAT_BYTES:
        raise DataError(f"array {name} holds {dtype}; save it as float64 or smaller")
    return dtype


def text_bytes(name: str, block: np.ndarray) -> np.ndarray:
    """(n,) fixed-length UTF-8 bytes of a block of text.

    Raises:
        DataError: not text, or longer than a sample id may be.
    """
    if block.dtype.kind == "S":
        return block
    values = [v.encode() if isinstance(v, str) else v for v in block.tolist()]
    for value in values:
        if not isinstance(value, bytes) or len(value) > MAX_ID_BYTES or value.endswith(b"\0"):
            what = f"a text of {len(value)} bytes" if isinstance(value, bytes) else f"an element {type(value).__name__}"
            raise DataError(f"array {name} holds {what}; sample ids have at most {MAX_ID_BYTES}, the last not NUL")
    return np.array(values, f"S{max(1, *map(len, values))}" if values else "S1")


def text_width(column: Column, rows: int) -> int:
    """Bytes of the longest text, from one pass over the array.

    Raises:
        DataError: longer than a sample id may be.
    """
    width = 1
    for block in column.blocks(rows):
        lengths = char.str_len(text_bytes(column.name, block))
        width = max(width, int(lengths.max(initial=1)))
    if width > MAX_ID_BYTES:
        raise DataError(f"array {column.name} holds a text of {width} bytes; sample ids have at most {MAX_ID_BYTES}")
    return width
