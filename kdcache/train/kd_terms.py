"""The terms of the distillation loss row by row: who gets which, with what weight, in the cheapest form that serves.

    w_i * scale * [(1 - a_i) * CE_i + a_i * (weighted sum of losses against the teacher)_i]

Cross-entropy and KL together have a fused form on a CPU, for rows with all logits and for `topk` rows; anything else is
added up from its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.class_part import class_index, labels_over, over_classes
from kdcache.train.cross_entropy import Labels, check_kept, check_labels, cross_entropy, with_partners
from kdcache.train.dense_logits import as_float, mask_classes
from kdcache.train.distributions import is_topk, log_softmax, refuse_mask
from kdcache.train.divergence_losses import soft_target_kl
from kdcache.train.fused import SMALLEST, applies, fused_terms
from kdcache.train.loss_records import LossCall
from kdcache.train.loss_settings import LossSettings, SingleKl
from kdcache.train.mean_targets import is_mean
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.row_weights import RowWeights, per_position, row_weights, weighted
from kdcache.train.soft_targets import Teacher, TeacherSignal, check_same_shape, teacher_signal
from kdcache.train.sparse_fused import sparse_terms
from kdcache.train.tail import DEFAULT_TAIL_TOLERANCE


def loss_terms(
    student_logits: Tensor,
    teacher: Teacher | None,
    labels: Labels | None,
    settings: LossSettings,
    *,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    teacher_classes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | float]:
    """The weighted terms w_i [...] of every row (N, ...), and the sum of the w_i that count.

    `kd_loss`, `loss_sums` and `DistillationLoss` are reductions of this; arguments and errors are theirs.
    """
    student = as_float(student_logits)
    _check_call(teacher, labels, settings.alpha)
    if labels is not None:
        labels = check_labels(student, with_partners(labels, teacher))
        if class_mask is not None:
            check_kept(labels, class_mask)
    known = labels.known if isinstance(labels, MixedLabels) else labels
    dense = None
    if teacher is not None and not is_topk(teacher) and not is_mean(teacher):
        dense = teacher_signal(teacher, dtype=student.dtype)
        check_same_shape(student, dense.logits)
        dense = replace(dense, logits=mask_classes(dense.logits, class_mask))
    elif teacher is not None:
        refuse_mask(class_mask)
    student = mask_classes(student, class_mask)
    weights = row_weights(
        (student.shape[0], *student.shape[2:]),
        alpha=settings.alpha,
        labels=known,
        has_teacher=_taught(teacher, known, settings),
        sample_weight=sample_weight,
        like=student,
    )
    call = _Call(student, teacher, dense, labels, settings, weights, sample_weight, class_mask)
    terms = _weighted_sum(call, call if teacher_classes is None else _over_classes(call, teacher_classes))
    return terms if settings.scale == 1 else terms * settings.scale, weights.total


def sum_terms(
    student_logits: Tensor,
    teacher: Teacher | None,
    labels: Labels | None,
    settings: LossSettings,
    *,
    sample_weight: Tensor | None = None,
    class_mask: Tensor | None = None,
    teacher_classes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`loss_sums` for settings that are checked already."""
    terms, total = loss_terms(
        student_logits,
        teacher,
        labels,
        settings,
        sample_weight=sample_weight,
        class_mask=class_mask,
        teacher_classes=teacher_classes,
    )
    return terms.sum(), torch.as_tensor(total, dtype=terms.dtype, device=terms.device)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of `loss_terms`, checked; `dense` are the teacher's logits where the rows hold all of them."""

    student: Tensor
    teacher: Teacher | None
    dense: TeacherSignal | None
    labels: Labels | None
    settings: LossSettings
    weights: RowWeights
    sample_weight: Tensor | None
    class_mask: Tensor | None


def _taught(teacher: Teacher | None, known: Tensor | None, settings: LossSettings) -> Tensor | bool:
    """Which rows get a term from the teacher: those with a row of its, and a label where all losses need one."""
    if teacher is None:
        return False
    has_teacher: Tensor | bool = teacher.tensors().has_teacher if isinstance(teacher, TeacherRows) else True
    if not all(part.loss.needs_labels for part in settings.losses):
        return has_teacher
    if known is None:
        return False
    labelled = known >= 0
    return labelled if isinstance(has_teacher, bool) else labelled & per_position(has_teacher, labelled)


