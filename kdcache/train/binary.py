"""Distillation for sigmoid teachers, where a softmax over the single class would teach nothing: yes or no per logit.

The two-class form of `kdcache.losses.kd_loss`: Bernoulli probabilities sigmoid(z / temperature), the same direction of
alpha, the same rule for rows that lack a label or a teacher, the same temperature**2. Multi-label teachers say yes or
no to each of L labels; every one of the N * L answers then counts as a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.capability import require
from kdcache.train.kd import kd_loss
from kdcache.train.reductions import Reduction
from kdcache.train.soft_targets import Teacher


def binary_kd(
    student_logits: torch.Tensor,
    teacher_logits: Teacher | None,
    labels: torch.Tensor | None = None,
    *,
    alpha: float,
    temperature: float,
    sample_weight: torch.Tensor | None = None,
    student_temperature: float | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """(1 - alpha) * BCE + alpha * temperature**2 * KL(teacher || student) over yes and no.

    A logit z is the same as the two logits (0, z), so this is `kd_loss` of those.

    Args:
        student_logits: (N,) or (N, 1) of a one-logit student, or (N, L) of a multi-label one; raw.
        teacher_logits: TeacherRows of a cache with as many classes, or raw logits of the same shape, (N,) and (N, 1)
            being alike; None only with alpha=0.
        labels: integers 0, 1, or -1 for no label, (N,) beside one logit, (N, L) beside L; None only with alpha=1.
        alpha: weight of the KD term, in [0, 1].
        temperature: divides both logits, above 0.
        sample_weight: (N,) or (N, L).
        student_temperature: of the student, where it differs; the factor is then its square.
        label_smoothing: of the BCE term, in [0, 1): the target 1 becomes 1 - label_smoothing / 2.
        reduction: as in `kd_loss`; "none" gives (N,) or (N, L).

    Returns:
        A float32 scalar, the mean over the answers that have a signal.

    Raises:
        UsageError: a number, or a teacher, that cannot be meant.
        MismatchError: logits of other shapes, or of a student and a teacher that differ.

    >>> binary_kd(torch.zeros(2), torch.zeros(2), torch.tensor([0, 1]), alpha=0.5, temperature=1.0)
    tensor(0.3466)
    >>> binary_kd(torch.zeros(1, 3), None, torch.tensor([[0, 1, -1]]), alpha=0.0, temperature=1.0)
    tensor(0.6931)
    """
    student = _two_classes(student_logits, "the student's")
    teacher: Teacher | None = None
    if isinstance(teacher_logits, TeacherRows):
        rows = teacher_logits.tensors()
        if not rows.encoding.has_all_logits:
            require("binary_kd", rows)
        two = _two_classes(rows.dense(), "the teacher's")
        _check_alike(student, two)
        teacher = replace(TeacherRows.from_dense(two, sample_id=rows.sample_id), has_teacher=rows.has_teacher)
    elif teacher_logits is not None:
        teacher = _two_classes(teacher_logits, "the teacher's")
        _check_alike(student, teacher)
    if labels is not None and student.ndim == 2:
        labels = labels.reshape(len(labels)) if labels.shape == (len(student), 1) else labels
    return kd_loss(
        student,
        teacher,
        labels,
        alpha=alpha,
        temperature=temperature,
        sample_weight=sample_weight,
        student_temperature=student_temperature,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def _two_classes(logits: torch.Tensor, whose: str) -> torch.Tensor:
    """Logits of no and yes: (N, 2) of one logit a row, (N, 2, L) of L."""
    if not logits.is_floating_point():
        raise UsageError(f"{whose} logits must be floating point, found {logits.dtype}")
    if logits.ndim == 2 and logits.shape[1] == 1:
        logits = logits.squeeze(1)
    if logits.ndim not in (1, 2):
        raise MismatchError(
            f"{whose} logits have shape {tuple(logits.shape)}, expected (N,), (N, 1) or (N, L), one logit for each "
            "question; for classes that exclude each other see kd_loss"
        )
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


def _check_alike(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape[2:] != teacher.shape[2:]:
        asked, told = (f"{t.shape[2] if t.ndim == 3 else 1} logit(s) a row" for t in (student, teacher))
        raise MismatchError(
            f"the student has {asked}, the teacher {told}: binary_kd compares them one by one. For classes that "
            "exclude each other see kd_loss"
        )
