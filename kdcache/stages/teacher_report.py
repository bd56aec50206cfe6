"""What comparing a teacher with a cache found, and what that points to: another teacher, other data, other labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from kdcache.errors import MismatchError

SAME_COMPUTE = 3e-3
OTHER_COMPUTE = 1.5e-2
ROW_FACTOR = 10


@dataclass(frozen=True)
class TeacherReport:
    """What `verify_teacher` found; `problem` is None where the teacher is the one that was stored.

    Attributes:
        rows: rows that were computed again.
        median: of their relative differences.
        worst: the largest of them.
        worst_sample: whose that is.
        median_tolerance: what the median may be.
        row_tolerance: what any row may be.
        same_compute: whether both ran in the same precision.
        labels_differ: rows that have two different labels; None where the cache has none.
        inputs_differ: rows whose input digest is another one; None where the cache has none, or took them elsewhere.
        same_weights: whether the state dict has the hash that the cache states; None where it states none.
        problem: one sentence: what differs, and what that points to.
    """

    rows: int
    median: float
    worst: float
    worst_sample: str
    median_tolerance: float
    row_tolerance: float
    same_compute: bool
    labels_differ: int | None
    inputs_differ: int | None
    same_weights: bool | None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether logits and labels agree."""
        return self.problem is None

    def raise_on_error(self) -> None:
        """Raises what was found.

        Raises:
            MismatchError: logits above the tolerance, or other labels.
        """
        if self.problem is not None:
            raise MismatchError(self.problem)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"ok": self.ok, **asdict(self)}


def judged(report: TeacherReport, name: str) -> TeacherReport:
    """The report with its verdict."""
    wrong = []
    if not (report.median <= report.median_tolerance and report.worst <= report.row_tolerance):
        wrong.append(
            f"the teacher's logits are not those of {name}: their relative difference is {report.median:.2g} in the "
            f"median of {report.rows} rows (at most {report.median_tolerance:g} is rounding) and {report.worst:.2g} at "
            f"sample {report.worst_sample} (at most {report.row_tolerance:g})"
        )
    if report.labels_differ:
        wrong.append(f"{report.labels_differ} of {report.rows} labels are not those of {name}")
    if not wrong:
        return report
    return replace(report, problem=f"{'; '.join(wrong)}: {_cause(report)}")


def _cause(report: TeacherReport) -> str:
    """What the differences point to."""
    if report.inputs_differ and report.labels_differ:
        return f"{report.inputs_differ} inputs differ too: this is other data under the same sample ids"
    if report.inputs_differ:
        labels = "the labels do not" if report.labels_differ == 0 else "labels cannot be compared"
        return (
            f"{report.inputs_differ} of {report.rows} inputs differ, {labels}: the data set prepares its items in "
            "another way, or it is other data"
        )
    if report.labels_differ:
        inputs = "are the same" if report.inputs_differ == 0 else "cannot be compared"
        return f"the inputs {inputs}: this data is labelled in another way"
    inputs = "inputs and labels are the same" if report.inputs_differ == 0 else "inputs cannot be compared"
    if report.same_weights:
        return f"{inputs}, the weights are too: another transform of the teacher, another output or precision"
    return f"{inputs}, the weights are {'not' if report.same_weights is False else 'unknown'}: this is another teacher"