def _over_classes(call: _Call, classes: Sequence[int]) -> _Call:
    """The call that the losses against the teacher see: both sides over some classes."""
    count, device = call.student.shape[1], call.student.device
    student, teacher = over_classes(call.student, call.teacher, classes)
    index = class_index(classes, count, device)
    dense = None if call.dense is None else replace(call.dense, logits=call.dense.logits.index_select(1, index))
    labels = None if call.labels is None else labels_over(call.labels, classes, count)
    mask = None if call.class_mask is None else call.class_mask.to(device)[index]
    return replace(call, student=student, teacher=teacher, dense=dense, labels=labels, class_mask=mask)


def _weighted_sum(call: _Call, soft_call: _Call) -> Tensor:
    """Both terms times their weights, (N, ...); a term that weighs nothing for any row is not computed."""
    weights, single = call.weights, call.settings.single_kl
    needs_ce = call.labels is not None and not _is_zero(weights.ce)
    needs_soft = call.teacher is not None and not _is_zero(weights.kl)
    if needs_ce and needs_soft and single is not None and soft_call is call and _is_fusible(call):
        return _fused_sum(call, single)
    terms = None
    if needs_ce:
        terms = weighted(_hard_values(call), weights.ce)
    if needs_soft:
        soft = weighted(_soft_values(soft_call), weights.kl)
        terms = soft if terms is None else terms + soft
    return call.student.sum(dim=1) * 0 if terms is None else terms


def _fused_sum(call: _Call, single: SingleKl) -> Tensor:
    """Both terms at once, (N,)."""
    assert isinstance(call.labels, Tensor)
    kl_weight = call.weights.kl * (single.weight * single.student_temperature**2)
    if call.dense is not None:
        return fused_terms(
            call.student,
            call.dense.logits,
            call.labels,
            temperature=single.temperature,
            student_temperature=single.student_temperature,
            ce_weight=call.weights.ce,
            kl_weight=kl_weight,
        )
    assert isinstance(call.teacher, TeacherRows)
    tolerance = call.settings.tail_tolerance
    return sparse_terms(
        call.student,
        call.teacher.tensors(),
        call.labels,
        temperature=single.temperature,
        student_temperature=single.student_temperature,
        ce_weight=call.weights.ce,
        kl_weight=kl_weight,
        tail_tolerance=DEFAULT_TAIL_TOLERANCE if tolerance is None else tolerance,
    )


def _is_fusible(call: _Call) -> bool:
    if call.settings.label_smoothing or not applies(call.student, call.labels):
        return False
    return is_topk(call.teacher) if call.dense is None else call.student.numel() >= SMALLEST


def _hard_values(call: _Call) -> Tensor:
    """CE of each row (N, ...)."""
    assert call.labels is not None
    smoothing = call.settings.label_smoothing
    if call.class_mask is None or not smoothing:
        return cross_entropy(call.student, call.labels, label_smoothing=smoothing)
    # The share that is spread goes to the classes that take part: a masked one would make it infinite.
    kept = call.class_mask.to(call.student.device)
    spread = -log_softmax(call.student, 1.0)[:, kept].mean(dim=1)
    known = call.labels.known if isinstance(call.labels, MixedLabels) else call.labels
    hard = cross_entropy(call.student, call.labels)
    return torch.where(known >= 0, (1 - smoothing) * hard + smoothing * spread, 0.0)


def _soft_values(call: _Call) -> Tensor:
    """The weighted sum of the losses against the teacher, each with its factor, of each row (N, ...)."""
    settings, single = call.settings, call.settings.single_kl
    assert call.teacher is not None
    if single is not None and call.dense is not None:
        divergence = soft_target_kl(
            call.student,
            call.dense.logits,
            temperature=single.temperature,
            student_temperature=single.student_temperature,
        )
        return divergence * (single.weight * single.student_temperature**2)
    given = LossCall(
        call.student,
        call.teacher,
        call.labels,
        settings.temperature,
        settings.student_temperature,
        call.sample_weight,
        call.class_mask,
        settings.tail_tolerance,
    )
    total = None
    for part in settings.losses:
        rows = part.loss.rows(given)
        values = torch.where(rows.counted(), rows.values, 0.0) * part.weight
        total = values if total is None else total + values
    assert total is not None  # `LossSettings` refuses an empty sum
    return total


def _check_call(teacher: Teacher | None, labels: Labels | None, alpha: float) -> None:
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


def _is_zero(weight: Tensor | float) -> bool:
    return not isinstance(weight, Tensor) and weight == 0
