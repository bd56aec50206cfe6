"""DIST: the student's probabilities have to correlate with the teacher's, not to equal them.

Two Pearson correlations: of the classes of each row, and of the rows of a batch for each class. The second is a
property of the batch: it cannot be added up over ranks or accumulation steps, so that the loss of a global batch
is here the mean over its pieces, weighed by their rows, and depends on how the batch is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.train.dense_logits import dense_logits
from kdcache.train.distributions import log_softmax
from kdcache.train.loss_numbers import check_part_weight, check_temperature
from kdcache.train.reductions import Reduction, RowTerms, reduce_rows
from kdcache.train.row_weights import weight_per_position
from kdcache.train.soft_targets import Teacher

# Smallest product of two norms that a correlation is divided by: 0 where a side does not vary, instead of NaN.
SMALLEST_NORM = 1e-8


def dist_loss(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """temperature**2 * (beta * (1 - correlation over classes) + gamma * (1 - correlation over the batch)).

    The first is the mean over rows, the second the mean over classes; both of softmax(logits / temperature). Weights
    enter the correlation over the batch as repetitions of a row would.

    Args:
        student_logits: (N, C) or (N, C, ...), raw; positions of dense prediction are rows.
        teacher: TeacherRows that hold all logits, or raw logits of the same shape; rows without do not count.
        temperature: divides both logits, above 0 (the paper: 1 on ImageNet, 4 on CIFAR-100).
        beta: weight of the correlation over classes, not negative.
        gamma: weight of the correlation over the batch, not negative.
        sample_weight: (N,) or (N, ...), not negative.
        class_mask: (C,) bool, True for classes that take part.
        reduction: as in `kd_loss`; in "none" every row carries the batch's part.

    Returns:
        A float32 scalar, or (N, ...) with reduction="none"; float64 for float64 students.

    Raises:
        UsageError: a number, a mask or a teacher that cannot be meant, or rows that do not hold all logits.
        MismatchError: student and teacher differ in classes or shape.

    Source: Huang et al., Knowledge Distillation from a Stronger Teacher, NeurIPS 2022 (arXiv:2205.10536).

    >>> logits = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 0.0]])
    >>> round(dist_loss(2 * logits, logits).item(), 3)
    0.336
    """
    rows = dist_rows(
        student_logits,
        teacher,
        temperature=temperature,
        beta=beta,
        gamma=gamma,
        sample_weight=sample_weight,
        class_mask=class_mask,
    )
    return reduce_rows(rows, sample_weight=sample_weight, reduction=reduction)


def dist_rows(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    beta: float,
    gamma: float,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
) -> RowTerms:
    """The loss of each row (N, ...), the batch's part in every one; arguments are those of `dist_loss`."""
    check_temperature("temperature", temperature)
    check_part_weight("beta of dist", beta)
    check_part_weight("gamma of dist", gamma)
    both = dense_logits(student_logits, teacher, loss="dist", class_mask=class_mask)
    p, q = (log_softmax(logits, temperature).exp() for logits in (both.teacher, both.student))
    kept = _kept(p, class_mask)
    of_rows = 1 - _correlation(p, q, kept, dim=1)
    rows = RowTerms(of_rows, both.has_teacher)
    weight = rows.counted().to(p.dtype)
    if sample_weight is not None:
        weight = weight * weight_per_position(sample_weight, weight)
    flat_p, flat_q = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (p, q))
    of_classes = 1 - _correlation(flat_p, flat_q, weight.reshape(-1, 1), dim=0)
    of_batch = (of_classes * kept.reshape(-1)).sum() / kept.sum()
    return RowTerms(temperature**2 * (beta * of_rows + gamma * of_batch), both.has_teacher)


def _kept(p: Tensor, class_mask: Tensor | None) -> Tensor:
    """(1, C, ...) 1 for classes that take part."""
    kept = p.new_ones(p.shape[1]) if class_mask is None else class_mask.to(p.device, p.dtype)
    return kept.reshape(1, -1, *[1] * (p.ndim - 2))


def _correlation(p: Tensor, q: Tensor, weight: Tensor, *, dim: int) -> Tensor:
    """Pearson's correlation along a dimension, with weights; 0 where a side does not vary."""
    total = weight.sum(dim=dim, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    root = weight.sqrt()
    first, second = ((t - (t * weight).sum(dim=dim, keepdim=True) / total) * root for t in (p, q))
    return torch.cosine_similarity(first, second, dim=dim, eps=SMALLEST_NORM)
