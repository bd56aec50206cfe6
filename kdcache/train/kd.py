"""`kd_loss`: cross-entropy with the labels and distillation from the teacher, row by row.

    loss = sum_i w_i [(1 - a_i) * CE_i + a_i * temperature**2 * KL_i(teacher || student)] / sum_i w_i

`alpha` weighs the KD term: 0 is labels alone, 1 is the teacher alone (torchdistill and the Keras example weigh
the other term). a_i = alpha where row i has a label and a teacher, 1 with a teacher only, 0 with a label only;
a row with neither has no loss and no weight. KL is summed over classes, in nats. A sum over nothing is 0 with
a gradient graph, never NaN. Dense prediction (N, C, H, W) counts every position as a row of its own. Other losses
may stand in the place of the KL, or beside it (`LossSettings.losses`).

Arithmetic is in float32 and log space whatever the autocast (float64 stays float64). Where a batch of some size has
labels and a teacher on a CPU, both terms and their gradient are computed at once (`kdcache.train.fused`).

Source: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015 (arXiv:1503.02531).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdcache.train.cross_entropy import Labels
from kdcache.train.kd_terms import loss_terms, sum_terms
from kdcache.train.loss_settings import LossSettings
from kdcache.train.reductions import Reduction, check_reduction, safe_mean
from kdcache.train.soft_targets import Teacher, pseudo_labels


def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: Teacher | None,
    labels: Labels | None = None,
    *,
    alpha: float,
    temperature: float,
    sample_weight: torch.Tensor | None = None,
    student_temperature: float | None = None,
    label_smoothing: float = 0.0,
    class_mask: torch.Tensor | None = None,
    teacher_classes: Sequence[int] | None = None,
    tail_tolerance: float | None = None,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """(1 - alpha) * CE + alpha * temperature**2 * KL(teacher || student), over the rows that have a signal.

    Args:
        student_logits: (N, C) or (N, C, ...), raw.
        teacher_logits: TeacherRows, or raw logits of the same shape (detached here); None only with alpha=0.
        labels: (N, ...) integer classes, -1 = no label, or MixedLabels; None only with alpha=1. Rows of mixed views
            bring their second label and its share themselves.
        alpha: weight of the KD term, in [0, 1]; (1 - alpha) is the weight of the labels.
        temperature: divides both logits, above 0.
        sample_weight: (N,) or (N, ...) weights w_i, not negative; all 1 by default.
        student_temperature: divides the student's logits where it is to differ; the factor is then its square.
        label_smoothing: of the CE term, in [0, 1).
        class_mask: (C,) bool, True for classes that take part; the others are -inf on both sides.
        teacher_classes: (M,) ascending, the classes that the teacher knows (`ClassMap.known`): the KD term is over the
            softmax of these on both sides, the CE term over all; None for all.
        tail_tolerance: of `topk` rows at a temperature that was not stored: the mean error of the tail's mass that is
            taken; None for 0.01.
        reduction: "mean" divides by the weights of the rows that count, "sum" does not divide, "none" gives
            the terms w_i [...] per row.

    Returns:
        A float32 scalar, or (N, ...) with reduction="none"; float64 for float64 students.

    Raises:
        UsageError: alpha, temperature, labels, mask or teacher that cannot be meant; a one-class teacher.
        MismatchError: student and teacher differ in classes or shape.
        DataError: labels out of range, or of a masked class (looked up on the CPU; on a GPU torch's own assertion
            fires).

    >>> kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, -1]), alpha=0.5, temperature=2.0)
    tensor(0.2747)
    """
    check_reduction(reduction)
    settings = LossSettings(alpha, temperature, student_temperature, label_smoothing, tail_tolerance=tail_tolerance)
    terms, total = loss_terms(
        student_logits,
        teacher_logits,
        labels,
        settings,
        sample_weight=sample_weight,
        class_mask=class_mask,
        teacher_classes=teacher_classes,
    )
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else safe_mean(terms.sum(), total)


def loss_sums(
    student_logits: torch.Tensor,
    teacher_logits: Teacher | None,
    labels: Labels | None = None,
    *,
    alpha: float,
    temperature: float,
    sample_weight: torch.Tensor | None = None,
    student_temperature: float | None = None,
    label_smoothing: float = 0.0,
    class_mask: torch.Tensor | None = None,
    teacher_classes: Sequence[int] | None = None,
    tail_tolerance: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of `kd_loss`, for a mean over more than this batch (ranks, accumulation steps).

    Arguments and errors are those of `kd_loss`.

    Returns:
        The sum of w_i [(1 - a_i) CE_i + a_i * temperature**2 * KL_i], a scalar with a gradient, and the sum
        of the w_i that count, a scalar without. Sum both over the global batch, then `safe_mean`.
    """
    settings = LossSettings(alpha, temperature, student_temperature, label_smoothing, tail_tolerance=tail_tolerance)
    return sum_terms(
        student_logits,
        teacher_logits,
        labels,
        settings,
        sample_weight=sample_weight,
        class_mask=class_mask,
        teacher_classes=teacher_classes,
    )


def hard_target_loss(
    student_logits: torch.Tensor,
    teacher_logits: Teacher,
    *,
    sample_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Cross-entropy on the teacher's most likely class: the control that soft targets have to beat.

    The true labels play no part. For sums over a global batch pass `pseudo_labels(teacher)` to `loss_sums`
    with teacher None and alpha 0.

    Args:
        student_logits: (N, C) or (N, C, ...), raw.
        teacher_logits: TeacherRows, or raw logits of the same shape; rows without a teacher do not count.
        sample_weight: (N,) or (N, ...).
        label_smoothing: in [0, 1).
        reduction: as in `kd_loss`.

    Returns:
        A float32 scalar, or (N, ...) with reduction="none".

    >>> hard_target_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]))
    tensor(0.6931)
    """
    return kd_loss(
        student_logits,
        None,
        pseudo_labels(teacher_logits),
        alpha=0.0,
        temperature=1.0,
        sample_weight=sample_weight,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
