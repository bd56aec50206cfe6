"""How the cached rows of a batch become what losses, policies and metrics see.

The order is fixed: each teacher's logits are calibrated first, then brought to the student's classes, then several
teachers become one; alpha and the run's temperature come after all of it, in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

from kdcache.store.rows import TeacherRows
from kdcache.train.calibrated import Calibration
from kdcache.train.class_map import ClassMap
from kdcache.train.cross_entropy import Labels


class Teaching(Protocol):
    """What is done to the rows of a batch."""

    @property
    def teacher_classes(self) -> tuple[int, ...] | None:
        """The student's classes over which the losses against the teacher are taken, ascending; None for all."""
        ...

    def rows(self, rows: TeacherRows, labels: Labels | None, *, step: int) -> TeacherRows:
        """The rows that the loss is given.

        Args:
            rows: N rows of the (first) cache, of tensors; `sample_id` and `view` say whose they are.
            labels: (N, ...) the student's labels, -1 = none, or those of mixed views, or None.
            step: optimiser step, from 0, for what changes from step to step.

        Returns:
            N rows of tensors on the same device.
        """
        ...


@final
@dataclass(frozen=True)
class OneTeacher:
    """The rows of one cache.

    Attributes:
        calibration: of its logits; None for logits as they are.
        classes: which class of the student each of its classes is; None for the student's own.
        restricted: whether the losses are over the classes that it knows; else the others have teacher mass 0.
    """

    calibration: Calibration | None = None
    classes: ClassMap | None = None
    restricted: bool = True

    @property
    def teacher_classes(self) -> tuple[int, ...] | None:
        """See `Teaching`."""
        return self.classes.known if self.restricted and self.classes is not None and self.classes.novel else None

    def rows(self, rows: TeacherRows, labels: Labels | None, *, step: int) -> TeacherRows:
        """See `Teaching`; rows whose label it does not know lose their teacher, the step changes nothing."""
        calibrated = rows if self.calibration is None else self.calibration.rows(rows)
        return calibrated if self.classes is None else self.classes.rows(calibrated, labels)
