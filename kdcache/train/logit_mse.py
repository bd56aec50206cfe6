"""Mean squared difference of logits: what the KL term tends to at high temperatures.

temperature**2 * KL goes to half the mean squared difference of centred logits as the temperature goes to infinity
(Hinton et al. 2015, section 2.1); without centring (Ba and Caruana 2014) the student must match the offset as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.train.dense_logits import dense_logits
from kdcache.train.reductions import Reduction, RowTerms, reduce_rows
from kdcache.train.soft_targets import Teacher


def logit_mse_loss(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    centred: bool = False,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """mean_c (student - teacher)**2 over the classes that the teacher does not mask; no temperature, no factor.

    Args:
        student_logits: (N, C) or (N, C, ...), raw.
        teacher: TeacherRows that hold all logits, or raw logits of the same shape; rows without do not count.
        centred: subtract each row's mean from both first; softmax does not see it.
        sample_weight: (N,) or (N, ...), not negative.
        class_mask: (C,) bool, True for classes that take part.
        reduction: as in `kd_loss`.

    Returns:
        A float32 scalar, or (N, ...) with reduction="none"; float64 for float64 students.

    Raises:
        UsageError: a mask or a teacher that cannot be meant, or rows that do not hold all logits.
        MismatchError: student and teacher differ in classes or shape.

    >>> logit_mse_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor(4.)
    >>> logit_mse_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), centred=True)
    tensor(0.)
    """
    rows = mse_rows(student_logits, teacher, centred=centred, class_mask=class_mask)
    return reduce_rows(rows, sample_weight=sample_weight, reduction=reduction)


def mse_rows(student_logits: Tensor, teacher: Teacher, *, centred: bool, class_mask: Tensor | None = None) -> RowTerms:
    """The loss of each row (N, ...); arguments are those of `logit_mse_loss`."""
    both = dense_logits(student_logits, teacher, loss="mse", class_mask=class_mask)
    # A class at -inf has no distance: those that the teacher masks are left out, as its probability 0 is in KL.
    counts = both.teacher > -torch.inf
    difference = torch.where(counts, both.student, 0.0) - torch.where(counts, both.teacher, 0.0)
    number = counts.sum(dim=1, keepdim=True).clamp_min(1)
    if centred:
        mean = difference.sum(dim=1, keepdim=True) / number
        difference = torch.where(counts, difference - mean, 0.0)
    return RowTerms(difference.square().sum(dim=1) / number.squeeze(1), both.has_teacher)
