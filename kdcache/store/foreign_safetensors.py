"""safetensors that somebody else wrote, in the process that reads them: a JSON header, then plain bytes.

Read here and not by the package of that name, whose NumPy side knows no bfloat16 (`data type 'bfloat16' not
understood`, 0.8.0) and maps the whole file. The checks are those of its specification: a header of at most 100 MB,
spans that follow each other without a hole to the end of the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kdcache.errors import DataError
from kdcache.format.strict_json import load_json
from kdcache.store.foreign_column import Column, listed

DESCRIPTORS = 0
MAX_HEADER_BYTES = 100_000_000
_BFLOAT16 = "BF16"
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    _BFLOAT16: "<f4",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}


@dataclass(frozen=True)
class _Tensor:
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


def open_source(fd: int, format: str, *, memory_bytes: int) -> SafetensorsSource:
    """The file behind a descriptor."""
    return SafetensorsSource(fd)


class SafetensorsSource:
    """A safetensors file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        size = os.fstat(fd).st_size
        length = int.from_bytes(_read(fd, 8, 0), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise DataError(f"the header claims {length} bytes in a file of {size}; the file is damaged")
        header = load_json(_read(fd, length, 8), where="header")
        header.pop("__metadata__", None)
        self._tensors = {name: _tensor(name, entry, 8 + length) for name, entry in header.items()}
        position = 8 + length
        for tensor in sorted(self._tensors.values(), key=lambda t: (t.start, t.stop)):
            if tensor.start != position:
                raise DataError(f"array {tensor.name} starts at byte {tensor.start}, expected {position}; damaged")
            position = tensor.stop
        if position != size:
            raise DataError(f"the arrays end at byte {position} of {size}; the file is damaged")

    def column(self, name: str) -> Column | None:
        """The tensor of that name; None if there is none.

        Raises:
            DataError: of a type that NumPy lacks (8-bit floats), or whose size does not fit its shape.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if tensor.kind not in _DTYPES:
            raise DataError(f"array {name} holds {tensor.kind[:40]}; expected one of {', '.join(_DTYPES)}")
        itemsize = 2 if tensor.kind == _BFLOAT16 else np.dtype(_DTYPES[tensor.kind]).itemsize
        if tensor.stop - tensor.start != math.prod(tensor.shape) * itemsize:
            raise DataError(f"array {name}: {tensor.shape} of {tensor.kind} does not fit its bytes; it is damaged")
        return Column(name, tensor.shape, np.dtype(_DTYPES[tensor.kind]), partial(_blocks, self._fd, tensor))

    def listing(self, limit: int) -> list[dict[str, Any]]:
        """The first tensors."""
        return [listed(t.name, t.shape, t.kind) for t in list(self._tensors.values())[:limit]]


def _tensor(name: str, entry: Any, origin: int) -> _Tensor:
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise DataError(f"array {name}: expected dtype, shape and data_offsets; the file is damaged") from None
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not isinstance(kind, str) or not all(type(n) is int and n >= 0 for n in numbers) or start > stop:
        raise DataError(f"array {name}: a dtype, shape or data_offsets of another kind; the file is damaged")
    return _Tensor(name, kind, tuple(shape), origin + start, origin + stop)


def _blocks(fd: int, tensor: _Tensor, rows: int) -> Iterator[np.ndarray]:
    row_bytes = (tensor.stop - tensor.start) // tensor.shape[0]
    for start in range(0, tensor.shape[0], rows):
        count = min(rows, tensor.shape[0] - start)
        data = _read(fd, count * row_bytes, tensor.start + start * row_bytes)
        shape = (count, *tensor.shape[1:])
        if tensor.kind == _BFLOAT16:  # the upper half of a float32
            yield (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        else:
            yield np.frombuffer(data, _DTYPES[tensor.kind]).reshape(shape)


def _read(fd: int, length: int, offset: int) -> bytes:
    parts, got = [], 0
    while got < length:
        part = os.pread(fd, length - got, offset + got)
        if not part:
            raise DataError(f"the file ends at byte {offset + got}, expected {offset + length}; it is truncated")
        parts.append(part)
        got += len(part)
    return b"".join(parts)
