"""Divergences of two distributions given as log-probabilities, row by row, in nats.

All arithmetic is in log space and safe where a probability is 0: an event that neither side knows adds nothing, not
NaN. The factor temperature**2, which keeps gradients comparable between temperatures (Hinton et al. 2015, section 2),
is in none of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.train.log_pair import Pair
from kdcache.train.loss_numbers import check_mixture


def kl(both: Pair, *, is_soft: bool = False) -> Tensor:
    """sum p (log p - log q): KL(teacher || student).

    Args:
        both: (N, M, ...) log-probabilities.
        is_soft: sum it in the form that keeps its digits at high temperatures; three times the work.

    Returns:
        (N, ...), not negative up to rounding; infinite where the student gives 0 to what the teacher does not.

    >>> kl(Pair(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log(), None))
    tensor([0.1438])
    """
    if is_soft and both.log_p.dtype == torch.float32:  # float64 has digits enough
        return _positive_kl(both)
    p = both.log_p.exp()
    # 0 * -inf would be NaN for masked classes; 0 * lowest is 0.
    negative_entropy = (p * both.log_p.clamp_min(torch.finfo(p.dtype).min)).sum(dim=1)
    return negative_entropy + _cross(p, both.log_q)


def soft_cross_entropy(both: Pair) -> Tensor:
    """-sum p log q: KL plus the teacher's entropy, so that its gradient is that of KL.

    >>> soft_cross_entropy(Pair(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5]]).log(), None))
    tensor([0.6931])
    """
    return _cross(both.log_p.exp(), both.log_q)


def reverse_kl(both: Pair) -> Tensor:
    """sum q (log q - log p): KL(student || teacher), which rather misses what the teacher knows than adds to it.

    Infinite, and without a gradient to that class, where the teacher masks a class that the student does not: give
    both the same `class_mask`.

    >>> reverse_kl(Pair(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log(), None))
    tensor([0.1438])
    """
    q = both.log_q.exp()
    is_open = (q > 0) & (both.log_p > -math.inf)
    log_q, log_p = (torch.where(is_open, log, 0.0) for log in (both.log_q, both.log_p))
    impossible = ((q > 0) & (both.log_p == -math.inf)).any(dim=1)
    # Filled in behind the sum, since an infinite term would have the gradient 0 * inf where the row weighs nothing.
    return (torch.where(is_open, q, 0.0) * (log_q - log_p)).sum(dim=1).masked_fill(impossible, math.inf)


def jensen_shannon(both: Pair, *, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: finite whatever is masked.

    Divided by beta it tends to KL(teacher || student) as beta goes to 0, and divided by 1 - beta to the reverse KL as
    beta goes to 1.

    Args:
        both: (N, M, ...) log-probabilities.
        beta: share of the teacher in the mixture, above 0 and below 1.

    Returns:
        (N, ...), at most the entropy of (beta, 1 - beta).

    Source: Agarwal et al., On-Policy Distillation of Language Models, 2024 (arXiv:2306.13649), equation 1.

    >>> jensen_shannon(Pair(torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]]), None))
    tensor([0.6931])
    """
    check_mixture("beta of js", beta)
    p, q = both.log_p.exp(), both.log_q.exp()
    of_teacher, of_student = p > 0, q > 0
    # -inf on either side is taken out before logaddexp, whose gradient is NaN where both are.
    lowest = torch.finfo(p.dtype).min / 4
    log_p = torch.where(of_teacher, both.log_p, lowest)
    log_q = torch.where(of_student, both.log_q, lowest)
    mixture = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher = torch.where(of_teacher, p * (log_p - mixture), 0.0).sum(dim=1)
    student = torch.where(of_student, q * (log_q - mixture), 0.0).sum(dim=1)
    return beta * teacher + (1 - beta) * student


def exp_series(x: Tensor) -> Tensor:
    """(exp(x) - 1 - x) / x**2 for |x| <= 1, to 5e-7 of its value: 1/2! + x/3! + ... + x**7/9!."""
    total = torch.full_like(x, 1 / math.factorial(9))
    for n in range(8, 1, -1):
        total = total * x + 1 / math.factorial(n)
    return total


def _cross(p: Tensor, log_q: Tensor) -> Tensor:
    """-sum p log q, 0 * -inf counted as 0."""
    if _may_be_masked(log_q):
        log_q = torch.where(p > 0, log_q, 0.0)
    return -(p * log_q).sum(dim=1)


def _may_be_masked(log_q: Tensor) -> bool:
    """Whether the student may have classes at -inf: a look costs 16 us at 256 x 1000 on a CPU, the remedy 500."""
    if log_q.device.type != "cpu":
        return True
    return log_q.numel() > 0 and bool(log_q.detach().amin() == -math.inf)


def _positive_kl(both: Pair) -> Tensor:
    p = both.log_p.exp()
    known = p > 0
    x = torch.where(known, both.log_q - torch.where(known, both.log_p, 0.0), 0.0)
    is_near = x.abs() <= 1
    near = torch.where(is_near, x, 0.0)
    series = exp_series(near)
    q = both.log_q.exp()
    # An event of p = 0 adds the q of exp(x) * p; -inf * 0 does not arise, since x is 0 there.
    far = q - p - p * torch.where(is_near, 0.0, x)
    return torch.where(is_near & known, p * near * near * series, far).sum(dim=1)
