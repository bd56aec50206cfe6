"""Rows of `soft_targets`, the mean of several teachers at one temperature, as a pair of distributions."""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.errors import MismatchError
from kdcache.format.soft_targets import SoftTargets
from kdcache.store.rows import TeacherRows
from kdcache.train.capability import require
from kdcache.train.log_pair import Pair
from kdcache.train.soft_targets import Teacher, check_same_shape


def is_mean(teacher: Teacher | None) -> TypeGuard[TeacherRows]:
    """Whether rows are probabilities at a temperature of their own."""
    return isinstance(teacher, TeacherRows) and isinstance(teacher.encoding, SoftTargets)


def mean_pair(student_logits: Tensor, rows: TeacherRows, *, temperature: float, student_temperature: float) -> Pair:
    """Log-probabilities of the mean and of softmax(v / student_temperature).

    Args:
        student_logits: (N, C, ...) raw, of any float type; computed in float32 (float64 stays).
        rows: N rows of tensors, on the student's device.
        temperature: that the rows were made at, no other.
        student_temperature: of the student.

    Returns:
        (N, C, ...), or (N, k + 1) of the k classes kept and the bucket of all others.

    Raises:
        UsageError: another temperature, or tensors on different devices.
        MismatchError: student and teacher differ in classes or shape.
    """
    encoding = rows.encoding
    assert isinstance(encoding, SoftTargets)
    require("kl", rows, temperature)
    student = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    log_p = rows.arrays["log_probs"].to(student.dtype)
    scaled = student if student_temperature == 1 else student / student_temperature
    if encoding.has_all_classes:
        check_same_shape(student, log_p)
        # Rounded logarithms do not sum to 1 exactly, and a divergence wants a distribution.
        return Pair(log_p.log_softmax(dim=1), functional.log_softmax(scaled, dim=1), rows.has_teacher)
    if tuple(student.shape) != (len(rows), encoding.num_classes):
        raise MismatchError(
            f"student logits have shape {tuple(student.shape)}, the teachers' rows {(len(rows), *encoding.row_shape)}: "
            "give the student the teachers' classes, in their order"
        )
    classes, is_empty = encoding.class_index(rows.arrays), torch.isneginf(log_p)
    whole = torch.cat([log_p, rows.arrays["log_rest"].to(student.dtype).unsqueeze(1)], dim=1).log_softmax(dim=1)
    log_q = functional.log_softmax(scaled, dim=1)
    own = log_q.gather(1, classes).masked_fill(is_empty, -math.inf)
    # One column more, for the classes of slots that hold none.
    is_kept = torch.zeros(len(rows), encoding.num_classes + 1, dtype=torch.bool, device=student.device)
    is_kept.scatter_(1, classes.masked_fill(is_empty, encoding.num_classes), True)
    is_kept = is_kept[:, :-1]
    none_left = is_kept.all(dim=1, keepdim=True)
    # The gradient of a logsumexp over nothing would be NaN.
    rest = log_q.masked_fill(is_kept & ~none_left, -math.inf).logsumexp(dim=1, keepdim=True)
    rest = rest.masked_fill(none_left, -math.inf)
    return Pair(whole, torch.cat([own, rest], dim=1), rows.has_teacher, is_bucketed=True)
