"""Cross-entropy and KL of one student batch in one pass over its logits, with their gradient in closed form.

    term_i     = ce_i * CE_i + kl_i * KL_i(teacher || student)
    d term_i/dv = ce_i * (softmax(v) - onehot) + kl_i / t * (softmax(v / t) - softmax(z / T))

The rows go through in blocks that stay in the processor's cache, and the forward pass leaves one (N, C) array behind:
the gradient. The straightforward form (`cross_entropy` + `kl_div` of `log_softmax` and `softmax`) leaves three and
needs five at its peak. On one thread of a CPU the fused form takes 0.33-0.5 of its time and 0.4 of its peak memory at
256 x 1000 and 64 x 20,000 (tests/bench/test_losses.py). A GPU would wait for the launch of every small step: there, and
where a term is more than these two, `kdcache.train.kd_terms` adds up the parts.

At high temperatures KL is a small difference of large sums: at T = 1000 in float32 a row is up to 18 % off. From
`SERIES_FROM` on it is summed as p * (exp(x) - 1 - x) with x = log(q / p), whose terms are all positive; their series
takes over where |x| is small.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdcache.train.divergences import exp_series
from kdcache.train.loss_numbers import LOG2_E, SERIES_FROM
from kdcache.train.row_weights import weighted

# Elements of a block, for each thread: three blocks of float32 fill most of a second-level cache (1-2 MiB).
BLOCK = 1 << 17
# Below so many logits its 30 small steps take longer than the parts do: 266 us both at 256 x 10, 246 against 134 at
# 32 x 2, and 608 against 772 at 64 x 1000.
SMALLEST = 1 << 15
LN_2 = math.log(2)
# Stands for -inf inside: 0 * LOWEST is 0, where 0 * -inf is NaN.
LOWEST = -1e30


def fused_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    student_temperature: float,
    ce_weight: Tensor | float,
    kl_weight: Tensor | float,
) -> Tensor:
    """ce_weight * CE + kl_weight * KL(teacher || student) per row; a term of weight 0 adds 0.

    Args:
        student_logits: (N, C) float32 or float64.
        teacher_logits: (N, C) of the same dtype; no gradient flows into them.
        labels: (N,) int64; -1 only where `ce_weight` is 0.
        temperature: of the teacher, above 0.
        student_temperature: of the student.
        ce_weight: a number, or (N,).
        kl_weight: a number, or (N,); the factor temperature**2 is in it.

    Returns:
        (N,) of the same dtype, differentiable twice (the second time in the straightforward form).
    """
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    terms, _ = _Fused.apply(  # type: ignore[no-untyped-call]
        student_logits,
        teacher_logits.detach(),
        labels,
        temperature,
        student_temperature,
        ce_weight,
        kl_weight,
        needs_gradient,
    )
    return terms  # type: ignore[no-any-return]


def applies(student_logits: Tensor, labels: Any) -> bool:
    """Whether the fused form takes such a batch: (N, C) logits on a CPU, with one label a row."""
    return student_logits.ndim == 2 and student_logits.device.type == "cpu" and isinstance(labels, Tensor)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        v: Tensor,
        z: Tensor,
        labels: Tensor,
        temperature: float,
        student_temperature: float,
        ce_weight: Tensor | float,
        kl_weight: Tensor | float,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        terms = v.new_empty(len(v))
        gradient = torch.empty_like(v) if needs_gradient else v.new_empty(0)
        step = max(1, BLOCK * torch.get_num_threads() // max(v.shape[1], 1))
        for start in range(0, len(v), step):
            rows = slice(start, start + step)
            ce, kl = (w[rows, None] if isinstance(w, Tensor) else w for w in (ce_weight, kl_weight))
            into = gradient[rows] if needs_gradient else None
            terms[rows] = _block(v[rows], z[rows], labels[rows], temperature, student_temperature, ce, kl, into)
        return terms, gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        v, z, labels, *ctx.numbers, ce_weight, kl_weight, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.weights = [None if isinstance(w, Tensor) else w for w in (ce_weight, kl_weight)]
        tensors = [w for w in (ce_weight, kl_weight) if isinstance(w, Tensor)]
        ctx.save_for_backward(output[1], v, z, labels, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_terms: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 7
        if grad_terms is None:
            return None, *nothing
        gradient, v, z, labels, *tensors = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return gradient * grad_terms[:, None], *nothing
        waiting = iter(tensors)
        weights = [next(waiting) if w is None else w for w in ctx.weights]
        return _gradient(v, z, labels, *ctx.numbers, *weights) * grad_terms[:, None], *nothing


def _block(
    v: Tensor,
    z: Tensor,
    labels: Tensor,
    temperature: float,
    student_temperature: float,
    ce_weight: Tensor | float,
    kl_weight: Tensor | float,
    gradient: Tensor | None,
) -> Tensor:
    """The terms (n,) of some rows; their gradient goes into `gradient` (n, C)."""
    top = v.amax(1, keepdim=True)
    b = torch.sub(v, top, out=gradient) if gradient is not None else v - top
    b.mul_(LOG2_E / student_temperature).clamp_min_(LOWEST)
    a = (z - z.amax(1, keepdim=True)).mul_(LOG2_E / temperature).clamp_min_(LOWEST)
    p = a.exp2()
    p_sum = p.sum(1, keepdim=True)
    # The student gives 0 to what the teacher does not: seldom, and looked for where a class of the student is masked.
    is_infinite = ((v == -math.inf) & (p > 0)).any(1, keepdim=True) if bool(v.amin() == -math.inf) else None
    difference = a.sub_(b)  # log2(p / q), but for the normalisers
    q = b.exp2_()
    q_sum = q.sum(1, keepdim=True)
    if min(temperature, student_temperature) >= SERIES_FROM and v.dtype == torch.float32:
        kl = _positive_kl(p, q, p_sum, q_sum, difference)
    else:
        kl = difference.mul_(p).sum(1, keepdim=True).mul_(LN_2).div_(p_sum).sub_(p_sum.div(q_sum).log_())
    if is_infinite is not None:
        kl.masked_fill_(is_infinite, math.inf)
    s = torch.sub(v, top, out=difference).mul_(LOG2_E).exp2_()
    s_sum = s.sum(1, keepdim=True)
    at_label = labels.clamp_min(0)[:, None]
    ce = s_sum.log() + top - v.gather(1, at_label)
    if gradient is not None:
        scale = kl_weight / student_temperature
        gradient.mul_(scale / q_sum).addcmul_(p, -scale / p_sum).addcmul_(s, ce_weight / s_sum)
        minus = -ce_weight if isinstance(ce_weight, Tensor) else torch.full_like(top, -ce_weight)
        gradient.scatter_add_(1, at_label, minus)
    return (weighted(ce, ce_weight) + weighted(kl, kl_weight)).squeeze(1)


def _positive_kl(p: Tensor, q: Tensor, p_sum: Tensor, q_sum: Tensor, difference: Tensor) -> Tensor:
    """KL (n, 1) as the sum of p * (exp(x) - 1 - x), x = log(q / p): no term is negative, none cancels another."""
    x = torch.log(p_sum / q_sum).sub(difference.mul_(LN_2))
    is_near = x.abs() < 1.0
    if is_near.all():
        return _series(x).mul_(p).sum(1, keepdim=True).div_(p_sum)
    share = p / p_sum
    exact = q / q_sum - share - share * x
    return torch.where(is_near, _series(x.clamp(-1.0, 1.0)).mul_(share), exact).sum(1, keepdim=True)


def _series(x: Tensor) -> Tensor:
    """exp(x) - 1 - x for |x| <= 1."""
    return exp_series(x).mul_(x).mul_(x)


def _gradient(
    v: Tensor,
    z: Tensor,
    labels: Tensor,
    temperature: float,
    student_temperature: float,
    ce_weight: Tensor | float,
    kl_weight: Tensor | float,
) -> Tensor:
    """The gradient (N, C) from operations that have one themselves, for second derivatives."""
    ce, kl = (w[:, None] if isinstance(w, Tensor) else w for w in (ce_weight, kl_weight))
    hard = torch.zeros_like(v).scatter_(1, labels.clamp_min(0)[:, None], 1.0)
    soft = torch.softmax(v / student_temperature, 1) - torch.softmax(z / temperature, 1)
    return ce * (torch.softmax(v, 1) - hard) + kl / student_temperature * soft
