"""Which encodings there are, and the one that a header names or a command asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcache.errors import UsageError
from kdcache.format import dense, quantized
from kdcache.format.dense import Dense
from kdcache.format.encoding import Encoding
from kdcache.format.factored import Factored
from kdcache.format.quantized import Quantized
from kdcache.format.soft_targets import SoftTargets
from kdcache.format.topk import DEFAULT_TEMPERATURES, TopK, check_temperatures

DTYPES = (*dense.DTYPES, *quantized.LEVELS)
_BASE = {"name", "dtype", "shape"}
_FIELDS = {
    "dense": _BASE,
    "factored": _BASE | {"features", "head"},
    "topk": _BASE | {"k", "temperatures", "labels"},
    "soft_targets": _BASE | {"k", "temperature"},
}


@dataclass(frozen=True)
class EncodingChoice:
    """What options say about an encoding; the teacher's first logits and labels say the rest.

    Attributes:
        dtype: of `--dtype`.
        top_k: of `--top-k`, the logits kept of a row; None for all.
        temperatures: of `--temperatures`, at which the tail's logsumexp is stored; None for 1, 2 and 4.
    """

    dtype: str = "float16"
    top_k: int | None = None
    temperatures: tuple[float | str, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r:.80} is not known; choose one of {', '.join(DTYPES)}")
        if self.top_k is None:
            if self.temperatures is not None:
                raise UsageError("--temperatures (temperatures=) belongs to --top-k: other rows serve all temperatures")
            return
        if type(self.top_k) is not int or self.top_k < 1:
            raise UsageError(f"--top-k (top_k=) must be at least 1, found {self.top_k!r:.80}")
        if self.dtype != "float16":
            raise UsageError(f"--top-k stores float16, found --dtype {self.dtype} with it; leave one of them out")
        check_temperatures(self._temperatures)

    def of(self, row_shape: tuple[int, ...], *, labels: int = 0) -> Encoding:
        """The encoding for logits of a shape.

        Args:
            row_shape: (C, ...).
            labels: of each row: 0, 1, or 2 of mixed views.

        Raises:
            UsageError: options that cannot be meant, or not with these logits.
        """
        if self.top_k is not None:  # of dense prediction the labels are maps, which are not stored
            kept = min(self.top_k, *row_shape[:1])
            return TopK(row_shape, kept, self._temperatures, labels if len(row_shape) == 1 else 0)
        return Dense(row_shape, self.dtype) if self.dtype in dense.DTYPES else Quantized(row_shape, self.dtype)

    def note(self, classes: int) -> str | None:
        """What should be known of this choice for a teacher of so many classes; None where nothing is."""
        if self.top_k is None or self.top_k <= classes:
            return None
        return (
            f"--top-k {self.top_k} is more than the {classes} classes: each row keeps all of them, which --dtype "
            "float16 stores in fewer bytes"
        )

    @property
    def _temperatures(self) -> tuple[float | str, ...]:
        return DEFAULT_TEMPERATURES if self.temperatures is None else self.temperatures


def encoding_from_json(value: Any) -> Encoding:
    """The encoding that a header names.

    Raises:
        UsageError: not an encoding of format 1 that this version reads.
    """
    if not isinstance(value, dict) or not value.keys() >= _BASE:
        raise UsageError(f"an encoding needs name, dtype and shape, found {value!r:.200}")
    name, dtype, shape = value["name"], value["dtype"], value["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise UsageError(f"an encoding's shape must be a list of positive integers, found {shape!r:.200}")
    if not isinstance(name, str) or name not in _FIELDS:
        known = ", ".join(_FIELDS)
        raise UsageError(f"encoding {name!r:.80} is not known to this version of kdcache; known: {known}")
    if value.keys() != _FIELDS[name]:
        raise UsageError(f"the encoding {name} needs exactly {', '.join(sorted(_FIELDS[name]))}, found {value!r:.200}")
    if name == "topk":
        return _top_k(value, tuple(shape))
    if name == "soft_targets":
        return _soft_targets(value, tuple(shape))
    if name == "factored":
        if dtype != "float16":
            raise UsageError(f"dtype {dtype!r:.80} is not known; the encoding factored stores float16")
        return Factored(tuple(shape), value["features"], value["head"])
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r:.80} is not known; choose one of {', '.join(DTYPES)}")
    return EncodingChoice(dtype).of(tuple(shape))


def _top_k(value: dict[str, Any], shape: tuple[int, ...]) -> TopK:
    k, temperatures, labels = value["k"], value["temperatures"], value["labels"]
    if value["dtype"] != "float16":
        raise UsageError(f"dtype {value['dtype']!r:.80} is not known; the encoding topk stores float16")
    if type(k) is not int or type(labels) is not int:
        raise UsageError(f"k and labels of an encoding must be integers, found {k!r:.80} and {labels!r:.80}")
    if not isinstance(temperatures, list) or any(type(t) not in (float, str) for t in temperatures):
        raise UsageError(f"temperatures of an encoding must be a list of fractions, found {temperatures!r:.200}")
    return TopK(shape, k, tuple(temperatures), labels)


def _soft_targets(value: dict[str, Any], shape: tuple[int, ...]) -> SoftTargets:
    k, temperature, dtype = value["k"], value["temperature"], value["dtype"]
    if type(k) is not int or type(temperature) is not float or not isinstance(dtype, str):
        raise UsageError(
            f"soft targets need k, an integer, and temperature, a fraction; found {k!r:.80} and {temperature!r:.80}"
        )
    return SoftTargets(shape, temperature, k, dtype)
