"""Which policies there are, and the numbers that go with them, checked. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from kdcache.errors import UsageError

DISAGREEMENT_POLICIES = ("keep", "drop", "downweight", "trust-teacher")
CONFIDENCE_POLICIES = ("drop", "downweight", "trust-label")


@final
@dataclass(frozen=True)
class RowPolicies:
    """What a run does with rows that the teacher contradicts or is not sure of; see `kdcache.train.row_policies`.

    Attributes:
        disagreement: what becomes of a row whose label the teacher contradicts.
        threshold: it does where p(label) is below, above 0 to 1; 1 wherever another class is the most likely.
        confidence_below: the teacher is not sure where its largest p is below, above 0 to 1; None for never.
        confidence_policy: what becomes of such a row.

    Raises:
        UsageError: a value that cannot be meant.
    """

    disagreement: str = "keep"
    threshold: float = 1.0
    confidence_below: float | None = None
    confidence_policy: str = "drop"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("disagreement", self.disagreement, DISAGREEMENT_POLICIES),
            ("confidence policy", self.confidence_policy, CONFIDENCE_POLICIES),
        ):
            if value not in known:
                raise UsageError(f"{name} {value!r:.80} is not known; choose one of {', '.join(known)}")
        if not 0 < self.threshold <= 1:
            raise UsageError(f"threshold is {self.threshold}, expected a probability above 0, at most 1")
        if self.confidence_below is not None and not 0 < self.confidence_below <= 1:
            raise UsageError(f"confidence below is {self.confidence_below}, expected a probability above 0, at most 1")

    @property
    def does_nothing(self) -> bool:
        """Whether every row stays as it is."""
        return self.disagreement == "keep" and self.confidence_below is None

    @property
    def notes(self) -> list[str]:
        """What is said at the start of a run, a line each."""
        limit = "" if self.threshold >= 0.5 else f" with p(label) < {self.threshold:g}"
        lines = []
        if self.disagreement != "keep":
            lines.append(f"rows whose label the teacher contradicts{limit}: {self.disagreement}")
        if self.confidence_below is not None:
            lines.append(
                f"rows that the teacher is less than {self.confidence_below:g} sure of: {self.confidence_policy}"
            )
        return lines

    def describe(self) -> dict[str, Any]:
        """For the run record."""
        return {
            "disagreement": self.disagreement,
            "threshold": self.threshold,
            "confidence_below": self.confidence_below,
            "confidence_policy": None if self.confidence_below is None else self.confidence_policy,
        }
