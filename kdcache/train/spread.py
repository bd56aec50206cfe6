"""KL against top-k rows whose tail is spread: the mass of the classes that were not kept, evenly over all of them.

The bucketed KL leaves the tail's shape to the student: it is a lower bound of the dense KL, and says nothing about 70 %
of the distribution where that lies in the tail. Spreading it makes a whole distribution of what the row says, with the
most entropy that it can have. That is a claim about the teacher, and no better than the bucket everywhere (150 classes,
K = 10: 0.9 points of accuracy more at T = 2, 0.7 less at T = 4), so that it is a loss of its own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kdcache.store.rows import TeacherRows
from kdcache.train.capability import require
from kdcache.train.distributions import is_topk, pair
from kdcache.train.divergence_losses import divergence_rows, kl_of
from kdcache.train.kept import kept
from kdcache.train.mean_targets import is_mean
from kdcache.train.reductions import Reduction, RowTerms, reduce_rows
from kdcache.train.soft_targets import Teacher


def spread_kl_loss(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    student_temperature: float | None = None,
    sample_weight: Tensor | None = None,
    tail_tolerance: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """temperature**2 * KL(teacher with an even tail || student); of rows that hold all logits, the KL itself.

    The tail of n classes with mass m adds m (log(m / n) - mean over the tail of log q): an even tail is compared with
    each of its classes, where the bucket is compared with their sum.

    Args:
        student_logits: (N, C) or (N, C, ...), raw.
        teacher: TeacherRows, or raw logits of the same shape; rows without do not count.
        temperature: divides both logits, above 0.
        student_temperature: of the student, where it differs; the factor is then its square.
        sample_weight: (N,) or (N, ...), not negative.
        tail_tolerance: of `topk` rows, see `kdcache.train.distributions.pair`.
        reduction: as in `kd_loss`.

    Returns:
        A float32 scalar, or (N, ...) with reduction="none"; float64 for float64 students. Infinite where the student
        masks a class of the tail.

    Raises:
        UsageError: numbers or a teacher that cannot be meant.
        MismatchError: student and teacher differ in classes or shape.

    >>> spread_kl_loss(torch.zeros(1, 3), torch.zeros(1, 3), temperature=4.0)
    tensor(0.)
    """
    rows = spread_kl_rows(
        student_logits,
        teacher,
        temperature=temperature,
        student_temperature=student_temperature,
        tail_tolerance=tail_tolerance,
    )
    return reduce_rows(rows, sample_weight=sample_weight, reduction=reduction)


def spread_kl_rows(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    student_temperature: float | None = None,
    class_mask: Tensor | None = None,
    tail_tolerance: float | None = None,
) -> RowTerms:
    """The loss of each row (N, ...); arguments are those of `spread_kl_loss`, and a class mask of dense rows."""
    divisor = temperature if student_temperature is None else student_temperature
    if is_mean(teacher):
        require("spread_kl", teacher, temperature)
    if not is_topk(teacher):
        return divergence_rows(
            partial(kl_of, temperature=temperature, student_temperature=divisor),
            student_logits,
            teacher,
            temperature=temperature,
            student_temperature=student_temperature,
            class_mask=class_mask,
        )
    both = pair(
        student_logits,
        teacher,
        temperature=temperature,
        student_temperature=student_temperature,
        class_mask=class_mask,
        tail_tolerance=tail_tolerance,
    )
    student = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    bucketed = kl_of(both, temperature=temperature, student_temperature=divisor)
    # The bucket's own log q in the place of the even tail's: what is added is not negative, by Jensen's inequality.
    p_tail, log_q_tail = both.log_p[:, -1].exp(), both.log_q[:, -1]
    lost = torch.where(p_tail > 0, log_q_tail - _even_tail(student / divisor, teacher.tensors()), 0.0)
    return RowTerms(divisor**2 * (bucketed + p_tail * lost), both.has_teacher)


def _even_tail(scaled: Tensor, rows: TeacherRows) -> Tensor:
    """(N, ...) log n + mean over the n classes not kept of log q; 0 where all are kept."""
    slots = kept(rows, dtype=scaled.dtype)
    count = torch.as_tensor(slots.tail_count, dtype=scaled.dtype, device=scaled.device)
    some = count.clamp(min=1)
    mean = scaled.scatter(1, slots.classes, 0).sum(dim=1) / some - scaled.logsumexp(dim=1)
    return torch.where(count > 0, some.log() + mean, 0.0)
