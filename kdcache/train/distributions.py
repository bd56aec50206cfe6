"""What teacher and student say about a batch, as two tensors of log-probabilities, whatever the encoding of the rows.

Rows with all logits give a pair over the C classes; `topk` rows one over the kept classes and the bucket of all others
(`kdcache.train.sparse`). A divergence of the buckets is a lower bound of the one over classes.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor
from torch.nn import functional

from kdcache.errors import UsageError
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.dense_logits import dense_logits
from kdcache.train.log_pair import Pair
from kdcache.train.loss_numbers import check_temperature
from kdcache.train.mean_targets import is_mean, mean_pair
from kdcache.train.soft_targets import Teacher
from kdcache.train.sparse import topk_pair
from kdcache.train.tail import DEFAULT_TAIL_TOLERANCE

__all__ = ["Pair", "is_topk", "log_softmax", "pair", "refuse_mask"]


def pair(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float,
    student_temperature: float | None = None,
    class_mask: Tensor | None = None,
    tail_tolerance: float | None = None,
) -> Pair:
    """Log-probabilities of softmax(z / temperature) and softmax(v / student_temperature).

    Args:
        student_logits: (N, C, ...) raw, of any float type; computed in float32 (float64 stays).
        teacher: TeacherRows, or raw logits (N, C, ...).
        temperature: of both, above 0.
        student_temperature: of the student, where it differs.
        class_mask: (C,) bool, True for classes that take part; not with `topk` rows.
        tail_tolerance: of `topk` rows: the mean error of the tail's mass that is taken at a temperature that was not
            stored; None for 0.01.

    Returns:
        Both (N, M, ...): M = C, or for `topk` rows the kept classes and the bucket of all others.

    Raises:
        UsageError: a temperature or a mask that cannot be meant, or one that the rows cannot serve.
        MismatchError: student and teacher differ in classes or shape.
    """
    check_temperature("temperature", temperature)
    check_temperature("student_temperature", student_temperature)
    if is_topk(teacher):
        refuse_mask(class_mask)
        return topk_pair(
            student_logits,
            teacher.tensors(),
            temperature=temperature,
            student_temperature=student_temperature,
            tail_tolerance=DEFAULT_TAIL_TOLERANCE if tail_tolerance is None else tail_tolerance,
        )
    if is_mean(teacher):
        refuse_mask(class_mask)
        divisor = temperature if student_temperature is None else student_temperature
        return mean_pair(student_logits, teacher.tensors(), temperature=temperature, student_temperature=divisor)
    both = dense_logits(student_logits, teacher, loss="kl", class_mask=class_mask)
    divisor = temperature if student_temperature is None else student_temperature
    return Pair(log_softmax(both.teacher, temperature), log_softmax(both.student, divisor), both.has_teacher)


def is_topk(teacher: Teacher | None) -> TypeGuard[TeacherRows]:
    """Whether rows hold their largest logits only."""
    if not isinstance(teacher, TeacherRows) or not isinstance(teacher.encoding, TopK):
        return False
    return not teacher.encoding.has_all_logits


def refuse_mask(class_mask: Tensor | None) -> None:
    """Refuses a mask for rows that know nothing of single classes outside of those they keep.

    Raises:
        UsageError: there is one.
    """
    if class_mask is not None:
        raise UsageError(
            "class_mask needs the logits of all classes, and topk rows have one number for all that they do not keep: "
            "use a dense cache, or leave the mask out"
        )


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) over dim 1."""
    return functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=1)
