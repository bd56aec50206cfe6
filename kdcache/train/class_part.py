"""Student and teacher over some of the classes: those that the teacher knows, where the student has more.

The softmax over these alone is exact on both sides: the teacher has no mass elsewhere, and the student's probabilities
are those given that the class is one of them. So every loss and encoding serves, and novel classes get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.format.dense import Dense
from kdcache.format.soft_targets import SoftTargets
from kdcache.store.rows import TeacherRows
from kdcache.train.cross_entropy import Labels
from kdcache.train.distributions import is_topk
from kdcache.train.kept import topk_encoding
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.soft_targets import Teacher


def over_classes(
    student_logits: Tensor, teacher: Teacher | None, classes: Sequence[int]
) -> tuple[Tensor, Teacher | None]:
    """Both sides over M classes.

    Args:
        student_logits: (N, C, ...).
        teacher: rows or logits of the same C classes, without mass in the others; or None.
        classes: (M,) ascending.

    Returns:
        (N, M, ...), and the teacher's rows or logits of these.

    Raises:
        UsageError: classes that cannot be meant.
    """
    index = class_index(classes, student_logits.shape[1], student_logits.device)
    return student_logits.index_select(1, index), _teacher_over(teacher, index, tuple(classes))


def top_class_over(student_logits: Tensor, classes: Sequence[int] | None) -> Tensor:
    """The student's most likely class, as far as a teacher that knows only some of them can be agreed with.

    Args:
        student_logits: (N, C, ...).
        classes: (M,) ascending; None for all.

    Returns:
        (N, ...) int64, numbers among the C classes.

    >>> top_class_over(torch.tensor([[0.0, 1.0, 2.0]]), (0, 1))
    tensor([1])
    """
    if classes is None:
        return student_logits.argmax(dim=1)
    index = class_index(classes, student_logits.shape[1], student_logits.device)
    return index[student_logits.index_select(1, index).argmax(dim=1)]


def class_index(classes: Sequence[int], num_classes: int, device: torch.device) -> Tensor:
    """(M,) int64 on a device.

    Raises:
        UsageError: fewer than two classes, not ascending, or beyond the last.
    """
    if len(classes) < 2 or classes[0] < 0 or any(b <= a for a, b in pairwise(classes)) or classes[-1] >= num_classes:
        raise UsageError(
            f"teacher_classes are two or more of the student's {num_classes} classes in ascending order, found "
            f"{list(classes[:9])!r:.200}"
        )
    return numbers(tuple(classes), device)


def labels_over(labels: Labels, classes: Sequence[int], num_classes: int) -> Labels:
    """Labels of C classes as numbers among M of them, -1 for the others."""
    if isinstance(labels, MixedLabels):
        first, second = (_place(part, tuple(classes), num_classes) for part in (labels.first, labels.second))
        return MixedLabels(first, second, labels.ratio)
    return _place(labels, tuple(classes), num_classes)


@lru_cache(maxsize=64)
def numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """(n,) int64 on a device, where they stay."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def _teacher_over(teacher: Teacher | None, index: Tensor, classes: tuple[int, ...]) -> Teacher | None:
    if teacher is None:
        return None
    if not isinstance(teacher, TeacherRows):
        return teacher.index_select(1, index)
    rows = teacher.tensors()
    shape = (len(classes), *rows.encoding.row_shape[1:])
    label, label_b = (
        None if labels is None else _place(labels, classes, rows.num_classes) for labels in (rows.label, rows.label_b)
    )
    if isinstance(rows.encoding, SoftTargets):
        encoding = replace(rows.encoding, row_shape=shape, k=min(rows.encoding.k, len(classes)))
        if rows.encoding.has_all_classes:
            arrays = {"log_probs": rows.arrays["log_probs"].index_select(1, index)}
        else:
            kept = _place(rows.encoding.class_index(rows.arrays), classes, rows.num_classes).clamp(min=0)
            arrays = {**rows.arrays, "kept_classes": kept}
        return replace(rows, encoding=encoding, arrays=arrays, label=label, label_b=label_b)
    if not is_topk(rows):
        arrays = {"logits": rows.dense().index_select(1, index)}
        return replace(rows, encoding=Dense(shape, "float32"), arrays=arrays, label=label, label_b=label_b)
    topk = topk_encoding(rows)
    # Below 0 only in rows without a teacher, which are of class 0 alone.
    kept = _place(topk.class_index(rows.arrays), classes, rows.num_classes).clamp(min=0)
    arrays = {**rows.arrays, "topk_classes": kept}
    return replace(rows, encoding=replace(topk, row_shape=shape), arrays=arrays, label=label, label_b=label_b)


def _place(labels: Tensor, classes: tuple[int, ...], num_classes: int) -> Tensor:
    """Class numbers as places among `classes`; -1 where there is none."""
    return _places(classes, num_classes, labels.device)[labels.clamp(-1, num_classes - 1)]


@lru_cache(maxsize=64)
def _places(classes: tuple[int, ...], num_classes: int, device: torch.device) -> Tensor:
    """(C + 1,) int64; the last, which -1 finds, is that of no class."""
    place = {number: at for at, number in enumerate(classes)}
    return numbers(tuple(place.get(number, -1) for number in range(num_classes + 1)), device)
