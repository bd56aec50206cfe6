"""Two distributions over the same events, teacher and student, as log-probabilities: what every divergence takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Pair:
    """Teacher and student over M events a row: the C classes, or K kept ones and the bucket of all others.

    Attributes:
        log_p: (N, M, ...) of the teacher, without a gradient; -inf where it gives no probability.
        log_q: (N, M, ...) of the student. -inf, as `log_p` is, in a slot that holds no event.
        has_teacher: (N,) bool; None where every row has a teacher.
        is_bucketed: whether an event stands for several classes, so that a divergence is a lower bound of the one
            over classes.
        bound: (N, ...) half the width of the interval that holds the teacher's tail logsumexp; None = exact.
    """

    log_p: Tensor
    log_q: Tensor
    has_teacher: Tensor | None
    is_bucketed: bool = False
    bound: Tensor | None = None


def against_others(log_probs: Tensor, event: Tensor) -> tuple[Tensor, Tensor]:
    """One event of each row against all others together, and the others among themselves.

    The others are summed as such: 1 minus the one would lose all digits of a sure teacher.

    Args:
        log_probs: (N, M, ...).
        event: (N, 1, ...) int64.

    Returns:
        log-probabilities of (the event, all others) (N, 2, ...), and of the others, normalised, (N, M, ...) with -inf
        for the event.
    """
    others = log_probs.scatter(1, event, -math.inf)
    none_left = (others == -math.inf).all(dim=1, keepdim=True)
    # The gradient of a logsumexp over nothing would be NaN.
    rest = others.masked_fill(none_left, 0.0).logsumexp(dim=1, keepdim=True)
    two = torch.cat([log_probs.gather(1, event), rest.masked_fill(none_left, -math.inf)], dim=1)
    return two, others - rest
