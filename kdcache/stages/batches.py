"""A training batch taken apart: inputs, labels, teacher rows, whatever shape the data set's items have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import DataError
from kdcache.stages.calling import move_to_device
from kdcache.store.rows import TeacherRows
from kdcache.train.items import NOT_INPUTS, TEACHER_KEY, first_input, label_of
from kdcache.train.losses import Labels
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.teaching import Teaching
from kdcache.train.with_ids import SampleIds


@dataclass(frozen=True, eq=False)
class Batch:
    """A collated batch taken apart.

    Attributes:
        inputs: what the model is called with: a tensor, or a dict of keyword arguments.
        labels: (N, ...) int64, -1 = none, or those of mixed views; None where the items have none.
        teacher: the N cached rows; None without a cache.
        teacher_classes: the student's classes over which losses against the teacher are taken, None = all.
    """

    inputs: Any
    labels: Labels | None
    teacher: TeacherRows | None
    teacher_classes: tuple[int, ...] | None = None

    def taught(self, teaching: Teaching | None, *, step: int) -> Batch:
        """The batch with the teacher rows that losses, policies and metrics are given."""
        if teaching is None or self.teacher is None:
            return self
        rows = teaching.rows(self.teacher, self.labels, step=step)
        return replace(self, teacher=rows, teacher_classes=teaching.teacher_classes)

    def to(self, device: torch.device, *, num_classes: int) -> Batch:
        """The batch on a device; from pinned memory the copy does not wait.

        Raises:
            DataError: labels out of range. On the CPU the loss looks at them; on a GPU a wrong one would
                end in a device assertion that takes the process with it, so they are looked at before.
        """
        if device.type == "cpu":
            return self
        labels = self.labels
        for part in (labels.first, labels.second) if isinstance(labels, MixedLabels) else (labels,):
            if part is not None and part.numel():
                _check_range(part, num_classes)
        return replace(
            self,
            inputs=move_to_device(self.inputs, device),
            labels=None if labels is None else labels.to(device, non_blocking=True),
            teacher=None if self.teacher is None else self.teacher.to(device, non_blocking=True),
        )


def take_apart(batch: Any, *, has_teacher: bool) -> Batch:
    """A collated batch as inputs, labels and teacher rows.

    Args:
        batch: a tuple or list (inputs, labels, ..., teacher or ids), a dict, or bare inputs.
        has_teacher: whether the last element (or the key `teacher`) holds teacher rows.

    Raises:
        DataError: labels that are not integers.
    """
    if isinstance(batch, Mapping):
        teacher = batch.get(TEACHER_KEY) if has_teacher else None
        inputs: Any = {key: value for key, value in batch.items() if key not in NOT_INPUTS}
        return Batch(inputs, _checked_labels(label_of(batch)), teacher)
    if not isinstance(batch, (tuple, list)):
        return Batch(batch, None, None)
    *parts, teacher = batch if has_teacher else (*batch, None)
    if parts and isinstance(parts[-1], SampleIds):  # of views without a cache
        parts.pop()
    return Batch(first_input(parts), _checked_labels(label_of(parts)), teacher)


def _check_range(labels: Tensor, num_classes: int) -> None:
    low, high = (int(value) for value in labels.aminmax())
    if low < -1 or high >= num_classes:
        raise DataError(f"labels run from {low} to {high}, expected 0 to {num_classes - 1}, or -1 for no label")


def _checked_labels(labels: Any) -> Labels | None:
    if labels is None or isinstance(labels, MixedLabels):
        return labels
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"labels must be integers (-1 where a row has none), found {found}")
    return labels.long()
