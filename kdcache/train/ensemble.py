"""Several teachers as one: the rows of a batch in each teacher's cache, combined by a rule.

The first cache's rows come with the batch; those of the others are gathered by sample and view. Each teacher's logits
are calibrated and brought to the first one's classes, then they are combined (`ensemble_mean`) with the weights of the
rule (`ensemble_weights`). A teacher that lacks a sample does not vote there; a row has a teacher if one has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np
import torch

from kdcache.format.dense import Dense
from kdcache.format.encoding import Encoding
from kdcache.format.soft_targets import SoftTargets
from kdcache.format.topk import TopK
from kdcache.store.cache import Cache
from kdcache.store.rows import TeacherRows
from kdcache.train.checks import check_labels
from kdcache.train.cross_entropy import Labels
from kdcache.train.ensemble_mean import mean_logits, mean_soft_targets
from kdcache.train.ensemble_rules import Rule
from kdcache.train.ensemble_weights import Skill, weights_of
from kdcache.train.kept import without_labels
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.reading import BatchReader
from kdcache.train.teaching import OneTeacher


@final
@dataclass(frozen=True, eq=False)
class Member:
    """One of several teachers.

    Attributes:
        cache: of its rows.
        teacher: what is done to them: calibration, and the order of the first one's classes.
        weight: above 0; only the ratios count.
    """

    cache: Cache
    teacher: OneTeacher = OneTeacher()
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The last name of its cache."""
        return self.cache.path.name

    @cached_property
    def reader(self) -> BatchReader:
        """Of its rows; samples that it lacks come without a teacher."""
        return BatchReader(self.cache, missing="ce", check="ids")


@final
@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several teachers, as `Teaching` for the rows of the first one's cache.

    Attributes:
        members: two or more, the first one's rows come with the batch.
        rule: how they become one.
        temperature: the run's at a step, at which soft targets are made.
        skill: of each teacher, where the rule takes it.
        routes: for `route:FILE.csv`, the number of the teacher of sample ids (N,): (N,) int64.
        seed: of the rule `random`.
    """

    members: tuple[Member, ...]
    rule: Rule
    temperature: Callable[[int], float]
    skill: Skill | None = None
    routes: Callable[[np.ndarray], np.ndarray] | None = None
    seed: int = 0

    @property
    def teacher_classes(self) -> tuple[int, ...] | None:
        """All: the members know the same classes."""
        return None

    @property
    def encoding(self) -> Encoding:
        """Of the rows at the first step."""
        return self._encoding(0)

    def rows(self, rows: TeacherRows, labels: Labels | None, *, step: int) -> TeacherRows:
        """The combined rows; see `Teaching`.

        Raises:
            MismatchError: a label of another cache differs from the data's.
            UsageError: rows that do not serve the rule at the run's temperature.
            CorruptCacheError: a damaged row.
        """
        given = self.gathered(rows, labels, step=step)
        first = given[0]
        weights = weights_of(
            self.rule,
            given,
            [member.weight for member in self.members],
            labels,
            skill=self.skill,
            routes=None if self.routes is None else self.routes(rows.sample_id),
            draw=(self.seed, step),
        )
        encoding = self._encoding(step)
        if isinstance(encoding, Dense):
            arrays = {"logits": mean_logits([one.dense() for one in given], weights)}
        else:
            assert isinstance(encoding, SoftTargets)
            arrays = mean_soft_targets(given, weights, encoding)
        has_teacher = torch.stack([one.has_teacher for one in given]).any(dim=0)
        return replace(first, encoding=encoding, arrays=arrays, has_teacher=has_teacher)

    def gathered(self, rows: TeacherRows, labels: Labels | None, *, step: int) -> list[TeacherRows]:
        """The N rows of each member, calibrated and in the first one's classes, on the device of the first."""
        device = rows.has_teacher.device
        held = self.members[0].cache.views
        views = [held[0]] * len(rows) if len(held) == 1 else rows.view.tolist()
        # The first cache's labels were compared with the data's when the batch was made, and the caches' with each
        # other before the run. What is left are samples that the first lacks; a GPU is not made to wait for that.
        known = labels.first if isinstance(labels, MixedLabels) else labels
        is_open = known is not None and known.device.type == "cpu" and not bool(rows.has_teacher.all())
        found = [self.members[0].teacher.rows(rows, labels, step=step)]
        for member in self.members[1:]:
            reader = member.reader
            own = views if len(member.cache.views) > 1 else [member.cache.views[0]] * len(rows)
            numbers = reader.rows(reader.find(rows.sample_id), own)
            stored = reader.read(numbers, rows.sample_id, labels=None, input_at=None)
            stored = stored.to(device, non_blocking=True)
            if isinstance(labels, torch.Tensor):
                stored = without_labels(stored, labels < 0)  # a label that the run does not see leaves no trace
            made = member.teacher.rows(stored, labels, step=step)
            if is_open:
                check_labels(known, made, member.name)
            found.append(made)
        return found

    def _encoding(self, step: int) -> Encoding:
        all_logits = all(member.cache.encoding.has_all_logits for member in self.members)
        first = self.members[0]
        shape = first.cache.encoding.row_shape
        if first.teacher.classes is not None:
            shape = (first.teacher.classes.num_classes, *shape[1:])
        if self.rule.name == "logits" or (self.rule.takes_one and all_logits):
            return Dense(shape, "float32")
        encodings = [member.cache.encoding for member in self.members]
        kept = [one.k + one.labels for one in encodings if isinstance(one, TopK) and not one.has_all_logits]
        k = min([*kept, shape[0] - 1]) if kept else shape[0]
        return SoftTargets(shape, self.temperature(step), k, "float32")
