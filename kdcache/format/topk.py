"""The `topk` encoding: the K largest logits of a row, the labels', and what sums up the classes that are not kept.

Logits, not probabilities, so that one dump serves every temperature; and the tail as a logsumexp at each stored
temperature, so that the normaliser is exact there and nothing is renormalised. A row of 1000 classes with K = 10, two
temperatures and a label takes 62 bytes, float16 2,004. In float16 beside one logsumexp over *all* classes the tail
came out negative in 3-43 % of the rows; hence it is stored over the classes not kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kdcache.errors import DataError, UsageError
from kdcache.format.arrays import ArraySpec
from kdcache.format.encoding import FLOAT32_MAX, Encoding, clamp_to_float16
from kdcache.format.ranking import class_dtype, flaw_of_largest, largest_classes

DEFAULT_TEMPERATURES: tuple[float | str, ...] = (1.0, 2.0, 4.0)
Z2 = "z2"
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.01, 1e6
MAX_TEMPERATURES = 32
LEAST_STD = float(np.finfo(np.float32).tiny)
_ROUNDING = 1e-4  # of a logsumexp in float32, log(2**31) at most
_BLOCK_VALUES = 1 << 19


@dataclass(frozen=True)
class TopK(Encoding):
    """K logits of each row, (N, K, ...), and the tail's statistics, all relative to `row_max`, the largest logit.

    Attributes:
        k: logits kept, 1 to C; with k = C all are, and the rows decode.
        temperatures: at which the tail's logsumexp is stored: ascending floats, then perhaps "z2", which is twice the
            row's own `logit_std` (and never below 1.2e-38, for a row whose logits are all equal).
        labels: labels of each row whose logits are kept as well, 0, 1 or 2 (of mixed views).
    """

    name = "topk"
    k: int
    temperatures: tuple[float | str, ...] = DEFAULT_TEMPERATURES
    labels: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.num_classes:
            raise UsageError(f"top-k keeps 1 to C logits of a row, found k = {self.k} with {self.num_classes} classes")
        if self.num_classes < 2:
            raise UsageError("top-k needs two classes or more: of a single logit there is nothing to leave out")
        if self.labels not in (0, 1, 2) or (self.labels and len(self.row_shape) > 1):
            raise UsageError(
                f"top-k keeps the logits of 0 to 2 labels a row, and of none in dense prediction; found {self.labels} "
                f"with rows of shape {self.row_shape}"
            )
        object.__setattr__(self, "temperatures", check_temperatures(self.temperatures))

    @property
    def dtype(self) -> str:
        """`float16`."""
        return "float16"

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """The arrays in the order of docs/format.md; `label_logits` only where there are labels."""
        trailing = self.row_shape[1:]
        label_logits = (ArraySpec("label_logits", "<f2", (self.labels,)),) if self.labels else ()
        return (
            ArraySpec("topk_logits", "<f2", (self.k, *trailing)),
            ArraySpec("topk_classes", class_dtype(self.num_classes), (self.k, *trailing)),
            *label_logits,
            ArraySpec("tail_logsumexp", "<f4", (len(self.temperatures), *trailing)),
            *(ArraySpec(name, "<f4", trailing) for name in ("row_max", "tail_mean", "logit_std")),
        )

    @property
    def has_all_logits(self) -> bool:
        """Only where k = C."""
        return self.k == self.num_classes

    def to_json(self) -> dict[str, Any]:
        """As written in headers and manifests."""
        own = {"k": self.k, "temperatures": list(self.temperatures), "labels": self.labels}
        return {**super().to_json(), **own}

    def _encode(self, exact: np.ndarray, labels: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        wanted = self._checked_labels(labels, len(exact))
        arrays = {spec.name: np.empty(spec.shape(len(exact)), spec.dtype) for spec in self.specs}
        clamped = np.zeros(len(exact), np.int64)
        # Some rows at a time: the integers that are ranked, and the float64 of the sums, take 8 bytes a value each.
        step = max(1, _BLOCK_VALUES // math.prod(self.row_shape))
        for start in range(0, len(exact), step):
            rows = slice(start, start + step)
            for name, values in self._encode_block(exact[rows], wanted[rows], clamped[rows]):
                with np.errstate(over="ignore"):  # a tail below the float32 range has no mass at all
                    arrays[name][rows] = values
        return arrays, clamped

    def _encode_block(
        self, exact: np.ndarray, labels: np.ndarray, clamped: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(array, its values) for some rows; counts in `clamped`."""
        row_max = exact.max(axis=1)
        with np.errstate(over="ignore"):  # below the float32 range: contributes nothing, and is clamped where kept
            shifted = exact - row_max[:, None]
        classes = largest_classes(exact, self.k)
        kept = np.take_along_axis(shifted, classes, axis=1)
        clamped += clamp_to_float16(kept, np.take_along_axis(exact, classes, axis=1))
        yield "topk_logits", kept
        yield "topk_classes", classes
        is_tail = np.ones(shifted.shape, bool)
        np.put_along_axis(is_tail, classes, False, axis=1)
        rows, own = np.arange(len(exact)), np.full(labels.shape, -math.inf, np.float32)
        for column, label in enumerate(labels.T):  # labels are there only beside rows (N, C)
            known, there = label >= 0, (rows, label)
            own[known, column] = shifted[there][known]
            low = clamp_to_float16(own[:, column : column + 1], np.where(known, exact[there], -math.inf)[:, None])
            clamped += low * is_tail[there]
            is_tail[rows[known], label[known]] = False
        if self.labels:
            yield "label_logits", own
        std = _std(exact, shifted)
        tail = np.where(is_tail, shifted.astype(np.float64), -math.inf)
        yield "tail_logsumexp", np.stack([_logsumexp(tail / t) for t in self._of_rows(std)], axis=1)
        yield "row_max", row_max
        yield "tail_mean", _mean(shifted, is_tail)
        yield "logit_std", std

    def _of_rows(self, std: np.ndarray) -> Iterator[Any]:
        """The temperatures as what divides rows (N, C, ...)."""
        for temperature in self.temperatures:
            yield z2_temperature(std.astype(np.float64))[:, None] if temperature == Z2 else temperature

    def _checked_labels(self, labels: np.ndarray | None, rows: int) -> np.ndarray:
        """(N, labels) int64, -1 where there is none.

        Raises:
            DataError: another shape, or a label that is no class.
        """
        if labels is None or not self.labels:
            return np.full((rows, self.labels), -1, np.int64)
        if labels.shape != (rows, self.labels):
            raise DataError(f"labels have shape {labels.shape}, expected {(rows, self.labels)} beside these logits")
        if labels.size and (int(labels.min()) < -1 or int(labels.max()) >= self.num_classes):
            raise DataError(f"a label lies outside -1 to {self.num_classes - 1}")
        return labels.astype(np.int64, copy=False)

    def class_index(self, arrays: dict[str, Any]) -> Any:
        """(N, K, ...) int64 `topk_classes`, to index with; NumPy arrays and tensors alike.

        A class beyond C stands in no file of ours. `verify` names it; here it becomes the last class, lest a hostile
        file ends the process.
        """
        classes = arrays["topk_classes"]
        if isinstance(classes, np.ndarray):
            return np.minimum(classes.astype(np.int64), self.num_classes - 1)
        return classes.long().clamp_(max=self.num_classes - 1)

    def decode(self, arrays: dict[str, Any]) -> Any:
        """Raw logit = topk_logits + row_max, where k = C.

        Raises:
            UsageError: the logits of other classes were not kept.
        """
        if not self.has_all_logits:
            raise UsageError(
                f"these rows hold the top {self.k} of {self.num_classes} classes (encoding topk): the other logits are "
                "not in them. Use a loss that top-k rows serve, or a cache made with --dtype float16, int8 or int4"
            )
        index, kept, row_max = self.class_index(arrays), arrays["topk_logits"], arrays["row_max"][:, None]
        if isinstance(kept, np.ndarray):
            logits = np.empty(kept.shape, np.float32)
            logits[...] = row_max  # each class comes once, but for rows without a teacher, which are zeros
            with np.errstate(invalid="ignore"):  # NaN and infinity stand in no file of ours; `verify` names them
                np.put_along_axis(logits, index, kept.astype(np.float32) + row_max, axis=1)
            return logits
        return row_max.expand(kept.shape).clone().scatter_(1, index, kept.float() + row_max)

    def flaw(self, arrays: dict[str, np.ndarray]) -> str | None:
        """A class beyond C or twice in a row, logits out of order, a label or a tail above what they can be."""
        flaw = flaw_of_largest(arrays, "topk_logits", "topk_classes", self.num_classes)
        if flaw is not None:
            return flaw
        if self.labels and (arrays["label_logits"] > 0).any():
            return "label_logits has a logit above the largest"
        if (arrays["tail_logsumexp"] > math.log(self.num_classes) + _ROUNDING).any():
            return "tail_logsumexp is above that of all classes"
        if (arrays["tail_mean"] > 0).any():
            return "tail_mean is above the largest logit"
        return "logit_std is negative" if (arrays["logit_std"] < 0).any() else None

    def top_class(self, arrays: dict[str, Any]) -> Any:
        """(N, ...) int64: the first of `topk_classes`."""
        return self.class_index(arrays)[:, 0]


