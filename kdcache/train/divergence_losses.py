"""Divergences as losses: reverse KL, generalised Jensen-Shannon, and cross-entropy against soft targets.

Each is temperature**2 * D(teacher, student), the mean over the rows that have a teacher; dense prediction counts every
position as a row. With different temperatures the factor is the student's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdcache.train.distributions import log_softmax, pair
from kdcache.train.divergences import jensen_shannon, kl, reverse_kl, soft_cross_entropy
from kdcache.train.log_pair import Pair
from kdcache.train.loss_numbers import SERIES_FROM
from kdcache.train.reductions import Reduction, RowTerms, reduce_rows
from kdcache.train.soft_targets import Teacher


def reverse_kl_loss(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    student_temperature: float | None = None,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    tail_tolerance: float | None = None,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """temperature**2 * KL(student || teacher).

    Args:
        student_logits: (N, C) or (N, C, ...), raw.
        teacher: TeacherRows, or raw logits of the same shape (detached here); rows without a teacher do not count.
        temperature: divides both logits, above 0.
        student_temperature: divides the student's logits where it is to differ; the factor is then its square.
        sample_weight: (N,) or (N, ...) weights, not negative; all 1 by default.
        class_mask: (C,) bool, True for classes that take part; the others are -inf on both sides.
        tail_tolerance: of `topk` rows, see `kdcache.train.distributions.pair`.
        reduction: "mean" divides by the weights of the rows that count, "sum" does not divide, "none" gives the
            terms per row.

    Returns:
        A float32 scalar, or (N, ...) with reduction="none"; float64 for float64 students.

    Raises:
        UsageError: a number, a mask or a teacher that cannot be meant, or rows that cannot serve it.
        MismatchError: student and teacher differ in classes or shape.

    >>> reverse_kl_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=2.0)
    tensor(0.)
    """
    rows = divergence_rows(
        reverse_kl,
        student_logits,
        teacher,
        temperature=temperature,
        student_temperature=student_temperature,
        class_mask=class_mask,
        tail_tolerance=tail_tolerance,
    )
    return reduce_rows(rows, sample_weight=sample_weight, reduction=reduction)


def js_loss(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    beta: float = 0.5,
    student_temperature: float | None = None,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    tail_tolerance: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """temperature**2 * (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q, p the teacher's.

    Errors are those of `reverse_kl_loss`. Source: Agarwal et al. 2024 (arXiv:2306.13649), equation 1.

    Args:
        student_logits: (N, C) or (N, C, ...), raw.
        teacher: TeacherRows, or raw logits of the same shape.
        temperature: divides both logits, above 0.
        beta: share of the teacher in the mixture, above 0 and below 1.
        student_temperature: of the student, where it differs.
        sample_weight: (N,) or (N, ...).
        class_mask: (C,) bool, True for classes that take part.
        tail_tolerance: of `topk` rows, see `kdcache.train.distributions.pair`.
        reduction: mean, sum or none.

    >>> js_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=2.0)
    tensor(0.)
    """
    rows = divergence_rows(
        jensen_shannon,
        student_logits,
        teacher,
        temperature=temperature,
        student_temperature=student_temperature,
        class_mask=class_mask,
        tail_tolerance=tail_tolerance,
        beta=beta,
    )
    return reduce_rows(rows, sample_weight=sample_weight, reduction=reduction)


def soft_ce_loss(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    student_temperature: float | None = None,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    tail_tolerance: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """temperature**2 * -sum p log q: the KL term plus the teacher's entropy, with the gradient of KL.

    Arguments and errors are those of `reverse_kl_loss`.

    >>> soft_ce_loss(torch.zeros(2, 2), torch.zeros(2, 2), temperature=1.0)
    tensor(0.6931)
    """
    rows = divergence_rows(
        soft_cross_entropy,
        student_logits,
        teacher,
        temperature=temperature,
        student_temperature=student_temperature,
        class_mask=class_mask,
        tail_tolerance=tail_tolerance,
    )
    return reduce_rows(rows, sample_weight=sample_weight, reduction=reduction)


def divergence_rows(
    divergence: Callable[..., Tensor],
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    student_temperature: float | None = None,
    class_mask: Tensor | None = None,
    tail_tolerance: float | None = None,
    **options: Any,
) -> RowTerms:
    """temperature**2 * divergence of each row; arguments are those of the losses above.

    Args:
        divergence: a function of a `Pair`.
        student_logits: (N, C, ...).
        teacher: TeacherRows or (N, C, ...).
        temperature: of both.
        student_temperature: of the student, where it differs.
        class_mask: (C,) bool.
        tail_tolerance: of `topk` rows; None for the default.
        **options: of the divergence.
    """
    both = pair(
        student_logits,
        teacher,
        temperature=temperature,
        student_temperature=student_temperature,
        class_mask=class_mask,
        tail_tolerance=tail_tolerance,
    )
    factor = (temperature if student_temperature is None else student_temperature) ** 2
    return RowTerms(factor * divergence(both, **options), both.has_teacher)


def kl_of(both: Pair, *, temperature: float, student_temperature: float) -> Tensor:
    """KL in the form that suits the temperatures, (N, ...), without the factor."""
    return kl(both, is_soft=min(temperature, student_temperature) >= SERIES_FROM)


def soft_target_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    student_temperature: float | None = None,
) -> Tensor:
    """KL(softmax(teacher / temperature) || softmax(student / temperature)), summed over classes, per row.

    The T**2 that keeps gradients comparable between temperatures (Hinton et al. 2015, section 2) is not in it.
    Classes to which the teacher gives probability 0 (-inf logits) add 0, whatever the student says of them.

    Args:
        student_logits: (N, C, ...) floats.
        teacher_logits: (N, C, ...) floats; no gradient flows into them.
        temperature: of both, above 0.
        student_temperature: of the student, where it differs.

    Returns:
        (N, ...) nats, not negative up to rounding.

    >>> soft_target_kl(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), temperature=1.0)
    tensor([0.])
    """
    divisor = temperature if student_temperature is None else student_temperature
    both = Pair(log_softmax(teacher_logits.detach(), temperature), log_softmax(student_logits, divisor), None)
    return kl_of(both, temperature=temperature, student_temperature=divisor)
