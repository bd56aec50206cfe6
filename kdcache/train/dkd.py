"""Decoupled knowledge distillation: the KL term cut into its target and its non-target part, weighed on their own.

KL = TCKD + (1 - p_target) NCKD, so that a sure teacher says little about the other classes; DKD frees that weight.
"""

from __future__ import annotations

from torch import Tensor

from kdcache.errors import UsageError
from kdcache.train.cross_entropy import check_kept, check_labels
from kdcache.train.dense_logits import dense_logits
from kdcache.train.distributions import is_topk, log_softmax, pair
from kdcache.train.divergence_losses import kl_of
from kdcache.train.log_pair import Pair, against_others
from kdcache.train.loss_numbers import check_part_weight, check_temperature
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.reductions import Reduction, RowTerms, reduce_rows
from kdcache.train.row_weights import per_position
from kdcache.train.soft_targets import Teacher
from kdcache.train.sparse_metrics import target_pair


def dkd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
    student_temperature: float | None = None,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    tail_tolerance: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """temperature**2 * (alpha * TCKD + beta * NCKD).

    TCKD is the KL of (target, all others), NCKD that of the other classes among themselves, teacher || student. With
    alpha = 1 and beta = 1 - p_target it is the KL term itself; with two classes NCKD is 0.

    Args:
        student_logits: (N, C) or (N, C, ...), raw.
        teacher: TeacherRows that hold all logits, or raw logits of the same shape; with beta=0 `topk` rows as well.
        labels: (N, ...) integers, the target; rows without (-1), or without a teacher, do not count.
        temperature: divides both logits, above 0.
        alpha: weight of TCKD, not negative; no relation to the alpha of `kd_loss`.
        beta: weight of NCKD, not negative.
        student_temperature: of the student, where it differs; the factor is then its square.
        sample_weight: (N,) or (N, ...), not negative.
        class_mask: (C,) bool, True for classes that take part; not with `topk` rows.
        tail_tolerance: of `topk` rows, see `kdcache.train.distributions.pair`.
        reduction: as in `kd_loss`.

    Returns:
        A float32 scalar, or (N, ...) with reduction="none"; float64 for float64 students.

    Raises:
        UsageError: numbers, labels or a teacher that cannot be meant, or rows that do not hold all logits.
        MismatchError: student and teacher differ in classes or shape.
        DataError: labels out of range.

    Source: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022 (arXiv:2203.08679), equations 3 to 7.

    >>> import torch
    >>> dkd_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([1]), temperature=4.0)
    tensor(0.)
    """
    rows = dkd_rows(
        student_logits,
        teacher,
        labels,
        temperature=temperature,
        student_temperature=student_temperature,
        alpha=alpha,
        beta=beta,
        class_mask=class_mask,
        tail_tolerance=tail_tolerance,
    )
    return reduce_rows(rows, sample_weight=sample_weight, reduction=reduction)


def dkd_rows(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | MixedLabels,
    *,
    temperature: float,
    student_temperature: float | None = None,
    alpha: float,
    beta: float,
    class_mask: Tensor | None = None,
    tail_tolerance: float | None = None,
) -> RowTerms:
    """The loss of each row (N, ...); arguments are those of `dkd_loss`."""
    check_temperature("temperature", temperature)
    check_temperature("student_temperature", student_temperature)
    check_part_weight("alpha of dkd", alpha)
    check_part_weight("beta of dkd", beta)
    if isinstance(labels, MixedLabels):
        raise UsageError("dkd needs one target a row, and rows of mixed views (MixUp, CutMix) have two; use kl")
    if beta == 0 and is_topk(teacher):
        outcomes = pair(
            student_logits,
            teacher,
            temperature=temperature,
            student_temperature=student_temperature,
            class_mask=class_mask,
            tail_tolerance=tail_tolerance,
        )
        target = target_pair(outcomes, teacher.tensors(), labels)
        factor = (temperature if student_temperature is None else student_temperature) ** 2
        target_part = kl_of(target, temperature=temperature, student_temperature=factor**0.5)
        return RowTerms(factor * alpha * target_part, target.has_teacher)
    both = dense_logits(student_logits, teacher, loss="dkd", class_mask=class_mask)
    targets = check_labels(both.student, labels)
    assert isinstance(targets, Tensor)
    if class_mask is not None:
        check_kept(targets, class_mask)
    divisor = temperature if student_temperature is None else student_temperature
    at_target = targets.clamp_min(0).unsqueeze(1)
    teachers, students = (
        against_others(log_softmax(logits, t), at_target)
        for logits, t in ((both.teacher, temperature), (both.student, divisor))
    )
    target_part, other_part = (
        kl_of(Pair(of_teacher, of_student, None), temperature=temperature, student_temperature=divisor)
        for of_teacher, of_student in zip(teachers, students, strict=True)
    )
    counts = targets >= 0
    if both.has_teacher is not None:
        counts = counts & per_position(both.has_teacher, counts)
    return RowTerms(divisor**2 * (alpha * target_part + beta * other_part), counts)
