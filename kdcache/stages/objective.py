"""What a training step minimises: the loss with the options that choose it, over sums that add up.

A step's rows are spread over ranks and accumulation pieces, so that nothing here divides: the mean is
taken by whoever knows the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.stages.batches import Batch
from kdcache.train.loss_settings import LossSettings
from kdcache.train.losses import Labels, cross_entropy, soft_target_kl, sum_terms
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.soft_targets import pseudo_labels, teacher_signal


@dataclass(frozen=True)
class Objective:
    """(1 - alpha) * CE + alpha * temperature**2 * KL, or CE on the teacher's argmax (`hard_targets`)."""

    settings: LossSettings
    hard_targets: bool = False

    @property
    def formula(self) -> str:
        """With its numbers, as printed at the start and kept in the run record."""
        return "CE(argmax of the teacher)" if self.hard_targets else self.settings.formula

    def sums(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Numerator (with a gradient) and denominator of the mean over some rows of a step.

        A row with a label only learns the label, a row with a teacher only the teacher, whatever alpha;
        a row with neither counts nowhere. So do rows of data without any labels.
        """
        labels, teacher, alpha = batch.labels, batch.teacher, self.settings.alpha
        if self.hard_targets:
            labels, teacher, alpha = self._hard_labels(batch), None, 0.0
        elif labels is None:
            alpha = 1.0  # what the rule above says of rows without a label
        elif teacher is None:
            alpha = 0.0
        return sum_terms(logits, teacher, labels, replace(self.settings, alpha=alpha))

    @torch.no_grad()
    def parts(self, logits: Tensor, batch: Batch) -> Tensor:
        """The terms apart, for metrics: sums and counts [CE, labelled rows, temperature**2 * KL, taught rows].

        CE is without smoothing. In hard-target runs it is that of the teacher's argmax.
        """
        labels = self._hard_labels(batch) if self.hard_targets else batch.labels
        parts = [logits.new_zeros((), dtype=torch.float32)] * 4
        if labels is not None:
            known = labels.known if isinstance(labels, MixedLabels) else labels
            parts[:2] = cross_entropy(logits.float(), labels).sum(), (known >= 0).sum()
        if batch.teacher is not None:
            divergence, taught = masked_kl(logits.float(), batch, temperature=self.settings.temperature)
            parts[2:] = divergence.sum() * self.settings.factor, taught.sum()
        return torch.stack([part.float() for part in parts])

    @staticmethod
    def _hard_labels(batch: Batch) -> Labels:
        if batch.teacher is None:
            raise UsageError("--hard-targets needs the teacher's cache; give --cache")
        hard, labels = pseudo_labels(batch.teacher), batch.labels
        if labels is None:
            return hard
        if not isinstance(labels, MixedLabels):
            return torch.where(hard >= 0, hard, labels)
        ratio = torch.where(hard >= 0, 1.0, labels.ratio)  # the teacher's argmax on a mixed view is one class
        first, second = (torch.where(hard >= 0, hard, part) for part in (labels.first, labels.second))
        return MixedLabels(first, second, ratio)


def masked_kl(logits: Tensor, batch: Batch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) per row (0 without a teacher), and which rows have one: (N, ...) each."""
    assert batch.teacher is not None
    signal = teacher_signal(batch.teacher, dtype=logits.dtype)
    divergence = soft_target_kl(logits, signal.logits, temperature=temperature)
    taught = torch.ones_like(divergence, dtype=torch.bool)
    if signal.has_teacher is not None:
        taught &= signal.has_teacher.reshape(-1, *[1] * (divergence.ndim - 1))
    return torch.where(taught, divergence, 0.0), taught
