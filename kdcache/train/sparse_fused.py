"""Cross-entropy and KL on `topk` rows in one pass over the student's logits, with their gradient in closed form.

    term_i     = ce_i * CE_i + kl_i * KL_i(teacher || student), both sides over the kept classes and the bucket
    d term_i/dv = ce_i * (softmax(v) - onehot) + kl_i / t * (q - p), of the bucket shared among its classes by softmax

As in `kdcache.train.fused` the rows go through in blocks that stay in the processor's cache. The teacher's side has K
numbers a row, so that what is paid is two exponentials a class (one at T = 1 and 2), where the straightforward dense
form takes six. With K = 64, forward and backward take 0.23-0.28 of its time at 64 x 20,000 on a CPU. At 256 x 1000 it
is 0.5-0.6 on one thread and as long on two: there the many small steps over (N, K) cost as much as those over (N, C).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.store.rows import TeacherRows
from kdcache.train.divergence_losses import kl_of
from kdcache.train.fused import BLOCK
from kdcache.train.kept import kept
from kdcache.train.log_pair import Pair
from kdcache.train.loss_numbers import LOG2_E, SERIES_FROM
from kdcache.train.row_weights import weighted
from kdcache.train.sparse import check_student, empty_slots, plain_log_probs, teacher_log_probs
from kdcache.train.tail import DEFAULT_TAIL_TOLERANCE


def sparse_terms(
    student_logits: Tensor,
    rows: TeacherRows,
    labels: Tensor,
    *,
    temperature: float,
    student_temperature: float,
    ce_weight: Tensor | float,
    kl_weight: Tensor | float,
    tail_tolerance: float = DEFAULT_TAIL_TOLERANCE,
) -> Tensor:
    """ce_weight * CE + kl_weight * KL(teacher || student) per row; a term of weight 0 adds 0.

    Args:
        student_logits: (N, C) float32 or float64, on a CPU for speed.
        rows: N `topk` rows of tensors.
        labels: (N,) int64; -1 only where `ce_weight` is 0.
        temperature: of the teacher, above 0.
        student_temperature: of the student.
        ce_weight: a number, or (N,).
        kl_weight: a number, or (N,); the factor temperature**2 is in it.
        tail_tolerance: as in `topk_pair`.

    Returns:
        (N,) of the same dtype, differentiable twice (the second time in the straightforward form).

    Raises:
        UsageError: a temperature whose tail is too vague; another encoding or device.
        MismatchError: student and teacher differ in classes or shape.
    """
    check_student(student_logits, rows)
    slots = kept(rows, dtype=student_logits.dtype)
    log_p, _ = teacher_log_probs(rows, slots, temperature, tail_tolerance=tail_tolerance)
    terms: Tensor = _SparseTerms.apply(  # type: ignore[no-untyped-call]
        student_logits,
        log_p,
        slots.classes,
        empty_slots(slots),
        labels.clamp_min(0)[:, None],
        _column(ce_weight, student_logits),
        _column(kl_weight, student_logits),
        (temperature, student_temperature),
    )
    return terms


class _SparseTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        log_p: Tensor,
        classes: Tensor,
        is_empty: Tensor | None,
        at_label: Tensor,
        ce_weight: Tensor,
        kl_weight: Tensor,
        temperatures: tuple[float, float],
    ) -> Tensor:
        """Terms (N,); labels and weights are (N, 1)."""
        divisor = temperatures[1]
        rest = _rest(v, classes, divisor)
        own = v.gather(1, classes)
        if is_empty is not None:  # an empty bucket is -inf already
            own.masked_fill_(is_empty[:, :-1], -math.inf)
        scaled = torch.cat([own / divisor, rest.q_sum.log().add_(rest.top / divisor)], dim=1)
        soft, soft_log_sum = _softmax(scaled)
        p = log_p.exp()
        kl = _kl(p, log_p, scaled.sub_(soft_log_sum), temperatures)
        hard, hard_log_sum = _softmax(torch.cat([own, rest.s_sum.log().add_(rest.top)], dim=1))
        ce = hard_log_sum - v.gather(1, at_label)
        soft.sub_(p).mul_(kl_weight / divisor)
        hard.mul_(ce_weight)
        # What each class that is not kept gets of q and of s; a sum is 1 or more, or 0 where there is nothing to share.
        of_q = soft[:, -1:] / rest.q_sum.clamp_min(0.5)
        of_s = hard[:, -1:] / rest.s_sum.clamp_min(0.5)
        inputs = (v, log_p, classes, is_empty, at_label, ce_weight, kl_weight)
        ctx.save_for_backward(*inputs, rest.q, rest.s, of_q, of_s, hard.add_(soft)[:, :-1])
        ctx.temperatures = temperatures
        return (weighted(ce, ce_weight) + weighted(kl, kl_weight)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, q, s, of_q, of_s, of_kept = ctx.saved_tensors
        v, _, classes, _, at_label, ce_weight, _ = inputs
        grad = grad[:, None]
        if torch.is_grad_enabled():  # of a second derivative
            terms = _plain_terms(*inputs, temperatures=ctx.temperatures)
            (found,) = torch.autograd.grad(terms, v, grad[:, 0], create_graph=True)
            return found, *(None,) * 7
        found = torch.empty_like(v)
        of_q, of_s = of_q * grad, of_s * grad
        for at in _blocks(v):
            block = torch.mul(q[at], of_s[at] if s is None else of_q[at], out=found[at])
            if s is not None:
                block.addcmul_(s[at], of_s[at])
            elif ctx.temperatures[1] == 2:  # s = q * q
                block.add_(of_q[at]).mul_(q[at])
            else:  # s = q
                block.addcmul_(q[at], of_q[at])
        # Added, since an empty slot repeats a class; it adds 0.
        found.scatter_add_(1, classes, of_kept * grad)
        return found.scatter_add_(1, at_label, ce_weight * -grad), *(None,) * 7


@dataclass(frozen=True, eq=False)
class _Rest:
    """q = exp((v - top) / T) and s = exp(v - top) of the classes that are not kept (N, C), and their sums (N, 1).

    `s` is None where q says it: at T = 1 it is q, at T = 2 its square. (At T = 4 the power takes as long.)
    """

    top: Tensor
    q: Tensor
    q_sum: Tensor
    s: Tensor | None
    s_sum: Tensor


def _rest(v: Tensor, classes: Tensor, divisor: float) -> _Rest:
    q, s = torch.empty_like(v), None if divisor in (1, 2) else torch.empty_like(v)
    top, q_sum, s_sum = (v.new_empty(len(v), 1) for _ in range(3))
    for at in _blocks(v):
        rest = q[at].copy_(v[at]).scatter_(1, classes[at], -math.inf)
        largest = torch.amax(rest, 1, keepdim=True, out=top[at])
        largest.masked_fill_(largest == -math.inf, 0)  # none is left, or the student masks them all
        rest.sub_(largest)
        if s is not None:
            torch.sum(torch.mul(rest, LOG2_E, out=s[at]).exp2_(), 1, keepdim=True, out=s_sum[at])
        torch.sum(rest.mul_(LOG2_E / divisor).exp2_(), 1, keepdim=True, out=q_sum[at])
        if s is None:
            s_sum[at] = torch.linalg.vecdot(rest, rest)[:, None] if divisor == 2 else q_sum[at]
    return _Rest(top, q, q_sum, s, s_sum)


def _blocks(v: Tensor) -> Iterator[slice]:
    """Rows that stay in the cache while they are worked on."""
    step = max(1, BLOCK * torch.get_num_threads() // max(v.shape[1], 1))
    return (slice(start, start + step) for start in range(0, len(v), step))


def _plain_terms(
    v: Tensor,
    log_p: Tensor,
    classes: Tensor,
    is_empty: Tensor | None,
    at_label: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    temperatures: tuple[float, float],
) -> Tensor:
    """The terms from operations that have a gradient themselves."""
    both = Pair(log_p, plain_log_probs(v, classes, is_empty, temperatures[1]), None)
    kl = kl_of(both, temperature=temperatures[0], student_temperature=temperatures[1])[:, None]
    ce = -v.log_softmax(1).gather(1, at_label)
    return (weighted(ce, ce_weight) + weighted(kl, kl_weight)).squeeze(1)


def _softmax(parts: Tensor) -> tuple[Tensor, Tensor]:
    """softmax (n, M) and logsumexp (n, 1), in fewer steps than torch takes for the two."""
    top = parts.amax(1, keepdim=True)
    found = (parts - top).exp_()
    total = found.sum(1, keepdim=True)
    return found.div_(total), top + total.log_()


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor, temperatures: tuple[float, float]) -> Tensor:
    """(n, 1) sum of p * (log p - log q), 0 where p is."""
    if min(temperatures) >= SERIES_FROM:
        return kl_of(Pair(log_p, log_q, None), temperature=temperatures[0], student_temperature=temperatures[1])[
            :, None
        ]
    return (log_p - log_q).masked_fill_(p == 0, 0).mul_(p).sum(1, keepdim=True)


def _column(weight: Tensor | float, like: Tensor) -> Tensor:
    """(N, 1) in the dtype of the student."""
    if isinstance(weight, Tensor):
        return weight.to(like.dtype)[:, None]
    return like.new_full((len(like), 1), weight)
