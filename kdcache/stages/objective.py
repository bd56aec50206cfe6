"""What a training step minimises: the loss with the options that choose it, over sums that add up.

A step's rows are spread over ranks and accumulation pieces, so that nothing here divides: the mean is
taken by whoever knows the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.stages.batches import Batch
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.loss_options import DEFAULT_TEMPERATURE, courses, loss_settings
from kdcache.train.class_part import over_classes
from kdcache.train.cross_entropy import Labels, cross_entropy
from kdcache.train.distributions import pair
from kdcache.train.divergence_losses import kl_of
from kdcache.train.kd_terms import sum_terms
from kdcache.train.loss_settings import LossSettings
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.schedules import Course
from kdcache.train.soft_targets import Teacher, pseudo_labels


@final
@dataclass(frozen=True)
class Objective:
    """(1 - alpha) * CE + alpha * (losses against the teacher), or CE on the teacher's argmax (`hard_targets`).

    Attributes:
        settings: of the first step, and of all where nothing has a schedule.
        hard_targets: the control, for which the settings count for nothing but their label smoothing.
        alpha: its course over the run.
        temperature: likewise.
        total_steps: of the run.
    """

    settings: LossSettings
    hard_targets: bool = False
    alpha: Course = Course()
    temperature: Course = Course()
    total_steps: int = 1

    @property
    def formula(self) -> str:
        """With its numbers, as printed at the start and kept in the run record."""
        if self.hard_targets:
            return "CE(argmax of the teacher)"
        moving = [
            f"{name} {course.shown(start)}"
            for name, course, start in (
                ("alpha", self.alpha, self.settings.alpha),
                ("temperature", self.temperature, self.settings.temperature),
            )
            if course.end is not None
        ]
        return self.settings.formula + (f"; from the first step to the last: {', '.join(moving)}" if moving else "")

    def at(self, step: int) -> Objective:
        """The objective of one step (from 0), with the numbers that its schedules give."""
        if self.alpha.end is None and self.temperature.end is None:
            return self
        alpha = self.alpha.at(step, self.total_steps, start=self.settings.alpha)
        temperature = self.temperature.at(step, self.total_steps, start=self.settings.temperature)
        return Objective(replace(self.settings, alpha=alpha, temperature=temperature), self.hard_targets)

    def notes(self, *, world_size: int) -> list[str]:
        """What else is to be said at the start of a run, a line each."""
        notes, scale = [], self.settings.scale
        if scale != 1:
            ce, kd = (scale * share for share in (1 - self.settings.alpha, self.settings.alpha))
            notes.append(
                f"--ce-weight {ce:g} and --kd-weight {kd:g} are alpha {self.settings.alpha:g}, all times {scale:g}"
            )
        given = self.settings.temperature
        if given != DEFAULT_TEMPERATURE and not self.hard_targets and not self.settings.follows_run:
            losses = ", ".join(part.loss.name for part in self.settings.losses)
            notes.append(
                f"--temperature {given:g} has no effect on {losses}: a loss that has a temperature of its own takes it "
                "beside its name, as in --loss dkd:temperature=2"
            )
        names = [part.loss.name for part in self.settings.losses if part.loss.is_of_batch]
        if names and world_size > 1:
            notes.append(
                f"{names[0]} correlates the rows of each of the {world_size} ranks on its own: with another number of "
                "ranks it is another loss"
            )
        return notes

    def sums(self, logits: Tensor, batch: Batch, *, sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
        settings = replace(self.settings, alpha=alpha)
        return sum_terms(
            logits, teacher, labels, settings, sample_weight=sample_weight, teacher_classes=batch.teacher_classes
        )

    @torch.no_grad()
    def parts(self, logits: Tensor, batch: Batch) -> Tensor:
        """The terms apart, for metrics: sums and counts [CE, labelled rows, temperature**2 * KL, taught rows].

        CE is without smoothing. In hard-target runs it is that of the teacher's argmax. The KL is measured whatever
        the losses are; of top-k rows it is that of the bucketed distributions.
        """
        labels = self._hard_labels(batch) if self.hard_targets else batch.labels
        parts = [logits.new_zeros((), dtype=torch.float32)] * 4
        if labels is not None:
            known = labels.known if isinstance(labels, MixedLabels) else labels
            parts[:2] = cross_entropy(logits.float(), labels).sum(), (known >= 0).sum()
        if batch.teacher is not None:
            found = masked_kl(
                logits.float(),
                batch,
                temperature=self.settings.temperature,
                student_temperature=self.settings.student_temperature,
                tail_tolerance=self.settings.tail_tolerance,
            )
            if found is not None:
                parts[2:] = found[0].sum() * self.settings.factor, found[1].sum()
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


def build_objective(options: DistillOptions, *, total_steps: int) -> Objective:
    """What the options ask for.

    Raises:
        UsageError: a loss, a schedule or a number that cannot be meant.
    """
    alpha, temperature = courses(options)
    return Objective(loss_settings(options), options.hard_targets, alpha, temperature, total_steps)


def masked_kl(
    logits: Tensor,
    batch: Batch,
    *,
    temperature: float,
    student_temperature: float | None = None,
    tail_tolerance: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    """KL(teacher || student) per row (0 without a teacher), and which rows have one: (N, ...) each.

    None where the rows are of top-k and cannot tell at this temperature: a metric is left out then, where a loss would
    be refused.
    """
    assert batch.teacher is not None
    divisor = temperature if student_temperature is None else student_temperature
    student: Tensor = logits
    teacher: Teacher | None = batch.teacher
    if batch.teacher_classes is not None:
        student, teacher = over_classes(logits, batch.teacher, batch.teacher_classes)
    assert teacher is not None
    try:
        both = pair(
            student,
            teacher,
            temperature=temperature,
            student_temperature=divisor,
            tail_tolerance=tail_tolerance,
        )
    except UsageError:
        if batch.teacher.encoding.has_all_logits:
            raise
        return None
    divergence = kl_of(both, temperature=temperature, student_temperature=divisor)
    taught = torch.ones_like(divergence, dtype=torch.bool)
    if both.has_teacher is not None:
        taught &= both.has_teacher.reshape(-1, *[1] * (divergence.ndim - 1))
    return torch.where(taught, divergence, 0.0), taught
