"""Two distributions over the same events, teacher and student, as log-probabilities: what every divergence takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

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