def check_temperatures(values: Any) -> tuple[float | str, ...]:
    """Temperatures of a tail as they are stored: floats, then perhaps "z2".

    Raises:
        UsageError: none, too many, out of range, not ascending, or not temperatures.

    >>> check_temperatures([1, 2.5, "z2"])
    (1.0, 2.5, 'z2')
    """
    if not isinstance(values, (tuple, list)) or not 1 <= len(values) <= MAX_TEMPERATURES:
        raise UsageError(f"temperatures are a list of 1 to {MAX_TEMPERATURES}, such as 1,2,4; found {values!r:.200}")
    numbers = values[:-1] if isinstance(values[-1], str) and values[-1] == Z2 else values
    for value in numbers:
        # Negated, so that NaN is refused as well.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not LEAST_TEMPERATURE <= value <= LARGEST_TEMPERATURE:
            raise UsageError(
                f"a temperature is a number from {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE:g} (or, as the last one, "
                f"z2: twice the row's standard deviation); found {value!r:.80}"
            )
    checked = tuple(float(value) for value in numbers)
    if any(later <= earlier for earlier, later in pairwise(checked)):
        raise UsageError(f"temperatures must ascend, each once; found {values!r:.200}")
    return (*checked, *values[len(checked) :])


def temperatures_of(text: str) -> tuple[float | str, ...]:
    """The temperatures that an option names: `1,2,4` or `1,z2`.

    Raises:
        UsageError: not such a list.
    """
    values: list[float | str] = []
    for part in (piece.strip() for piece in text.split(",")):
        try:
            values.append(part if part == Z2 else float(part))
        except ValueError:
            raise UsageError(f"--temperatures is a list such as 1,2,4 or 1,2,z2; found {text!r:.80}") from None
    return check_temperatures(values)


