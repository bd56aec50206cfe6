"""Cross-entropy with the labels of a row: one class, none, or the two of a mixed input."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn import functional

from kdcache.errors import DataError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.soft_targets import Teacher

NO_LABEL = -1

Labels: TypeAlias = torch.Tensor | MixedLabels


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


def with_partners(labels: Labels, teacher: Teacher | None) -> Labels:
    """The labels, mixed with the partners' where the teacher's rows are of mixed views."""
    if isinstance(labels, MixedLabels) or not isinstance(teacher, TeacherRows):
        return labels
    if teacher.label_b is None or teacher.mix_ratio is None:
        return labels
    return MixedLabels(labels, teacher.label_b, teacher.mix_ratio)


def check_labels(student: torch.Tensor, labels: Labels) -> Labels:
    """The labels as int64.

    Args:
        student: (N, C, ...) floats.
        labels: (N, ...) integers, -1 = none, or MixedLabels.

    Raises:
        UsageError: not class numbers, or another shape.
        DataError: out of range (looked up on the CPU; on a GPU torch's own assertion fires).
    """
    if isinstance(labels, MixedLabels):
        if student.ndim != 2:
            raise UsageError("labels of mixed views go with one label a row, not with dense prediction")
        first, second = (_check_class_numbers(student, part) for part in (labels.first, labels.second))
        return MixedLabels(first, second, labels.ratio.to(student.dtype))
    return _check_class_numbers(student, labels)


def check_kept(labels: Labels, class_mask: torch.Tensor) -> None:
    """Refuses labels of classes that a mask takes out, whose cross-entropy would be infinite (on the CPU only).

    Raises:
        DataError: naming one.
    """
    for part in (labels.first, labels.second) if isinstance(labels, MixedLabels) else (labels,):
        if part.device.type == "cpu" and class_mask.device.type == "cpu":
            excluded = part[(part >= 0) & ~class_mask[part.clamp_min(0)]]
            if len(excluded):
                raise DataError(
                    f"{len(excluded)} rows have a label that class_mask excludes, for example {int(excluded[0])}: "
                    "their cross-entropy would be infinite; set those labels to -1, or keep the class"
                )


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
