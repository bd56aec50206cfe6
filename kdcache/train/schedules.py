"""The course of a number over a run, as a pure function of the step: `KIND[:END]`, as `--alpha-schedule` takes it.

    constant        linear:0.1 (from the option's value to 0.1)        cosine:1 (the same, along half a cosine)

A schedule has no state: a resumed run needs the number of the step alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from kdcache.errors import UsageError

KINDS = ("constant", "linear", "cosine")


@final
@dataclass(frozen=True)
class Course:
    """How a number goes from its first value to its last.

    Attributes:
        kind: constant, linear or cosine.
        end: the value of the last step; None with constant.
    """

    kind: str = "constant"
    end: float | None = None

    def at(self, step: int, total_steps: int, *, start: float) -> float:
        """The value in a step (from 0) of `total_steps`; the first has `start`, the last `end`, exactly.

        >>> [Course("linear", 1.0).at(step, 5, start=0.0) for step in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
        """
        if self.end is None or step <= 0:
            return start
        if step >= total_steps - 1:
            return self.end
        done = step / (total_steps - 1)
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return start + (self.end - start) * done

    def shown(self, start: float) -> str:
        """As printed: `0.9`, or `0.9 to 0.1 (linear)`."""
        return f"{start:g}" if self.end is None else f"{start:g} to {self.end:g} ({self.kind})"


def parse_course(text: str, *, what: str) -> Course:
    """The course that a text names.

    Raises:
        UsageError: an unknown kind, or an end that is no number.

    >>> parse_course("linear:0.1", what="--alpha-schedule")
    Course(kind='linear', end=0.1)
    """
    kind, colon, end = text.partition(":")
    if kind not in KINDS or (kind == "constant") == bool(colon):
        raise UsageError(f"{what} {text!r} is not known: expected constant, linear:END or cosine:END")
    if kind == "constant":
        return Course()
    try:
        value = float(end)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{what} {text!r}: {end!r} is no number; {kind}:END goes from the option's value to END")
    return Course(kind, value)