def z2_temperature(std: Any) -> Any:
    """The temperature "z2" of rows: twice their `logit_std`, at least 1.2e-38; NumPy arrays and tensors alike."""
    return np.maximum(2 * std, LEAST_STD) if isinstance(std, np.ndarray) else (2 * std).clamp(min=LEAST_STD)


def _std(exact: np.ndarray, shifted: np.ndarray) -> np.ndarray:
    """(N, ...) float32 standard deviation (ddof 0) of the finite logits."""
    finite = np.isfinite(exact)
    values = np.where(finite, np.maximum(shifted, np.float32(-FLOAT32_MAX)), 0).astype(np.float64)
    count = finite.sum(axis=1)
    mean = values.sum(axis=1) / count
    squares = np.where(finite, (values - mean[:, None]) ** 2, 0).sum(axis=1)
    std: np.ndarray = np.sqrt(squares / count).astype(np.float32)
    return std


def _mean(shifted: np.ndarray, is_tail: np.ndarray) -> np.ndarray:
    """(N, ...) float64 mean over the tail; -inf where one of it is masked, or there is none."""
    count = is_tail.sum(axis=1)
    total = np.where(is_tail, shifted, 0).sum(axis=1, dtype=np.float64)
    mean: np.ndarray = np.divide(total, count, out=np.full(count.shape, -math.inf), where=count > 0)
    return mean


def _logsumexp(values: np.ndarray) -> np.ndarray:
    """(N, ...) log of the sum of exp over the classes, -inf where all are."""
    top = values.max(axis=1)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        total: np.ndarray = np.log(np.exp(values - safe[:, None]).sum(axis=1)) + safe
    return total
