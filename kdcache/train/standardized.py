"""Logit standardisation: KL of z-scores, so that the student need not match the range of the teacher's logits.

Each row's logits are divided by their own standard deviation times a base temperature: the row's temperature is
base * std. The paper's formula divides by C (ddof 0), its published code by C - 1 (ddof 1): the same at a base
temperature that is sqrt(C / (C - 1)) higher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.format.topk import Z2
from kdcache.store.rows import TeacherRows
from kdcache.train.dense_logits import dense_logits
from kdcache.train.distributions import is_topk, log_softmax, refuse_mask
from kdcache.train.divergence_losses import kl_of
from kdcache.train.log_pair import Pair
from kdcache.train.loss_numbers import check_temperature
from kdcache.train.reductions import Reduction, RowTerms, reduce_rows
from kdcache.train.soft_targets import Teacher
from kdcache.train.sparse import standardised, topk_pair
from kdcache.train.tail import DEFAULT_TAIL_TOLERANCE

BASE_TEMPERATURE = 2.0


def standardized_kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float = BASE_TEMPERATURE,
    ddof: int = 0,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """temperature**2 * KL(softmax(z / (std(z) * temperature)) || softmax(v / (std(v) * temperature))).

    Args:
        student_logits: (N, C) or (N, C, ...), raw; the gradient flows through their standard deviation as well.
        teacher: TeacherRows, or raw logits of the same shape; rows without do not count. `topk` rows serve it exactly
            at the base temperature 2 where they were stored with `--temperatures z2`.
        temperature: the base temperature, above 0: 2 in the paper.
        ddof: what the variance's divisor is below C: 0 as in the paper, 1 as in its code; `topk` rows: 0.
        sample_weight: (N,) or (N, ...), not negative.
        class_mask: (C,) bool, True for classes that take part; the standard deviation is theirs.
        reduction: as in `kd_loss`.

    Returns:
        A float32 scalar, or (N, ...) with reduction="none"; float64 for float64 students.

    Raises:
        UsageError: a number, a mask or a teacher that cannot be meant, or rows that cannot serve it.
        MismatchError: student and teacher differ in classes or shape.

    Source: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024 (arXiv:2403.01427).

    >>> bool(standardized_kd_loss(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 4.0, 6.0]])).abs() < 1e-6)
    True
    """
    rows = standardized_rows(student_logits, teacher, temperature=temperature, ddof=ddof, class_mask=class_mask)
    return reduce_rows(rows, sample_weight=sample_weight, reduction=reduction)


def standardized_rows(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    ddof: int = 0,
    class_mask: Tensor | None = None,
    tail_tolerance: float | None = None,
) -> RowTerms:
    """The loss of each row (N, ...); arguments are those of `standardized_kd_loss`."""
    check_temperature("temperature", temperature)
    if ddof not in (0, 1):
        raise UsageError(f"ddof is {ddof}, expected 0 (divide by C, the paper) or 1 (by C - 1, its code)")
    if is_topk(teacher):
        refuse_mask(class_mask)
        both = _topk_pair(student_logits, teacher.tensors(), temperature, ddof, tail_tolerance)
    else:
        dense = dense_logits(student_logits, teacher, loss="standardized_kd", class_mask=class_mask)
        log_p, log_q = (
            log_softmax(standardize(logits, ddof=ddof), temperature) for logits in (dense.teacher, dense.student)
        )
        both = Pair(log_p, log_q, dense.has_teacher)
    values = kl_of(both, temperature=temperature, student_temperature=temperature)
    return RowTerms(temperature**2 * values, both.has_teacher)


def standardize(logits: Tensor, *, ddof: int = 0) -> Tensor:
    """z-scores over the classes: mean 0 and standard deviation 1; zeros where all logits are equal.

    Args:
        logits: (N, C, ...) float32 or float64; -inf is a masked class, does not count and stays.
        ddof: what the variance's divisor is below the number of classes.

    Returns:
        (N, C, ...).
    """
    counts = logits > -torch.inf
    number = counts.sum(dim=1, keepdim=True)
    mean = torch.where(counts, logits, 0.0).sum(dim=1, keepdim=True) / number
    centred = torch.where(counts, logits, mean) - mean
    variance = centred.square().sum(dim=1, keepdim=True) / (number - ddof).clamp_min(1)
    # The slope of the root is infinite at 0, where equal logits have nowhere to go.
    std = torch.where(variance > 0, variance, 1.0).sqrt()
    return torch.where(counts, centred / std, -torch.inf)


def _topk_pair(
    student_logits: Tensor, rows: TeacherRows, temperature: float, ddof: int, tail_tolerance: float | None
) -> Pair:
    if ddof != 0:
        raise UsageError("topk rows hold the standard deviation with ddof 0: leave ddof out, or use a dense cache")
    of_teacher = Z2 if temperature == BASE_TEMPERATURE else temperature * rows.arrays["logit_std"]
    return topk_pair(
        standardised(student_logits),
        rows,
        temperature=of_teacher,
        student_temperature=temperature / BASE_TEMPERATURE,
        tail_tolerance=DEFAULT_TAIL_TOLERANCE if tail_tolerance is None else tail_tolerance,
    )
