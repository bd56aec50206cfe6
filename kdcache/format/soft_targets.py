"""The `soft_targets` encoding: probabilities at one temperature, for the mean of several teachers, which has no logits.

The mean of softmax(z_m / T) over teachers m is no softmax of anything at another temperature, so that rows carry their
T and serve it alone. Logarithms are stored, since float16 holds a probability below 6e-8 as 0, and its logarithm to
three digits. Where a teacher kept some classes only, rows keep k of those that all teachers kept, and one number for
the mass of all others, as `topk` rows do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.errors import UsageError
from kdcache.format.arrays import ArraySpec
from kdcache.format.dense import DTYPES
from kdcache.format.encoding import Encoding
from kdcache.format.ranking import class_dtype
from kdcache.format.topk import LARGEST_TEMPERATURE, LEAST_TEMPERATURE

# Of the sum of a row's probabilities: float16 logarithms of 1,000 equal ones are off by 0.2 %.
_ROUNDING = 0.02


@dataclass(frozen=True)
class SoftTargets(Encoding):
    """log p of each class, (N, C, ...), or of k classes a row and of all others together.

    Attributes:
        temperature: the T at which the rows are probabilities; they serve no other.
        k: classes that a row has a place for; C for all. Fewer are for rows (N, C).
        stored: float16 or float32.
    """

    name = "soft_targets"
    temperature: float
    k: int
    stored: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        number = self.temperature
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not LEAST_TEMPERATURE <= number <= LARGEST_TEMPERATURE:  # also NaN
            raise UsageError(
                f"soft targets have a temperature from {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE:g}, found "
                f"{number!r:.80}"
            )
        if self.num_classes < 2:
            raise UsageError("soft targets need two classes or more: the probability of a single one is always 1")
        if not 1 <= self.k <= self.num_classes or (self.k < self.num_classes and len(self.row_shape) > 1):
            raise UsageError(
                f"soft targets hold 1 to C classes a row, and all C in dense prediction; found k = {self.k} with rows "
                f"of shape {self.row_shape}"
            )
        if self.stored not in DTYPES:
            raise UsageError(f"dtype {self.stored!r:.80} is not known; choose one of {', '.join(DTYPES)}")
        object.__setattr__(self, "temperature", float(number))

    @property
    def dtype(self) -> str:
        """`float16` or `float32`."""
        return self.stored

    @property
    def has_all_classes(self) -> bool:
        """Whether each class has a probability of its own."""
        return self.k == self.num_classes

    @property
    def has_all_logits(self) -> bool:
        """Never: there are none."""
        return False

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """`log_probs`, and where k < C `kept_classes` and `log_rest`."""
        log_probs = ArraySpec("log_probs", DTYPES[self.stored], (self.k, *self.row_shape[1:]))
        if self.has_all_classes:
            return (log_probs,)
        return (
            log_probs,
            ArraySpec("kept_classes", class_dtype(self.num_classes), (self.k,)),
            ArraySpec("log_rest", "<f4"),
        )

    def to_json(self) -> dict[str, Any]:
        """As written in headers and manifests."""
        return {**super().to_json(), "temperature": self.temperature, "k": self.k}

    def _encode(self, exact: np.ndarray, labels: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        raise UsageError("soft targets are made from the rows of several caches (kdcache ensemble), not from logits")

    def from_log_probs(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays in their stored types, from the same ones in float32 and int64."""
        return {spec.name: np.ascontiguousarray(arrays[spec.name].astype(spec.dtype)) for spec in self.specs}

    def decode(self, arrays: dict[str, Any]) -> Any:
        """Refused: a mean of probabilities has no logits.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"these rows are soft targets at temperature {self.temperature:g}, the mean of several teachers, and have "
            "no logits: use a loss that takes probabilities (kl, reverse_kl, soft_ce, js) at that temperature, or the "
            "mean of logits (--ensemble logits, kdcache ensemble --rule logits)"
        )

    def class_index(self, arrays: dict[str, Any]) -> Any:
        """(N, k) int64 `kept_classes`, to index with; a class beyond C, of no file of ours, becomes the last one."""
        classes = arrays["kept_classes"]
        if isinstance(classes, np.ndarray):
            return np.minimum(classes.astype(np.int64), self.num_classes - 1)
        return classes.long().clamp(max=self.num_classes - 1)

    def flaw(self, arrays: dict[str, np.ndarray]) -> str | None:
        """Probabilities above 1 or that do not sum to 1, a class beyond C or twice in a row."""
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and +inf are named elsewhere
            total = np.exp(arrays["log_probs"].astype(np.float64)).sum(axis=1)
            if not self.has_all_classes:
                total = total + np.exp(arrays["log_rest"].astype(np.float64))
            if not (np.abs(total - 1) <= _ROUNDING).all():
                return "log_probs are of probabilities that do not sum to 1"
        if self.has_all_classes:
            return None
        classes = arrays["kept_classes"]
        if (classes >= self.num_classes).any():
            return "kept_classes has a class beyond the last"
        # A slot without a class repeats the row's first one and has probability 0.
        is_empty = np.isneginf(arrays["log_probs"])
        ranked = np.sort(np.where(is_empty, self.num_classes + np.arange(self.k), classes.astype(np.int64)), axis=1)
        return "kept_classes has a class twice in a row" if (ranked[:, 1:] == ranked[:, :-1]).any() else None

    def top_class(self, arrays: dict[str, Any]) -> Any:
        """(N, ...) the most likely class.

        Raises:
            UsageError: the mass of all others may hide a likelier one.
        """
        if not self.has_all_classes:
            raise UsageError(
                f"these soft targets hold {self.k} of {self.num_classes} classes a row, so that the most likely class "
                "may be among the others: use caches with all logits"
            )
        return arrays["log_probs"].argmax(1)
