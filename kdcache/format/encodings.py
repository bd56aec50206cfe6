"""Which encodings there are, and the one that a header names or a command asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcache.errors import UsageError
from kdcache.format.dense import DTYPES, Dense
from kdcache.format.encoding import Encoding


@dataclass(frozen=True)
class EncodingChoice:
    """What options say about an encoding; the teacher's first logits and labels say the rest.

    Attributes:
        dtype: of `--dtype`.
    """

    dtype: str = "float16"

    def __post_init__(self) -> None:
        self.of((2,))  # refuses what cannot be meant before anything is touched

    def of(self, row_shape: tuple[int, ...], *, labels: int = 0) -> Encoding:
        """The encoding for logits of a shape.

        Args:
            row_shape: (C, ...).
            labels: of each row: 0, 1, or 2 of mixed views.

        Raises:
            UsageError: options that cannot be meant, or not with these logits.
        """
        return Dense(row_shape, self.dtype)


def encoding_from_json(value: Any) -> Encoding:
    """The encoding that a header names.

    Raises:
        UsageError: not an encoding of format 1 that this version reads.
    """
    if not isinstance(value, dict) or not {"name", "dtype", "shape"} <= value.keys():
        raise UsageError(f"an encoding needs name, dtype and shape, found {value!r:.200}")
    name, dtype, shape = value["name"], value["dtype"], value["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise UsageError(f"an encoding's shape must be a list of positive integers, found {shape!r:.200}")
    if name != "dense":
        raise UsageError(f"encoding {name!r:.80} is not known to this version of kdcache; known: dense")
    if value.keys() != {"name", "dtype", "shape"}:
        raise UsageError(f"an encoding needs exactly name, dtype and shape, found {value!r:.200}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r:.80} is not known; choose one of {', '.join(DTYPES)}")
    return Dense(tuple(shape), dtype)
