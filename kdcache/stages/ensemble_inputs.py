"""Several `--cache`: the teachers of a run opened, checked against each other, and made one.

Everything that can be refused is refused here, before the first step: samples or views that a cache lacks, other
classes, labels that differ, rows that the rule cannot be had of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from kdcache.errors import CoverageError, MismatchError, UsageError
from kdcache.stages.asked_caches import AskedCache
from kdcache.stages.calibration_file import StoredCalibration
from kdcache.stages.class_map_file import StoredClassMap
from kdcache.stages.distill_inputs import Source
from kdcache.stages.distill_options import DistillOptions, several
from kdcache.stages.ensemble_checks import check_coverage, check_members, check_same_labels, check_views
from kdcache.stages.ensemble_members import (
    chosen_rule,
    class_map_of,
    matched_calibrations,
    members_of,
    opened,
)
from kdcache.stages.ensemble_routes import load_routes
from kdcache.stages.ensemble_skill import measured_skill
from kdcache.stages.loss_options import courses
from kdcache.stages.objective import Objective
from kdcache.store.cache import Cache
from kdcache.train.calibrated import check_serves
from kdcache.train.ensemble import Ensemble, Member
from kdcache.train.ensemble_rules import Rule
from kdcache.train.ensemble_weights import Skill
from kdcache.train.teaching import Teaching


@final
@dataclass(frozen=True, eq=False)
class Teachers:
    """Several teachers as a run has them.

    Attributes:
        ensemble: what makes them one.
        calibrations: of each, None for logits as they are.
        notes: what is said at the start of a run, a line each.
        routes_sha256: of the file of routes, if there is one.
    """

    ensemble: Ensemble
    calibrations: tuple[StoredCalibration | None, ...]
    notes: tuple[str, ...]
    routes_sha256: str | None = None

    @property
    def roots(self) -> list[str]:
        """Of all caches, in order."""
        return [member.cache.root for member in self.ensemble.members]

    def identity(self) -> dict[str, Any]:
        """What two processes must agree on: rule, roots, weights, calibrations and classes, as JSON gives it back."""
        ensemble = self.ensemble
        return {
            "rule": ensemble.rule.name,
            "routes": self.routes_sha256,
            "roots": self.roots,
            "weights": [float(member.weight) for member in ensemble.members],
            "calibrations": [None if one is None else one.describe()["seal"] for one in self.calibrations],
            "classes": [
                None if member.teacher.classes is None else list(member.teacher.classes.targets)
                for member in ensemble.members
            ],
        }

    def describe(self) -> dict[str, Any]:
        """For the run record and the provenance of a cache: rule, weights, and each cache with its root."""
        ensemble = self.ensemble
        skill, file = ensemble.skill, ensemble.rule.file
        return {
            "rule": ensemble.rule.name,
            **({} if file is None else {"file": Path(file).name, "file_sha256": self.routes_sha256}),
            "members": [
                {
                    "name": member.name,
                    "root": member.cache.root,
                    "weight": member.weight,
                    "rows": len(member.cache),
                    "encoding": member.cache.encoding.to_json(),
                    "calibration": None if calibration is None else calibration.describe(),
                    **({} if skill is None else skill_of(skill, number)),
                    "provenance": member.cache.provenance,
                }
                for number, (member, calibration) in enumerate(zip(ensemble.members, self.calibrations, strict=True))
            ],
        }


def skill_of(skill: Skill, number: int) -> dict[str, Any]:
    """What was measured of one teacher."""
    found: dict[str, Any] = {"labelled_rows": skill.rows[number], "accuracy": skill.accuracy[number]}
    if skill.nll is not None:
        found["nll"] = skill.nll[number]
    return {"measured": found}


def with_teachers(
    source: Source,
    held_out: Source | None,
    asked: Sequence[AskedCache],
    asked_val: Sequence[AskedCache],
    options: DistillOptions,
) -> tuple[Source, Source | None]:
    """Both sources with their teachers, where the training data has several.

    A single validation cache is taken as it is; as many as there are teachers are theirs, in the same order.

    Args:
        source: with the first cache.
        held_out: likewise.
        asked: all caches for the training data.
        asked_val: all for the validation data.
        options: rule, calibrations, classes, missing, losses.

    Raises:
        UsageError: a rule or option that these caches cannot serve, or another number of validation caches.
        CoverageError: samples that a cache lacks, or caches that share none.
        MismatchError: other views, classes, labels, or ids.
    """
    if len(asked) < 2:
        if options.ensemble is not None:
            raise UsageError(f"--ensemble {options.ensemble} is for several teachers: give --cache more than once")
        if len(asked_val) > 1:
            raise UsageError(f"--val-cache is given {len(asked_val)} times for a single --cache: give one")
        return source, held_out
    if len(asked_val) not in (0, 1, len(asked)):
        raise UsageError(
            f"--val-cache is given {len(asked_val)} times and --cache {len(asked)} times: give one for each teacher, "
            "in the same order, or a single one"
        )
    assert source.cache is not None
    assert source.sample_ids is not None
    caches = [source.cache, *(opened(one) for one in asked[1:])]
    rule = chosen_rule(options.ensemble, caches)
    stored = matched_calibrations(several(options.calibration), caches)
    maps = [class_map_of(cache, caches, source, options) for cache in caches]
    members = members_of(caches, [one.weight for one in asked], stored, maps)
    views = caches[0].views if source.items is None or source.items.views is None else source.items.views
    check_views(caches, views)
    positions = check_coverage(caches, source.sample_ids, missing=options.missing)
    if len(views) > 1 and len(positions) > np.count_nonzero(caches[0].find(source.sample_ids, views[0]) >= 0):
        raise CoverageError(
            f"{caches[0].path.name} lacks samples that other caches hold, and with several views the first --cache "
            "says which view each sample is in: give the cache that holds them all first, or dump them for it as well"
        )
    check_same_labels(members, source.sample_ids)
    own_val = len(asked_val) == len(asked)
    check_members(rule, members, options.temperature)
    _check_course(rule, members, options, own_val=own_val)
    if rule.needs_labelled_cache and options.label_fraction is not None and options.label_fraction < 1:
        raise UsageError(
            f"--ensemble {rule} measures each teacher on all labels of its cache, those that --label-fraction hides "
            "too: say the weights yourself (--cache PATH=WEIGHT), or take another rule"
        )
    skill, notes = measured_skill(rule, members)
    routes, digest = load_routes(rule, caches, source.sample_ids[positions])
    ensemble = Ensemble(members, rule, lambda step: options.temperature, skill, routes, options.seed)
    teachers = Teachers(ensemble, tuple(stored), (note_of(ensemble), *notes), digest)
    shown = maps[0] if options.classes is not None else None
    if options.missing == "skip":
        source = replace(source, positions=positions)
    source = replace(source, teachers=teachers, classes=shown)
    if held_out is not None and own_val:
        held_out = _held_out(held_out, asked_val, teachers, maps, options)
    elif held_out is not None and held_out.cache is not None:
        _check_single(held_out.cache, caches[0], options)
    return source, held_out


def _check_single(cache: Cache, first: Cache, options: DistillOptions) -> None:
    """Refuses a single validation cache whose classes are not those that the student learns, in their order."""
    name = cache.path.name
    if options.classes is not None:
        raise UsageError(f"--classes maps each teacher's classes, and {name} is of none: give a --val-cache of each")
    if None not in (cache.classes, first.classes) and cache.classes != first.classes:
        raise MismatchError(
            f"{name} (--val-cache) has other classes than {first.path.name}, or the same in another order: dump the "
            "validation data with its classes"
        )


def _held_out(
    held_out: Source,
    asked: Sequence[AskedCache],
    teachers: Teachers,
    maps: Sequence[StoredClassMap | None],
    options: DistillOptions,
) -> Source:
    """The validation data with the same teachers' caches of it, calibrated and mapped as those of the training data."""
    assert held_out.cache is not None
    assert held_out.sample_ids is not None
    caches = [held_out.cache, *(opened(one) for one in asked[1:])]
    of_training = teachers.ensemble.members
    for cache, other in zip(caches, of_training, strict=True):
        if cache.num_classes != other.cache.num_classes or (
            None not in (cache.classes, other.cache.classes) and cache.classes != other.cache.classes
        ):
            raise MismatchError(
                f"{cache.path.name} (--val-cache) has other classes than {other.name}: give the validation caches in "
                "the order of the --cache of their teachers"
            )
        if other.teacher.calibration is not None:
            check_serves(other.teacher.calibration, cache.encoding)
    members = members_of(caches, [one.weight for one in of_training], teachers.calibrations, maps)
    check_coverage(caches, held_out.sample_ids, missing="error")
    check_same_labels(members, held_out.sample_ids)
    rule = teachers.ensemble.rule.held_out()
    check_members(rule, members, options.temperature)
    ensemble = replace(teachers.ensemble, members=members, rule=rule, routes=None)
    shown = maps[0] if options.classes is not None else None
    return replace(held_out, teachers=replace(teachers, ensemble=ensemble, notes=()), classes=shown)


