"""The numbers of the distillation loss, checked once, and the formula that runs print."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from kdcache.errors import UsageError
from kdcache.train.loss_numbers import check_temperature
from kdcache.train.loss_records import Kl, WeightedLoss


class SingleKl(NamedTuple):
    """A sum of losses that is one KL."""

    weight: float
    temperature: float
    student_temperature: float


@dataclass(frozen=True)
class LossSettings:
    """scale * ((1 - alpha) * CE + alpha * (weighted sum of losses against the teacher)).

    Args:
        alpha: weight of the teacher's side, in [0, 1]; 0 = labels alone, 1 = teacher alone.
        temperature: divides the teacher's logits, and the student's unless told otherwise; above 0.
        student_temperature: divides the student's logits; the factor T**2 is its square.
        label_smoothing: share of the CE target that is spread over all classes, in [0, 1).
        losses: what the teacher's side is: T**2 * KL(teacher || student) by default.
        scale: of everything, above 0: what is left of two weights that do not sum to 1.
        tail_tolerance: of `topk` rows at a temperature that was not stored: the mean error of the tail's mass that is
            taken, above 0; None for 0.01.

    Raises:
        UsageError: a number that cannot be meant.
    """

    alpha: float
    temperature: float
    student_temperature: float | None = None
    label_smoothing: float = 0.0
    losses: tuple[WeightedLoss, ...] = (WeightedLoss(Kl()),)
    scale: float = 1.0
    tail_tolerance: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(
                f"alpha is {self.alpha}, expected a number in [0, 1]: the weight of the KD term "
                "(0 = labels alone, 1 = teacher alone)"
            )
        check_temperature("temperature", self.temperature)
        check_temperature("student_temperature", self.student_temperature)
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing is {self.label_smoothing}, expected a number in [0, 1)")
        if not 0 < self.scale < math.inf:
            raise UsageError(f"scale is {self.scale}, expected a finite number above 0")
        if self.tail_tolerance is not None and not self.tail_tolerance > 0:
            raise UsageError(f"tail_tolerance is {self.tail_tolerance}, expected a number above 0")
        if not self.losses:
            raise UsageError("losses is empty: name one at least, or use alpha=0 for labels alone")

    @property
    def student_divisor(self) -> float:
        """What divides the student's logits; its square is the factor of the KL term."""
        return self.temperature if self.student_temperature is None else self.student_temperature

    @property
    def factor(self) -> float:
        """T**2, the student's: gradients of the softened term shrink with its square (Hinton et al. 2015)."""
        return self.student_divisor**2

    @property
    def follows_run(self) -> bool:
        """Whether the temperature is in any of the losses."""
        return any(part.loss.follows_run for part in self.losses)

    @property
    def single_kl(self) -> SingleKl | None:
        """The weight and the temperatures of the KL, where nothing else is in the sum."""
        if len(self.losses) != 1 or not isinstance(self.losses[0].loss, Kl):
            return None
        own = self.losses[0].loss.temperatures(self.temperature, self.student_temperature)
        return SingleKl(self.losses[0].weight, *own)

    @property
    def formula(self) -> str:
        """The loss with its numbers.

        >>> LossSettings(alpha=0.9, temperature=4.0).formula
        '0.1*CE + 0.9*16*KL(teacher || student) at temperature 4'
        """
        smoothing = f" (label smoothing {self.label_smoothing:g})" if self.label_smoothing else ""
        student = "" if self.student_divisor == self.temperature else f", the student's {self.student_divisor:g}"
        parts = [
            ("" if part.weight == 1 else f"{part.weight:g}*")
            + part.loss.formula(self.temperature, self.student_temperature)
            for part in self.losses
        ]
        soft = parts[0] if len(parts) == 1 else "(" + " + ".join(parts) + ")"
        terms = f"{1 - self.alpha:g}*CE{smoothing} + {self.alpha:g}*{soft}"
        whole = terms if self.scale == 1 else f"{self.scale:g}*[{terms}]"
        if not self.follows_run:
            return whole
        return f"{whole} at temperature {self.temperature:g}{student}"
