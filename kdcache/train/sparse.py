"""`topk` rows as a pair of distributions: the kept classes, and one bucket for all others.

The teacher's bucket is the stored logsumexp of its tail. The student's is a logsumexp over its classes that are not
kept, summed as such: 1 minus the kept mass would lose all digits where the bucket is small. One exponential of the
(N, C) logits serves forward and backward, against six of the straightforward dense form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.kept import Kept, kept, topk_encoding
from kdcache.train.log_pair import Pair
from kdcache.train.loss_numbers import LOG2_E
from kdcache.train.tail import (
    DEFAULT_TAIL_TOLERANCE,
    Temperature,
    check_temperature,
    check_width,
    mass_error,
    tail_logsumexp,
    temperature_of,
)


def topk_pair(
    student_logits: Tensor,
    rows: TeacherRows,
    *,
    temperature: Temperature,
    student_temperature: float | None = None,
    tail_tolerance: float = DEFAULT_TAIL_TOLERANCE,
) -> Pair:
    """The teacher's and the student's log-probabilities of the classes that rows keep, and of all others together.

    At a stored temperature both are those of the dense row whose kept logits are the stored ones, summed up.

    Args:
        student_logits: (N, C, ...) raw, of any float type; computed in float32 (float64 stays).
        rows: N `topk` rows of tensors, on the student's device.
        temperature: of the teacher, above 0; "z2" for twice each row's `logit_std`; or (N, ...) of each row.
        student_temperature: of the student, where it differs; needed where `temperature` is no number (pass the
            student's standardised logits and 1).
        tail_tolerance: the mean error of the tail's mass that is taken at a temperature that was not stored.

    Returns:
        M = K + L + 1 outcomes; `bound` is the tail's where the temperature was not stored.

    Raises:
        UsageError: a temperature that cannot be meant or whose tail is too vague; another encoding or device.
        MismatchError: student and teacher differ in classes or shape.
    """
    check_student(student_logits, rows)
    student = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    slots = kept(rows, dtype=student.dtype)
    log_p, bound = teacher_log_probs(rows, slots, temperature, tail_tolerance=tail_tolerance)
    if student_temperature is None:
        if not isinstance(temperature, (int, float)):
            raise UsageError(
                "a temperature of each row's own needs student_temperature: pass the student's standardised logits "
                "with student_temperature=1"
            )
        student_temperature = temperature
    log_q = student_log_probs(student, slots, check_temperature(student_temperature))
    return Pair(log_p, log_q, rows.has_teacher, is_bucketed=True, bound=bound)


def teacher_log_probs(
    rows: TeacherRows, slots: Kept, temperature: Temperature, *, tail_tolerance: float = DEFAULT_TAIL_TOLERANCE
) -> tuple[Tensor, Tensor | None]:
    """The teacher's side of `topk_pair`: log_p (N, M, ...) in the slots' dtype, and the bound of the tail (N, ...).

    Raises:
        UsageError: a temperature that cannot be meant, or whose tail is too vague.
    """
    tail = tail_logsumexp(rows, temperature, slots=slots, dtype=slots.logits.dtype)
    divisor: Any = temperature
    if not isinstance(temperature, (int, float)):
        divisor = temperature_of(rows, temperature).to(slots.logits.dtype).unsqueeze(1)
    head = slots.logits / divisor
    if tail.half_width is not None:
        check_width(
            mass_error(tail, head.logsumexp(dim=1)),
            rows.has_teacher,
            encoding=topk_encoding(rows),
            temperature=temperature,
            tolerance=tail_tolerance,
        )
    return torch.cat([head, tail.middle.unsqueeze(1)], dim=1).log_softmax(dim=1), tail.half_width


def student_log_probs(student: Tensor, slots: Kept, temperature: float) -> Tensor:
    """The student's side of `topk_pair`: log_q (N, M, ...), differentiable twice.

    log_q = u - logsumexp(u), with u the kept logits / temperature and the logsumexp of all others / temperature.

    Args:
        student: (N, C, ...) float32 or float64.
        slots: of the rows.
        temperature: above 0.
    """
    found: Tensor
    found, _, _ = _LogProbs.apply(student, slots.classes, empty_slots(slots), temperature)  # type: ignore[no-untyped-call]
    return found


def plain_log_probs(student: Tensor, classes: Tensor, is_empty: Tensor | None, temperature: float) -> Tensor:
    """`student_log_probs` in the straightforward form, for the second derivative."""
    scaled = student / temperature
    rest = scaled.scatter(1, classes, -math.inf)
    # Where no class is left the gradient of logsumexp would be NaN.
    none_left = (rest == -math.inf).all(dim=1, keepdim=True)
    bucket = rest.masked_fill(none_left, 0).logsumexp(dim=1, keepdim=True).masked_fill(none_left, -math.inf)
    parts = torch.cat([scaled.gather(1, classes), bucket], dim=1)
    return (parts if is_empty is None else parts.masked_fill(is_empty, -math.inf)).log_softmax(dim=1)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        student: Tensor, classes: Tensor, is_empty: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log_q (N, M, ...), exp((v - top) / T) of the classes not kept (N, C, ...), and its sum (N, 1, ...)."""
        rest = student.scatter(1, classes, -math.inf)
        top = rest.amax(dim=1, keepdim=True)
        top.masked_fill_(top == -math.inf, 0)  # no class is left, or the student masks them all
        rest.sub_(top)
        total = rest.mul_(LOG2_E / temperature).exp2_().sum(dim=1, keepdim=True)
        parts = torch.cat([student.gather(1, classes) / temperature, total.log() + top / temperature], dim=1)
        if is_empty is not None:
            parts.masked_fill_(is_empty, -math.inf)
        return parts.log_softmax(dim=1), rest, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        student, classes, is_empty, temperature = inputs
        log_q, rest, total = output
        ctx.mark_non_differentiable(rest, total)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, classes, is_empty, log_q, rest, total)
        ctx.temperature = temperature

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None]:
        """d log_q_j / d u_k = [j = k] - q_k, and from u to the logits; the bucket's part is shared by softmax."""
        if grad is None:
            return None, None, None, None
        student, classes, is_empty, log_q, rest, total = ctx.saved_tensors
        if is_empty is not None:
            grad = grad.masked_fill(is_empty, 0)
        if torch.is_grad_enabled():  # of a second derivative
            log_q = plain_log_probs(student, classes, is_empty, ctx.temperature)
            (found,) = torch.autograd.grad(log_q, student, grad, create_graph=True)
            return found, None, None, None
        own = (grad - log_q.exp() * grad.sum(dim=1, keepdim=True)) / ctx.temperature
        bucket = torch.where(total > 0, own[:, -1:] / total, 0)
        found = rest * bucket
        # Added, since an empty slot repeats a class.
        return found.scatter_add_(1, classes, own[:, :-1]), None, None, None