def at_run_temperature(teaching: Teaching | None, objective: Objective) -> Teaching | None:
    """Soft targets made at the temperature of each step, where the run has a schedule."""
    if not isinstance(teaching, Ensemble):
        return teaching
    return replace(teaching, temperature=lambda step: objective.at(step).settings.temperature)


def note_of(ensemble: Ensemble) -> str:
    """One line: the rule, and each teacher with its share of the weights, as far as rows share it."""
    shares = torch.tensor([member.weight for member in ensemble.members])
    if ensemble.skill is not None and ensemble.rule.name != "class-accuracy":
        shares = shares * ensemble.skill.weights(ensemble.rule, ensemble.encoding.num_classes)
    named = zip(ensemble.members, (shares / shares.sum()).tolist(), strict=True)
    names = ", ".join(f"{member.name} ({share:.3g})" for member, share in named)
    return f"{len(ensemble.members)} teachers by the rule {ensemble.rule.shown}: {names}"


def _check_course(rule: Rule, members: Sequence[Member], options: DistillOptions, *, own_val: bool) -> None:
    """Refuses what a course of the temperature and soft targets cannot have together."""
    if rule.name == "logits" or courses(options)[1].end is None:
        return
    sparse = [member.name for member in members if not member.cache.encoding.has_all_logits]
    if sparse:
        raise UsageError(
            f"--temperature-schedule beside the topk rows of {sparse[0]}: the mean of soft targets is known at stored "
            "temperatures alone; leave it out, or use caches with all logits"
        )
    if own_val and rule.held_out().name != "logits" and not rule.takes_one:
        raise UsageError(
            f"--temperature-schedule beside --ensemble {rule} and a --val-cache of each teacher: the validation would "
            "be at another temperature than the loss; give one --val-cache, or --ensemble logits"
        )
