"""Distillation losses as functions.

    loss = sum_i w_i [(1 - a_i) CE_i + a_i * temperature**2 * KL_i(teacher || student)] / sum_i w_i

`alpha` weighs the KD term: 0 is labels alone, 1 is the teacher alone (torchdistill and the Keras example weigh
the other term). a_i = alpha where row i has a label and a teacher, 1 with a teacher only, 0 with a label only;
a row with neither has no loss and no weight. KL is summed over classes, in nats. A sum over nothing is 0 with
a gradient graph, never NaN. Dense prediction (N, C, H, W) counts every position as a row of its own.

Arithmetic is in float32 and log space whatever the autocast (float64 stays float64). The KL is written with
few passes over (N, C): forward and backward take 0.6-0.9 of the CPU time of `torch.nn.functional.kl_div` at
256 x 1000 (one thread, three runs on a busy machine), and 1.05 of it at 256 x 10. A hand-written backward took
0.9-1.3 of ours at 1000 classes and 0.6-0.9 at 10 (50 us a step): not worth its own gradient code.

Source: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015 (arXiv:1503.02531).
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch.nn import functional

from kdcache.errors import DataError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.loss_settings import LossSettings
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.row_weights import RowWeights, row_weights
from kdcache.train.soft_targets import Teacher, check_same_shape, pseudo_labels, teacher_signal

NO_LABEL = -1

Reduction: TypeAlias = Literal["mean", "sum", "none"]
Labels: TypeAlias = torch.Tensor | MixedLabels


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
        reduction: "mean" divides by the weights of the rows that count, "sum" does not divide, "none" gives
            the terms w_i [...] per row.

    Returns:
        A float32 scalar, or (N, ...) with reduction="none"; float64 for float64 students.

    Raises:
        UsageError: alpha, temperature, labels or teacher that cannot be meant; a one-class teacher.
        MismatchError: student and teacher differ in classes or shape.
        DataError: labels out of range (looked up on the CPU; on a GPU torch's own assertion fires).

    >>> kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, -1]), alpha=0.5, temperature=2.0)
    tensor(0.2747)
    """
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction must be mean, sum or none, found {reduction!r}")
    settings = LossSettings(alpha, temperature, student_temperature, label_smoothing)
    terms, total = loss_terms(student_logits, teacher_logits, labels, settings, sample_weight=sample_weight)
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of `kd_loss`, for a mean over more than this batch (ranks, accumulation steps).

    Arguments and errors are those of `kd_loss`.

    Returns:
        The sum of w_i [(1 - a_i) CE_i + a_i * temperature**2 * KL_i], a scalar with a gradient, and the sum
        of the w_i that count, a scalar without. Sum both over the global batch, then `safe_mean`.
    """
    settings = LossSettings(alpha, temperature, student_temperature, label_smoothing)
    return sum_terms(student_logits, teacher_logits, labels, settings, sample_weight=sample_weight)


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


def soft_target_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float,
    student_temperature: float | None = None,
) -> torch.Tensor:
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
    log_p = _log_softmax(teacher_logits.detach(), temperature)
    p = log_p.exp()
    # 0 * -inf would be NaN for masked classes; 0 * lowest is 0.
    negative_entropy = (p * log_p.clamp_min_(torch.finfo(log_p.dtype).min)).sum(dim=1)
    log_q = _log_softmax(student_logits, temperature if student_temperature is None else student_temperature)
    if _may_be_masked(log_q):
        log_q = torch.where(p > 0, log_q, 0.0)
    return negative_entropy - (p * log_q).sum(dim=1)


def cross_entropy(student_logits: torch.Tensor, labels: Labels, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log softmax(student)[label] per row, 0 where the label is -1.

    Args:
        student_logits: (N, C, ...) floats.
        labels: (N, ...) int64; or MixedLabels, for ratio * CE(first) + (1 - ratio) * CE(second).
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7).

    Returns:
        (N, ...) nats.

    >>> cross_entropy(torch.zeros(2, 2), torch.tensor([1, -1]))
    tensor([0.6931, 0.0000])
    """
    if isinstance(labels, MixedLabels):
        known = labels.known >= 0
        first, second = (
            cross_entropy(student_logits, torch.where(known, part, NO_LABEL), label_smoothing=label_smoothing)
            for part in (labels.first, labels.second)
        )
        return labels.ratio * first + (1 - labels.ratio) * second
    return functional.cross_entropy(
        student_logits, labels, ignore_index=NO_LABEL, reduction="none", label_smoothing=label_smoothing
    )


def safe_mean(numerator: torch.Tensor, denominator: torch.Tensor | float) -> torch.Tensor:
    """numerator / denominator, and 0 with the numerator's graph where nothing was summed."""
    if isinstance(denominator, torch.Tensor):
        return numerator / torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return numerator / (denominator or 1.0)


