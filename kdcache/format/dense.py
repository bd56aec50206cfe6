"""The `dense` encoding with floats: all logits, as float32 or as float16 with the row maximum apart.

float16 rows have their maximum subtracted before rounding and kept in float32 beside them, so that an offset of the
logits costs no digits (mean KL at T = 1: 27 times smaller where they stand around 20, 0.8 to 1.9 times where they are
centred), for 4 bytes a row; and a plain reader may use `logits` as they are: softmax does not see the shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.errors import UsageError
from kdcache.format.arrays import ArraySpec
from kdcache.format.encoding import Encoding, clamp_to_float16

DTYPES = {"float16": "<f2", "float32": "<f4"}


@dataclass(frozen=True)
class Dense(Encoding):
    """All logits of a row, (N, C, ...).

    float16: `row_max` = max over classes (float32), `logits` = logits - row_max rounded to float16, finite values below
    -65,504 clamped to it and counted; -inf kept. float32: `logits` as they are, but that float64 values below the
    float32 range are clamped to it and counted.
    """

    name = "dense"
    stored: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stored not in DTYPES:
            raise UsageError(f"dtype {self.stored!r:.80} is not known; choose one of {', '.join(DTYPES)}")

    @property
    def dtype(self) -> str:
        """`float16` or `float32`."""
        return self.stored

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """`logits` (N, C, ...) and, for float16, `row_max` (N, ...)."""
        logits = ArraySpec("logits", DTYPES[self.stored], self.row_shape)
        if self.stored == "float32":
            return (logits,)
        return (logits, ArraySpec("row_max", "<f4", self.row_shape[1:]))

    def _encode(self, exact: np.ndarray, labels: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        if self.stored == "float32":
            return {"logits": np.ascontiguousarray(exact, "<f4")}, None
        row_max = exact.max(axis=1)
        with np.errstate(over="ignore"):  # the difference of two finite float32 may be -inf: it is clamped below
            shifted = exact - np.expand_dims(row_max, 1)
        clamped = clamp_to_float16(shifted, exact)
        return {"logits": shifted.astype("<f2"), "row_max": np.ascontiguousarray(row_max, "<f4")}, clamped

    def decode(self, arrays: dict[str, Any]) -> Any:
        """Raw logit = logits + row_max (float16), or logits (float32)."""
        logits = arrays["logits"]
        # NaN and infinity stand in no file of ours; `verify` names them, and here they must not end the process.
        with np.errstate(invalid="ignore"):
            as_float = logits.astype(np.float32) if isinstance(logits, np.ndarray) else logits.float()
            if self.stored == "float16":
                as_float += arrays["row_max"][:, None]
        return as_float

    def flaw(self, arrays: dict[str, np.ndarray]) -> str | None:
        """A largest logit that is not finite."""
        if self.stored == "float16" and np.isinf(arrays["row_max"]).any():
            return "row_max is infinite"
        logits = arrays["logits"]
        masked = np.flatnonzero(np.isneginf(logits[:, 0]).reshape(len(logits), -1).any(axis=1))  # few, if any
        return "a row holds -inf alone" if np.isneginf(logits[masked].max(axis=1)).any() else None
