"""`DistillationLoss`: `kd_loss` with its settings kept, for loops that want a module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import nn

from kdcache.train.cross_entropy import Labels
from kdcache.train.kd_terms import loss_terms, sum_terms
from kdcache.train.loss_records import Loss, WeightedLoss
from kdcache.train.loss_settings import LossSettings
from kdcache.train.loss_text import as_losses
from kdcache.train.reductions import safe_mean
from kdcache.train.soft_targets import Teacher


@final
class DistillationLoss(nn.Module):
    """(1 - alpha) * CE + alpha * temperature**2 * KL(teacher || student); see `kdcache.losses.kd_loss`.

    Other losses may stand in the place of the KL, as a weighted sum: `losses=["kl", "dkd:beta=2*0.5"]`, or records as
    `kdcache.losses.WeightedLoss(kdcache.losses.Dkd(beta=2), 0.5)`. DIST is a property of the batch that it is given.

    Args:
        alpha: weight of the KD term, in [0, 1]; 0 = labels alone, 1 = teacher alone.
        temperature: divides both logits, above 0.
        student_temperature: of the student where it differs; the factor is then its square.
        label_smoothing: of the CE term, in [0, 1).
        losses: what alpha weighs, by record or by text; the KL by default.
        class_mask: (C,) bool, True for classes that take part; not part of the state dict.
        teacher_classes: (M,) ascending, the classes that the teacher knows (`ClassMap.known`), as in `kd_loss`.
        tail_tolerance: of `topk` rows, as in `kd_loss`.

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
        losses: Iterable[WeightedLoss | Loss | str] | Loss | WeightedLoss | str = "kl",
        class_mask: torch.Tensor | None = None,
        teacher_classes: Sequence[int] | None = None,
        tail_tolerance: float | None = None,
    ) -> None:
        super().__init__()
        self.settings = LossSettings(
            alpha,
            temperature,
            student_temperature,
            label_smoothing,
            as_losses(losses),
            tail_tolerance=tail_tolerance,
        )
        self.teacher_classes = None if teacher_classes is None else tuple(teacher_classes)
        self.class_mask: torch.Tensor | None
        self.register_buffer("class_mask", class_mask, persistent=False)

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
        terms, total = loss_terms(
            student_logits,
            teacher,
            labels,
            self.settings,
            sample_weight=sample_weight,
            class_mask=self.class_mask,
            teacher_classes=self.teacher_classes,
        )
        return safe_mean(terms.sum(), total)

    def sums(
        self,
        student_logits: torch.Tensor,
        teacher: Teacher | None,
        labels: Labels | None = None,
        sample_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Numerator and denominator of that mean, for a global batch; see `kdcache.losses.loss_sums`."""
        return sum_terms(
            student_logits,
            teacher,
            labels,
            self.settings,
            sample_weight=sample_weight,
            class_mask=self.class_mask,
            teacher_classes=self.teacher_classes,
        )

    def extra_repr(self) -> str:
        """The formula, for `print(criterion)`."""
        return self.formula
