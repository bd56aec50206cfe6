"""Distillation for one-logit (yes or no) teachers, where a softmax over the single class would teach nothing.

The two-class form of `kdcache.train.losses`: Bernoulli probabilities sigmoid(z / temperature), the same
direction of alpha, the same rule for rows that lack a label or a teacher, the same temperature**2.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.losses import kd_loss
from kdcache.train.soft_targets import Teacher


def binary_kd(
    student_logits: torch.Tensor,
    teacher_logits: Teacher | None,
    labels: torch.Tensor | None = None,
    *,
    alpha: float,
    temperature: float,
    sample_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """(1 - alpha) * BCE + alpha * temperature**2 * KL(teacher || student) over yes and no.

    A logit z is the same as the two logits (0, z), so this is `kd_loss` of those.

    Args:
        student_logits: (N,) or (N, 1), raw.
        teacher_logits: TeacherRows of a one-class cache, or raw logits (N,) or (N, 1); None only with alpha=0.
        labels: (N,) integers 0, 1, or -1 for no label; None only with alpha=1.
        alpha: weight of the KD term, in [0, 1].
        temperature: divides both logits, above 0.
        sample_weight: (N,).

    Returns:
        A float32 scalar, the mean over the rows that have a signal.

    Raises:
        UsageError: a number, or a teacher, that cannot be meant.
        MismatchError: logits of another shape than (N,) or (N, 1).

    >>> binary_kd(torch.zeros(2), torch.zeros(2), torch.tensor([0, 1]), alpha=0.5, temperature=1.0)
    tensor(0.3466)
    """
    teacher: Teacher | None = None
    if isinstance(teacher_logits, TeacherRows):
        rows = teacher_logits.tensors()
        two = TeacherRows.from_dense(_two_classes(rows.dense(), "the teacher's"), sample_id=rows.sample_id)
        teacher = replace(two, has_teacher=rows.has_teacher)
    elif teacher_logits is not None:
        teacher = _two_classes(teacher_logits, "the teacher's")
    return kd_loss(
        _two_classes(student_logits, "the student's"),
        teacher,
        labels,
        alpha=alpha,
        temperature=temperature,
        sample_weight=sample_weight,
    )


def _two_classes(logits: torch.Tensor, whose: str) -> torch.Tensor:
    """(N, 2) logits of no and yes."""
    if not logits.is_floating_point():
        raise UsageError(f"{whose} logits must be floating point, found {logits.dtype}")
    column = logits.unsqueeze(1) if logits.ndim == 1 else logits
    if column.ndim != 2 or column.shape[1] != 1:
        raise MismatchError(f"{whose} logits have shape {tuple(logits.shape)}, expected (N,) or (N, 1); see kd_loss")
    return torch.cat([torch.zeros_like(column), column], dim=1)
