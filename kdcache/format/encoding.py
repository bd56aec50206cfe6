"""What an encoding is: how a row of logits becomes arrays and back, and what every encoding checks first.

Each encoding is a frozen record of what a header says about it, with its arithmetic in NumPy; `kdcache.train` holds the
same arithmetic for a device. Two encodings are equal if their rows mean the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kdcache.errors import LogitsError, UsageError
from kdcache.format.arrays import ArraySpec

FLOAT16_LOWEST = -65504.0
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class EncodedRows:
    """The arrays of N encoded rows by name, and how many values of each row (N,) were clamped to the range."""

    arrays: dict[str, np.ndarray]
    clamped: np.ndarray


@dataclass(frozen=True)
class Encoding(ABC):
    """What the arrays of a row mean.

    Attributes:
        row_shape: (C, ...): the number of classes, and trailing dimensions of dense prediction, (C, H, W).
    """

    name: ClassVar[str]
    row_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.row_shape or min(self.row_shape) < 1 or len(self.row_shape) > 4:
            raise UsageError(f"a row of logits has shape (C,) or (C, ...), found {self.row_shape!r:.80}")

    @property
    def num_classes(self) -> int:
        """C, the first dimension of a row."""
        return self.row_shape[0]

    @property
    @abstractmethod
    def dtype(self) -> str:
        """What logits are stored as, as `--dtype` names it."""

    @property
    @abstractmethod
    def specs(self) -> tuple[ArraySpec, ...]:
        """The arrays of this encoding, the largest first."""

    @property
    def has_all_logits(self) -> bool:
        """Whether rows decode to the logits of all classes, exactly or within a stated error."""
        return True

    def to_json(self) -> dict[str, Any]:
        """As written in headers and manifests."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.row_shape)}

    def encode(self, logits: np.ndarray, labels: np.ndarray | None = None) -> EncodedRows:
        """Encodes raw logits.

        Args:
            logits: (N, C, ...) float16, float32 or float64, raw (before any softmax or temperature).
            labels: (N, L) int64, -1 = none, the classes whose logits an encoding keeps in any case; not used where all
                are kept.

        Raises:
            LogitsError: a wrong shape, NaN, +inf, or a row of -inf alone; the message has row positions.
        """
        if logits.ndim < 2 or logits.shape[1:] != self.row_shape:
            raise LogitsError(f"logits have shape {logits.shape}, expected (N, {', '.join(map(str, self.row_shape))})")
        if logits.dtype.kind != "f":
            raise LogitsError(f"logits must be floating point, found {logits.dtype}")
        bad = bad_rows(logits)
        if bad.size:
            raise LogitsError(
                f"{bad.size} rows hold NaN, +inf or -inf alone; the first at position {bad[0]} of this batch"
            )
        exact, clamped = _as_float32(logits)
        arrays, more = self._encode(exact, labels)
        return EncodedRows(arrays, clamped if more is None else more)

    @abstractmethod
    def _encode(self, exact: np.ndarray, labels: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The arrays of sound float32 logits (N, C, ...), and how many values of each row are clamped.

        None where no more are than those below the float32 range.
        """

    @abstractmethod
    def decode(self, arrays: dict[str, Any]) -> Any:
        """Raw logits (N, C, ...) float32 from stored arrays; NumPy arrays and tensors alike.

        Raises:
            UsageError: the encoding does not hold the logits of all classes.
        """

    def flaw(self, arrays: dict[str, np.ndarray]) -> str | None:
        """What no writer stores in these rows, beside NaN and +inf; None where they are sound."""
        return None

    def top_class(self, arrays: dict[str, Any]) -> Any:
        """(N, ...) the class of the largest logit, the first of equals; NumPy arrays and tensors alike."""
        return self.decode(arrays).argmax(1)


def bad_rows(logits: np.ndarray) -> np.ndarray:
    """Positions of rows that cannot be stored: NaN, +inf, or no finite class at some position.

    -inf alone is a masked class and is allowed. A float64 above the float32 range counts as +inf.

    Args:
        logits: (N, C, ...) floats.

    Returns:
        (n,) int64 positions, ascending.
    """
    top = logits.max(axis=1)  # NaN propagates; +inf and a row of -inf alone show as infinite
    good = np.isfinite(top) & (top.astype(np.float64) <= FLOAT32_MAX)
    return np.flatnonzero(~good.all(axis=tuple(range(1, good.ndim))))


def holds_nan(stored: np.ndarray) -> bool:
    """Whether stored floats hold NaN or +inf, from their bits: two passes at memory speed, where `isnan` takes ten.

    Args:
        stored: C-contiguous float16 or float32, of any shape.
    """
    width = stored.dtype.itemsize
    infinity = 0x7C00 if width == 2 else 0x7F800000
    # As signed integers +inf and positive NaN are the largest; as unsigned ones negative NaN lies above -inf.
    largest, highest = int(stored.view(f"<i{width}").max()), int(stored.view(f"<u{width}").max())
    return largest >= infinity or highest > infinity | 1 << (8 * width - 1)


def label_count(classes: int) -> int:
    """How many labels there are beside `classes` logits: as many, but two beside the single logit of a yes or no."""
    return max(2, classes)


def clamp_to_float16(shifted: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Clamps finite logits below `row_max` - 65,504 in place; (N,) how many of each row."""
    low = (shifted < FLOAT16_LOWEST) & np.isfinite(exact)
    clamped = per_row(low)
    if clamped.any():
        shifted[low] = FLOAT16_LOWEST
    return clamped


def per_row(marked: np.ndarray) -> np.ndarray:
    """(N,) how many values of each row are marked."""
    counts: np.ndarray = marked.sum(axis=tuple(range(1, marked.ndim)), dtype=np.int64)
    return counts


def _as_float32(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 logits; a float64 below its range would turn into -inf, a masked class, and is clamped instead."""
    if logits.dtype != np.float64:
        return logits.astype(np.float32, copy=False), np.zeros(len(logits), np.int64)
    low = (logits < -FLOAT32_MAX) & np.isfinite(logits)
    clamped = per_row(low)
    return (np.where(low, -FLOAT32_MAX, logits) if clamped.any() else logits).astype(np.float32), clamped