def standardised(student_logits: Tensor) -> Tensor:
    """Logits divided by twice their own standard deviation (ddof 0): at temperature 1 the student's side of "z2".

    The mean is left in, since softmax does not see it. The gradient flows through the standard deviation as well.

    Args:
        student_logits: (N, C, ...) raw; -inf is a masked class and does not count.

    Returns:
        (N, C, ...) float32, or float64 for float64.

    Source: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, with a base temperature of 2.
    """
    student = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    is_masked = student == -math.inf
    count = (~is_masked).sum(dim=1, keepdim=True)
    finite = student.masked_fill(is_masked, 0)
    spread = (finite - finite.sum(dim=1, keepdim=True) / count).masked_fill(is_masked, 0)
    variance = spread.square().sum(dim=1, keepdim=True) / count
    # Equal logits stay as they are: the root of 0 has no slope.
    return (finite / (2 * torch.where(variance > 0, variance, 1).sqrt())).masked_fill(is_masked, -math.inf)


def empty_slots(slots: Kept) -> Tensor | None:
    """(N, M, ...) bool, the slots that hold nothing, the bucket included; None where none is."""
    if slots.is_empty is None:
        if isinstance(slots.tail_count, float) and slots.tail_count > 0:
            return None
        of_classes = torch.zeros_like(slots.classes, dtype=torch.bool)
        return torch.cat([of_classes, torch.ones_like(of_classes[:, :1])], dim=1)
    assert isinstance(slots.tail_count, Tensor)
    return torch.cat([slots.is_empty, (slots.tail_count == 0).unsqueeze(1)], dim=1)


def check_student(student_logits: Tensor, rows: TeacherRows) -> None:
    """Refuses a student and rows that do not belong together.

    Raises:
        MismatchError: another number of classes, rows or positions.
        UsageError: tensors on different devices, or another encoding.
    """
    encoding = topk_encoding(rows)
    found, expected = tuple(student_logits.shape), (len(rows), *encoding.row_shape)
    if found[1:2] != expected[1:2]:
        raise MismatchError(
            f"the student has {found[1] if len(found) > 1 else 'no'} classes, the teacher {expected[1]} (logits "
            f"{found} and rows of {expected}): give the student the teacher's classes, in the teacher's order"
        )
    if found != expected:
        raise MismatchError(f"student logits have shape {found}, the teacher's rows {expected}: expected the same")
    if student_logits.device != rows.arrays["topk_logits"].device:
        raise UsageError(
            f"student logits are on {student_logits.device}, the teacher's rows on "
            f"{rows.arrays['topk_logits'].device}: move the batch first, teacher.to(device, non_blocking=True)"
        )