def loss_terms(
    student_logits: torch.Tensor,
    teacher: Teacher | None,
    labels: Labels | None,
    settings: LossSettings,
    *,
    sample_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The weighted terms w_i [...] of every row (N, ...), and the sum of the w_i that count.

    `kd_loss`, `loss_sums` and `DistillationLoss` are reductions of this; arguments and errors are theirs.
    """
    _check_call(student_logits, teacher, labels, settings.alpha)
    student = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    teacher_logits, has_teacher = None, None
    if teacher is not None:
        signal = teacher_signal(teacher, dtype=student.dtype)
        check_same_shape(student, signal.logits)
        teacher_logits, has_teacher = signal.logits, signal.has_teacher
    if labels is not None:
        labels = _check_labels(student, with_partners(labels, teacher))
    weights = row_weights(
        (student.shape[0], *student.shape[2:]),
        alpha=settings.alpha,
        labels=labels.known if isinstance(labels, MixedLabels) else labels,
        has_teacher=teacher_logits is not None if has_teacher is None else has_teacher,
        sample_weight=sample_weight,
        like=student,
    )
    return _weighted_sum(student, teacher_logits, labels, settings, weights), weights.total


def sum_terms(
    student_logits: torch.Tensor,
    teacher: Teacher | None,
    labels: Labels | None,
    settings: LossSettings,
    *,
    sample_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss_sums` for settings that are checked already."""
    terms, total = loss_terms(student_logits, teacher, labels, settings, sample_weight=sample_weight)
    return terms.sum(), torch.as_tensor(total, dtype=terms.dtype, device=terms.device)


def _weighted_sum(
    student: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: Labels | None,
    settings: LossSettings,
    weights: RowWeights,
) -> torch.Tensor:
    """Both terms times their weights, (N, ...); a term that weighs nothing for any row is not computed."""
    terms = None
    if labels is not None and not _is_zero(weights.ce):
        terms = _weighted(cross_entropy(student, labels, label_smoothing=settings.label_smoothing), weights.ce)
    if teacher_logits is not None and not _is_zero(weights.kl):
        kl = soft_target_kl(
            student,
            teacher_logits,
            temperature=settings.temperature,
            student_temperature=settings.student_divisor,
        )
        soft = _weighted(kl, weights.kl * settings.factor)
        terms = soft if terms is None else terms + soft
    assert terms is not None  # the two weights are never both the number 0: they sum to 1
    return terms


def _weighted(term: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """term * weight, 0 where the weight is 0: a masked class can make the term infinite, and 0 * inf is NaN."""
    if isinstance(weight, torch.Tensor):
        term = torch.where(weight != 0, term, 0.0)
    return term * weight


def _check_call(student_logits: torch.Tensor, teacher: Teacher | None, labels: Labels | None, alpha: float) -> None:
    if student_logits.ndim < 2 or not student_logits.is_floating_point():
        raise UsageError(
            f"student logits must be floats of shape (N, C) or (N, C, ...), found {student_logits.dtype} "
            f"{tuple(student_logits.shape)}"
        )
    if student_logits.shape[1] == 1:
        raise UsageError("the student has one class, whose softmax is always 1; use kdcache.train.binary.binary_kd")
    if teacher is None and alpha > 0:
        raise UsageError(
            f"alpha is {alpha}, but the teacher is None: its term would be dropped without a word. "
            "Pass the teacher's rows (kdcache.join or kdcache.attach put them into the batch), or alpha=0"
        )
    if labels is None and alpha < 1:
        raise UsageError(
            f"alpha is {alpha}, but labels is None: the CE term would be dropped without a word. "
            "Pass labels, -1 where a row has none, or alpha=1"
        )


def with_partners(labels: Labels, teacher: Teacher | None) -> Labels:
    """The labels, mixed with the partners' where the teacher's rows are of mixed views."""
    if isinstance(labels, MixedLabels) or not isinstance(teacher, TeacherRows):
        return labels
    if teacher.label_b is None or teacher.mix_ratio is None:
        return labels
    return MixedLabels(labels, teacher.label_b, teacher.mix_ratio)


def _check_labels(student: torch.Tensor, labels: Labels) -> Labels:
    """The labels as int64."""
    if isinstance(labels, MixedLabels):
        if student.ndim != 2:
            raise UsageError("labels of mixed views go with one label a row, not with dense prediction")
        first, second = (_check_class_numbers(student, part) for part in (labels.first, labels.second))
        return MixedLabels(first, second, labels.ratio.to(student.dtype))
    return _check_class_numbers(student, labels)


def _check_class_numbers(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    expected = (student.shape[0], *student.shape[2:])
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UsageError(f"labels must be class numbers, found {labels.dtype} {tuple(labels.shape)}")
    if tuple(labels.shape) != expected:
        raise UsageError(f"labels have shape {tuple(labels.shape)}, expected {expected}, one class number per row")
    labels = labels.long()
    if labels.device.type == "cpu" and labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if low < NO_LABEL or high >= student.shape[1]:
            raise DataError(
                f"labels run from {low} to {high}, expected classes 0 to {student.shape[1] - 1}, or -1 for no "
                "label (map other conventions, such as -100 or 255, to -1)"
            )
    return labels


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=1)


def _may_be_masked(log_q: torch.Tensor) -> bool:
    """Whether the student may have classes at -inf: a look costs 16 us at 256 x 1000 on a CPU, the remedy 500."""
    if log_q.device.type != "cpu":
        return True
    return log_q.numel() > 0 and bool(log_q.detach().amin() == -math.inf)


def _is_zero(weight: torch.Tensor | float) -> bool:
    return not isinstance(weight, torch.Tensor) and weight == 0
