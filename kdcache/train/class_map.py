"""A teacher whose classes are not the student's: its rows, of any encoding, in the student's classes.

Classes may stand in another order, be merged (several of the teacher's for one of the student's), be dropped (the
student has no such class: the teacher's softmax is taken over the others), or be novel (the teacher never saw them).

    merged logit = logsumexp of the members' logits, which is the sum of their probabilities at temperature 1

The order matters: calibrate, map, then divide by the temperature. Softening first weighs a class by how many members
it has, and so moves argmaxes: most of them in the test of it, where groups of 1 to 20 classes are merged at T = 4.

A novel class has the logit -inf. With that alone the student learns to give it no mass wherever the teacher counts (a
bucket of teacher mass 0); with `teacher_classes=class_map.known` the losses take the student's softmax over the
classes that the teacher knows. Rows whose own label is novel lose their teacher in both: it was wrong about them.

`topk` rows stay `topk`. What they do not keep is one number, in which no class can be told from another, so that each
class that is merged or dropped must be among the K largest of every row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import MismatchError, UsageError
from kdcache.format.dense import Dense
from kdcache.format.soft_targets import SoftTargets
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.class_map_topk import lacking, mapped_topk
from kdcache.train.class_part import numbers
from kdcache.train.cross_entropy import Labels
from kdcache.train.mixed_labels import MixedLabels

DROPPED = -1
MEAN_REFUSED = (
    "these rows are a mean of soft targets, which cannot be brought to other classes: classes are mapped for each "
    "teacher, before the temperature; map the classes of the single caches"
)


@final
@dataclass(frozen=True)
class ClassMap:
    """Which class of the student each class of the teacher is.

    Attributes:
        targets: (C,) for each class of the teacher the student's, -1 for one that the student does not have.
        num_classes: of the student.

    Raises:
        UsageError: a target that is no class of the student, or fewer than two classes that both know.
    """

    targets: tuple[int, ...]
    num_classes: int

    def __post_init__(self) -> None:
        wrong = [target for target in self.targets if not DROPPED <= target < self.num_classes]
        if wrong:
            raise UsageError(
                f"a class map has the student's class {wrong[0]}, expected 0 to {self.num_classes - 1}, or {DROPPED} "
                "for a class of the teacher that the student does not have"
            )
        if len(self.known) < 2:
            raise UsageError(
                f"by this class map teacher and student share {len(self.known)} class(es): a softmax over one class is "
                "always 1, so that there would be nothing to learn; map two classes at least"
            )

    @staticmethod
    def of_names(teacher: Sequence[str], student: Sequence[str]) -> ClassMap:
        """The map of classes that have the same names on both sides.

        Args:
            teacher: ordered names.
            student: ordered names; those that the teacher lacks are novel.

        Raises:
            UsageError: a name twice.
            MismatchError: a class of the teacher that the student does not have.

        >>> ClassMap.of_names(["cat", "dog"], ["dog", "eel", "cat"]).targets
        (2, 0)
        """
        for whose, names in (("teacher", teacher), ("student", student)):
            twice = repeated(names)
            if twice is not None:
                raise UsageError(
                    f"two classes of the {whose} have the name {twice!r:.80}: a map by names needs one each"
                )
        place = {name: number for number, name in enumerate(student)}
        missing = [name for name in teacher if name not in place]
        if missing:
            shown = ", ".join(repr(name) for name in missing[:6])
            raise MismatchError(
                f"{len(missing)} of the teacher's {len(teacher)} classes are no classes of the student: {shown:.400}. "
                "Say in a map (JSON) which class each of them is, or null for one to leave out"
            )
        return ClassMap(tuple(place[name] for name in teacher), len(student))

    @cached_property
    def known(self) -> tuple[int, ...]:
        """The student's classes that the teacher knows, ascending."""
        return tuple(sorted({target for target in self.targets if target != DROPPED}))

    @cached_property
    def novel(self) -> tuple[int, ...]:
        """The student's classes that the teacher does not know, ascending."""
        return tuple(sorted({*range(self.num_classes)} - {*self.known}))

    @cached_property
    def dropped(self) -> tuple[int, ...]:
        """The teacher's classes that the student does not have."""
        return tuple(number for number, target in enumerate(self.targets) if target == DROPPED)

    @cached_property
    def merged(self) -> dict[int, tuple[int, ...]]:
        """By class of the student, the teacher's classes that become it, where these are several."""
        members: dict[int, list[int]] = {}
        for number, target in enumerate(self.targets):
            if target != DROPPED:
                members.setdefault(target, []).append(number)
        return {target: tuple(group) for target, group in sorted(members.items()) if len(group) > 1}

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self.targets == tuple(range(self.num_classes))

    @cached_property
    def single(self) -> tuple[int, ...]:
        """The teacher's classes that are merged or dropped, ascending: what takes their own logits."""
        return tuple(sorted({*self.dropped, *(member for group in self.merged.values() for member in group)}))

    def lacks(self, rows: TeacherRows) -> np.ndarray:
        """(N,) bool NumPy, which rows do not hold the logits that merging and dropping take: of `topk` rows only."""
        given = rows.tensors()
        if not isinstance(given.encoding, TopK) or given.encoding.has_all_logits or not self.single:
            return np.zeros(len(given), bool)
        return lacking(given, given.encoding, self.single).cpu().numpy()

    def labels(self, labels: Any) -> Any:
        """The teacher's class numbers as the student's.

        Args:
            labels: (N, ...) int64, NumPy or a tensor, -1 = none.

        Returns:
            Of the same shape and kind; -1 where there was none, or the class is dropped.
        """
        if isinstance(labels, np.ndarray):
            known = np.array([*self.targets, DROPPED], np.int64)
            # Beyond the last class lies no label of ours: a hostile file must not end the process.
            return known[np.where((labels < 0) | (labels >= len(self.targets)), len(self.targets), labels)]
        table = numbers((*self.targets, DROPPED), labels.device)
        return table[labels.masked_fill((labels < 0) | (labels >= len(self.targets)), len(self.targets))]

    def logits(self, logits: Tensor) -> Tensor:
        """Logits of the student's classes.

        Args:
            logits: (N, C, ...) floats of the teacher's classes, calibrated but not divided by a temperature.

        Returns:
            (N, C of the student, ...) of the same type; -inf for novel classes.

        Raises:
            MismatchError: another number of classes.
        """
        self._check_count(logits.shape[1])
        sizes, order = self._plan
        parts = [logits]
        for size, members in sizes:
            picked = logits.index_select(1, numbers(members, logits.device))
            shape = (len(logits), len(members) // size, size, *logits.shape[2:])
            parts.append(picked.reshape(shape).logsumexp(dim=2))
        if self.novel:
            parts.append(logits.new_full((len(logits), 1, *logits.shape[2:]), -math.inf))
        columns = logits if len(parts) == 1 else torch.cat(parts, dim=1)
        return columns.index_select(1, numbers(order, logits.device))

    def rows(self, rows: TeacherRows, labels: Labels | None = None) -> TeacherRows:
        """The rows that a teacher of the student's classes would have, as tensors.

        Args:
            rows: N rows of any encoding, calibrated if they are to be.
            labels: (N,) the student's, -1 = none, or those of mixed views: rows of a novel class lose their teacher.

        Returns:
            N rows: `dense` float32, or `topk` where not all logits are held; labels are the student's classes.

        Raises:
            MismatchError: another number of classes, or `topk` rows that do not keep what is merged or dropped.
            UsageError: labels of single positions (dense prediction), and novel classes; rows of `soft_targets`.
        """
        given = rows.tensors()
        self._check_count(given.num_classes)
        if isinstance(given.encoding, SoftTargets):
            raise UsageError(MEAN_REFUSED)
        if isinstance(given.encoding, TopK) and not given.encoding.has_all_logits:
            made = mapped_topk(given, given.encoding, self.targets, self.merged, num_classes=self.num_classes)
        else:
            made = self._dense_rows(given)
        made = self.with_labels(made)
        return made if labels is None or not self.novel else replace(made, has_teacher=self._taught(made, labels))

    def with_labels(self, rows: TeacherRows) -> TeacherRows:
        """Rows whose labels alone are the student's classes, NumPy or tensors: to compare with a data set's."""
        label, label_b = (None if labels is None else self.labels(labels) for labels in (rows.label, rows.label_b))
        return replace(rows, label=label, label_b=label_b)

    def _dense_rows(self, rows: TeacherRows) -> TeacherRows:
        logits, has_teacher = self.logits(rows.dense()), rows.has_teacher
        if self.dropped:  # a teacher that masks all that is left says nothing about the row
            says = torch.isfinite(logits.amax(dim=1)).reshape(len(logits), -1).all(dim=1)
            has_teacher = has_teacher & says
            logits = torch.where(says.reshape(-1, *[1] * (logits.ndim - 1)), logits, 0.0)
        encoding = Dense((self.num_classes, *rows.encoding.row_shape[1:]), "float32")
        return replace(rows, encoding=encoding, arrays={"logits": logits}, has_teacher=has_teacher)

    def _taught(self, rows: TeacherRows, labels: Labels) -> Tensor:
        """(N,) which rows have a teacher that knows their label, and that of the partner."""
        found: Tensor = rows.has_teacher
        is_novel = torch.zeros(self.num_classes + 1, dtype=torch.bool)
        is_novel[list(self.novel)] = True  # the last place is that of no label
        for part in (labels.first, labels.second) if isinstance(labels, MixedLabels) else (labels,):
            if part.ndim > 1:
                raise UsageError(
                    "a class map with novel classes takes the teacher away from whole rows, and these labels are of "
                    "single positions: give the teacher all classes of the student"
                )
            found = found & ~is_novel.to(part.device)[part.clamp(-1, self.num_classes - 1)]
        return found

    @cached_property
    def _plan(self) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], tuple[int, ...]]:
        """What `logits` does: for each size of a group its members, group by group, and a column for each class.

        The columns are the teacher's classes, then the merged ones, size by size, then one of -inf.
        """
        column = {target: number for number, target in enumerate(self.targets)}
        sizes, made = [], len(self.targets)
        for size in sorted({len(group) for group in self.merged.values()}):
            groups = {target: group for target, group in self.merged.items() if len(group) == size}
            sizes.append((size, tuple(member for group in groups.values() for member in group)))
            column.update({target: made + place for place, target in enumerate(groups)})
            made += len(groups)
        return tuple(sizes), tuple(column.get(number, made) for number in range(self.num_classes))

    def _check_count(self, found: int) -> None:
        if found != len(self.targets):
            raise MismatchError(
                f"the class map is of a teacher of {len(self.targets)} classes, these rows have {found}"
            )


def repeated(names: Sequence[str]) -> str | None:
    """The first name that stands twice, None where each is one of its own; a file may list very many.

    >>> repeated(["a", "b", "c", "b", "a"])
    'a'
    """
    return next((name for name, count in Counter(names).items() if count > 1), None)
