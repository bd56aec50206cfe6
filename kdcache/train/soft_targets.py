"""What a teacher says about a batch, from a cache or from a plain tensor, in the form that losses use.

Every loss takes a `TeacherRows` (what `join` and `attach` put into a batch) or a plain (N, C, ...) tensor of
raw logits (a live teacher). Both come through here, so that the two give the same bits: cached float32 rows
and the same rows held in memory train the same student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.row_weights import per_position

Teacher: TypeAlias = TeacherRows | torch.Tensor


@dataclass(frozen=True)
class TeacherSignal:
    """Teacher logits (N, C, ...) without a gradient, and which rows have them.

    `has_teacher` is (N,) bool, or None where every row has a teacher and no look at the data is needed to know.
    """

    logits: torch.Tensor
    has_teacher: torch.Tensor | None


def teacher_signal(teacher: Teacher, *, dtype: torch.dtype = torch.float32) -> TeacherSignal:
    """Raw teacher logits as floats, detached.

    Args:
        teacher: TeacherRows of tensors or NumPy arrays, or raw logits (N, C, ...).
        dtype: float32, or float64 where the student computes in float64.

    Raises:
        UsageError: not logits of shape (N, C, ...), or a single class.
    """
    if isinstance(teacher, TeacherRows):
        rows = teacher.tensors()
        signal = TeacherSignal(rows.dense().to(dtype), rows.has_teacher)
    elif isinstance(teacher, torch.Tensor):
        if not teacher.is_floating_point():
            raise UsageError(f"teacher logits must be floating point, found {teacher.dtype}")
        signal = TeacherSignal(teacher.detach().to(dtype), None)
    else:
        raise UsageError(
            f"a teacher is TeacherRows (from kdcache.join, kdcache.attach or cache.gather) or a tensor of raw logits "
            f"(N, C), found {type(teacher).__name__}"
        )
    if signal.logits.ndim < 2:
        raise UsageError(f"teacher logits must have shape (N, C) or (N, C, ...), found {tuple(signal.logits.shape)}")
    if signal.logits.shape[1] == 1:
        raise UsageError(
            "the teacher has one class: softmax over one class is always 1, so its KD term would be 0 without a word. "
            "Use kdcache.losses.binary_kd for one-logit teachers"
        )
    return signal


def check_same_shape(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> None:
    """Refuses a student and a teacher whose logits do not belong together.

    Raises:
        MismatchError: another number of classes, rows or positions.
        UsageError: tensors on different devices.
    """
    student, teacher = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if student != teacher:
        if student[1:2] != teacher[1:2]:
            raise MismatchError(
                f"the student has {student[1]} classes, the teacher {teacher[1]} (logits {student} and {teacher}): "
                "give the student the teacher's classes, in the teacher's order"
            )
        raise MismatchError(f"student logits have shape {student}, teacher logits {teacher}: expected the same shape")
    if student_logits.device != teacher_logits.device:
        raise UsageError(
            f"student logits are on {student_logits.device}, the teacher's on {teacher_logits.device}: "
            "move the batch first, teacher.to(device, non_blocking=True)"
        )


def soft_targets(teacher: Teacher, *, temperature: float = 1.0) -> torch.Tensor:
    """Class probabilities softmax(z / temperature) over dim 1.

    Args:
        teacher: TeacherRows, or raw logits (N, C, ...).
        temperature: above 0; higher is softer.

    Returns:
        (N, C, ...) float32; rows without a teacher are uniform.

    >>> soft_targets(torch.tensor([[0.0, 0.0]]))
    tensor([[0.5000, 0.5000]])
    """
    return torch.softmax(teacher_signal(teacher).logits / temperature, dim=1)


def pseudo_labels(teacher: Teacher) -> torch.Tensor:
    """The teacher's most likely class, as labels.

    Args:
        teacher: TeacherRows, or raw logits (N, C, ...).

    Returns:
        (N, ...) int64; -1 where a row has no teacher.

    >>> pseudo_labels(torch.tensor([[0.1, 2.0, -1.0]]))
    tensor([1])
    """
    if not isinstance(teacher, TeacherRows):
        return teacher_signal(teacher).logits.argmax(dim=1)
    rows = teacher.tensors()
    labels: torch.Tensor = rows.encoding.top_class(rows.arrays).long()  # also of rows that lack other logits
    return labels.masked_fill(~per_position(rows.has_teacher, labels), -1)
