"""Student and teacher logits of a batch side by side, checked: what every loss over all classes starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.capability import require
from kdcache.train.soft_targets import Teacher, check_same_shape, teacher_signal


@final
@dataclass(frozen=True, eq=False)
class DenseLogits:
    """Raw logits (N, C, ...) of both in float32 (float64 for float64 students), -inf in masked classes.

    `has_teacher` is (N,) bool, or None where every row has a teacher. No gradient flows into the teacher's.
    """

    student: Tensor
    teacher: Tensor
    has_teacher: Tensor | None


def dense_logits(
    student_logits: Tensor, teacher: Teacher, *, loss: str, class_mask: Tensor | None = None
) -> DenseLogits:
    """Both sides of a batch.

    Args:
        student_logits: (N, C, ...) raw, of any float type.
        teacher: TeacherRows that hold all logits, or raw logits of the same shape.
        loss: what they are for, as `kdcache.train.capability` names it.
        class_mask: (C,) bool, True for classes that take part; the others become -inf on both sides.

    Raises:
        UsageError: one class, a mask that leaves fewer than two, or rows that do not hold all logits.
        MismatchError: student and teacher differ in classes or shape.
    """
    student = as_float(student_logits)
    if isinstance(teacher, TeacherRows) and not teacher.encoding.has_all_logits:
        require(loss, teacher)
    signal = teacher_signal(teacher, dtype=student.dtype)
    check_same_shape(student, signal.logits)
    return DenseLogits(mask_classes(student, class_mask), mask_classes(signal.logits, class_mask), signal.has_teacher)


def as_float(student_logits: Tensor) -> Tensor:
    """The logits in float32 whatever the autocast; float64 stays.

    Raises:
        UsageError: not a tensor of floats (N, C, ...) with two classes or more.
    """
    if not isinstance(student_logits, Tensor):
        raise UsageError(
            f"the student's logits are {type(student_logits).__name__}, expected a tensor (N, C) or (N, C, ...): they "
            "come first, the teacher second"
        )
    if student_logits.ndim < 2 or not student_logits.is_floating_point():
        raise UsageError(
            f"student logits must be floats of shape (N, C) or (N, C, ...), found {student_logits.dtype} "
            f"{tuple(student_logits.shape)}"
        )
    if student_logits.shape[1] == 1:
        raise UsageError("the student has one class, whose softmax is always 1; use kdcache.losses.binary_kd")
    return student_logits if student_logits.dtype == torch.float64 else student_logits.float()


def mask_classes(logits: Tensor, class_mask: Tensor | None) -> Tensor:
    """Logits (N, C, ...) with -inf in the classes that a mask (C,) leaves out.

    Raises:
        UsageError: no bools, or fewer than two classes left: softmax over one class is always 1.
        MismatchError: another length.
    """
    if class_mask is None:
        return logits
    if class_mask.dtype != torch.bool:
        raise UsageError(f"class_mask must be bool, True for classes that take part, found {class_mask.dtype}")
    if tuple(class_mask.shape) != (logits.shape[1],):
        raise MismatchError(
            f"class_mask has shape {tuple(class_mask.shape)}, expected ({logits.shape[1]},): one bool for each class "
            f"of logits {tuple(logits.shape)}"
        )
    if class_mask.device.type == "cpu" and int(class_mask.sum()) < 2:
        raise UsageError(
            f"class_mask leaves {int(class_mask.sum())} of {len(class_mask)} classes: a softmax needs two. "
            "True stands for a class that takes part"
        )
    kept = class_mask.to(logits.device).reshape(1, -1, *[1] * (logits.ndim - 2))
    return logits.masked_fill(~kept, -math.inf)
