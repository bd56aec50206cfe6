"""The `dense` encoding with integers: all logits on a grid of 8 or 4 bits a row, the 8 largest in float16 beside.

The largest logits hold most of the probability, and a step of the grid would move it: with the top 8 apart the mean KL
to the exact row falls 9 times at T = 1 for 32 bytes a row. A row of 1000 classes takes 1,040 (`int8`) or 540 bytes
(`int4`) instead of 2,004 in float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.errors import UsageError
from kdcache.format.arrays import ArraySpec
from kdcache.format.encoding import Encoding, clamp_to_float16
from kdcache.format.ranking import class_dtype, flaw_of_largest, largest_classes

LEVELS = {"int8": 254, "int4": 14}
_TOP = 8


@dataclass(frozen=True)
class Quantized(Encoding):
    """All logits of a row, (N, C, ...): the 8 largest, and codes on a grid from the least of these to the smallest.

    raw logit of a top class = top_logits + row_max, of any other = least + row_max - row_scale * code, where least is
    the last of `top_logits`; the code 255 (15 for int4) is a masked class, -inf. The error of a top class is at most
    half a unit of float16, that of any other row_scale / 2 where this is more (and the rounding of float32). Finite
    values below row_max - 65,504 are clamped to it and counted.
    """

    name = "dense"
    stored: str = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stored not in LEVELS:
            raise UsageError(f"dtype {self.stored!r:.80} is not known; choose one of {', '.join(LEVELS)}")

    @property
    def dtype(self) -> str:
        """`int8` or `int4`."""
        return self.stored

    @property
    def levels(self) -> int:
        """The code of the smallest finite logit; the next one stands for -inf."""
        return LEVELS[self.stored]

    @property
    def top(self) -> int:
        """How many of the largest logits stand beside the codes."""
        return min(_TOP, self.num_classes)

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """`logits` uint8 (N, C, ...), half as many for int4; `top_logits`, `top_classes`, `row_max`, `row_scale`."""
        trailing = self.row_shape[1:]
        codes = self.num_classes if self.stored == "int8" else -(-self.num_classes // 2)
        return (
            ArraySpec("logits", "|u1", (codes, *trailing)),
            ArraySpec("top_logits", "<f2", (self.top, *trailing)),
            ArraySpec("top_classes", class_dtype(self.num_classes), (self.top, *trailing)),
            ArraySpec("row_max", "<f4", trailing),
            ArraySpec("row_scale", "<f4", trailing),
        )

    def _encode(self, exact: np.ndarray, labels: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        row_max = exact.max(axis=1)
        with np.errstate(over="ignore"):  # the difference of two finite float32 may be -inf: it is clamped below
            shifted = exact - np.expand_dims(row_max, 1)
        clamped = clamp_to_float16(shifted, exact)
        masked = np.isneginf(shifted)
        classes = largest_classes(exact, self.top)
        top = np.take_along_axis(shifted, classes, axis=1).astype("<f2")
        with np.errstate(invalid="ignore"):  # -inf - -inf, of a masked class below a masked one
            depth = np.where(masked, np.float32(0), np.maximum(top[:, -1:].astype(np.float32) - shifted, 0))
        row_scale = depth.max(axis=1) * np.float32(1 / self.levels)
        steps = depth / np.expand_dims(np.where(row_scale > 0, row_scale, np.float32(1)), 1)
        codes = np.minimum(np.rint(steps), np.float32(self.levels)).astype(np.uint8)
        codes[masked] = self.levels + 1
        arrays = {
            "logits": codes if self.stored == "int8" else _pack(codes),
            "top_logits": top,
            "top_classes": classes.astype(class_dtype(self.num_classes)),
            "row_max": np.ascontiguousarray(row_max, "<f4"),
            "row_scale": np.ascontiguousarray(row_scale, "<f4"),
        }
        return arrays, clamped

    def decode(self, arrays: dict[str, Any]) -> Any:
        """Raw logits: those of the top classes, -inf where the code is the last, all others from their codes."""
        codes, row_max = arrays["logits"], arrays["row_max"][:, None]
        if self.stored == "int4":
            codes = _unpack(codes, self.num_classes)
        masked = codes == self.levels + 1
        # A class beyond C stands in no file of ours; `verify` names it, and here it must not end the process.
        if isinstance(codes, np.ndarray):
            with np.errstate(over="ignore", invalid="ignore"):  # as little do NaN and infinity
                top = arrays["top_logits"].astype(np.float32) + row_max
                logits: Any = codes.astype(np.float32)
                logits *= arrays["row_scale"][:, None]
                np.subtract(top[:, -1:], logits, out=logits)
            logits[masked] = -math.inf
            index = np.minimum(arrays["top_classes"].astype(np.int64), self.num_classes - 1)
            np.put_along_axis(logits, index, top, axis=1)
            return logits
        top = arrays["top_logits"].float() + row_max
        logits = (top[:, -1:] - codes.float() * arrays["row_scale"][:, None]).masked_fill_(masked, -math.inf)
        return logits.scatter_(1, arrays["top_classes"].long().clamp_(max=self.num_classes - 1), top)

    def flaw(self, arrays: dict[str, np.ndarray]) -> str | None:
        """A top class beyond C or twice, logits out of order, steps of a negative length, bits behind the last code."""
        scale = arrays["row_scale"]
        if not ((scale >= 0) & (scale < math.inf)).all():
            return "row_scale is negative or infinite"
        if self.stored == "int4" and self.num_classes % 2 and (arrays["logits"][:, -1] > 15).any():
            return "logits has a code behind the last class"
        return flaw_of_largest(arrays, "top_logits", "top_classes", self.num_classes)

    def top_class(self, arrays: dict[str, Any]) -> Any:
        """(N, ...) int64: the first of `top_classes`."""
        first = arrays["top_classes"][:, 0]
        if isinstance(first, np.ndarray):  # a class beyond C, which `verify` names, must not end the process
            return np.minimum(first.astype(np.int64), self.num_classes - 1)
        return first.long().clamp_(max=self.num_classes - 1)


def _pack(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits (N, C, ...) two a byte (N, ceil(C / 2), ...), the first in the lower half."""
    packed: np.ndarray = codes[:, 0::2].copy()
    packed[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    return packed


def _unpack(packed: Any, classes: int) -> Any:
    """The inverse of `_pack`, for NumPy arrays and tensors."""
    shape = (len(packed), classes, *packed.shape[2:])
    codes = np.empty(shape, np.uint8) if isinstance(packed, np.ndarray) else packed.new_empty(shape)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed[:, : classes // 2] >> 4
    return codes
