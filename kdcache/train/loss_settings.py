"""The four numbers of the distillation loss, checked once, and the formula that runs print."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kdcache.errors import UsageError


@dataclass(frozen=True)
class LossSettings:
    """(1 - alpha) * CE + alpha * T**2 * KL(teacher || student).

    Args:
        alpha: weight of the KD term, in [0, 1]; 0 = labels alone, 1 = teacher alone.
        temperature: divides the teacher's logits, and the student's unless told otherwise; above 0.
        student_temperature: divides the student's logits; the factor T**2 is its square.
        label_smoothing: share of the CE target that is spread over all classes, in [0, 1).

    Raises:
        UsageError: a number that cannot be meant.
    """

    alpha: float
    temperature: float
    student_temperature: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(
                f"alpha is {self.alpha}, expected a number in [0, 1]: the weight of the KD term "
                "(0 = labels alone, 1 = teacher alone)"
            )
        for name in ("temperature", "student_temperature"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name} is {value}, expected a finite number above 0 (usual: 1 to 8)")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing is {self.label_smoothing}, expected a number in [0, 1)")

    @property
    def student_divisor(self) -> float:
        """What divides the student's logits; its square is the factor of the KL term."""
        return self.temperature if self.student_temperature is None else self.student_temperature

    @property
    def factor(self) -> float:
        """T**2, the student's: gradients of the softened term shrink with its square (Hinton et al. 2015)."""
        return self.student_divisor**2

    @property
    def formula(self) -> str:
        """The loss with its numbers.

        >>> LossSettings(alpha=0.9, temperature=4.0).formula
        '0.1*CE + 0.9*16*KL(teacher || student) at temperature 4'
        """
        smoothing = f" (label smoothing {self.label_smoothing:g})" if self.label_smoothing else ""
        student = "" if self.student_divisor == self.temperature else f", the student's {self.student_divisor:g}"
        return (
            f"{1 - self.alpha:g}*CE{smoothing} + {self.alpha:g}*{self.factor:g}*KL(teacher || student) "
            f"at temperature {self.temperature:g}{student}"
        )
