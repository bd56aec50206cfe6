"""`DistillationLoss`: `kd_loss` with its settings kept, for loops that want a module."""

from __future__ import annotations

from typing import final

import torch
from torch import nn

from kdcache.train.loss_settings import LossSettings
from kdcache.train.losses import Labels, loss_terms, safe_mean, sum_terms
from kdcache.train.soft_targets import Teacher


@final
class DistillationLoss(nn.Module):
    """(1 - alpha) * CE + alpha * temperature**2 * KL(teacher || student); see `kdcache.losses.kd_loss`.

    Args:
        alpha: weight of the KD term, in [0, 1]; 0 = labels alone, 1 = teacher alone.
        temperature: divides both logits, above 0.
        student_temperature: of the student where it differs; the factor is then its square.
        label_smoothing: of the CE term, in [0, 1).

    Raises:
        UsageError: a number that cannot be meant.

    >>> criterion = DistillationLoss(alpha=0.9, temperature=4.0)
    >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]))
    tensor(0.1099)
    >>> criterion
    DistillationLoss(0.1*CE + 0.9*16*KL(teacher || student) at temperature 4)
    """

    def __init__(
        self,
        alpha: float = 0.9,
        temperature: float = 4.0,
        *,
        student_temperature: float | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings = LossSettings(alpha, temperature, student_temperature, label_smoothing)

    @property
    def formula(self) -> str:
        """The loss with its numbers, as runs print it."""
        return self.settings.formula

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher: Teacher | None,
        labels: Labels | None = None,
        sample_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean over the rows that have a signal, a scalar.

        Args:
            student_logits: (N, C) or (N, C, ...), raw.
            teacher: TeacherRows or raw logits (N, C, ...); None only with alpha=0.
            labels: (N, ...) integers, -1 = no label, or MixedLabels; None only with alpha=1.
            sample_weight: (N,) or (N, ...).
        """
        terms, total = loss_terms(student_logits, teacher, labels, self.settings, sample_weight=sample_weight)
        return safe_mean(terms.sum(), total)

    def sums(
        self,
        student_logits: torch.Tensor,
        teacher: Teacher | None,
        labels: Labels | None = None,
        sample_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Numerator and denominator of that mean, for a global batch; see `kdcache.losses.loss_sums`."""
        return sum_terms(student_logits, teacher, labels, self.settings, sample_weight=sample_weight)

    def extra_repr(self) -> str:
        """The formula, for `print(criterion)`."""
        return self.formula
