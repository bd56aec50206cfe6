"""Each of several teachers by itself: its cache, its calibration, and its classes brought to those of the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdcache.errors import MismatchError, UsageError
from kdcache.stages.asked_caches import AskedCache
from kdcache.stages.calibration_file import StoredCalibration, load_calibration, read_calibration
from kdcache.stages.choices import NOVEL
from kdcache.stages.class_map_file import StoredClassMap, load_class_map
from kdcache.stages.class_maps import check_labels, check_rows
from kdcache.stages.distill_inputs import Source
from kdcache.stages.distill_options import DistillOptions
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.train.class_map import ClassMap
from kdcache.train.ensemble import Member
from kdcache.train.ensemble_rules import OF_DISTILL, Rule, Words, parse_rule
from kdcache.train.teaching import OneTeacher


def opened(asked: AskedCache) -> Cache:
    """The cache, open.

    Raises:
        UsageError: a one-class teacher.
        CorruptCacheError, IncompleteCacheError: of the cache.
    """
    return asked.cache if isinstance(asked.cache, Cache) else open_cache(asked.cache)


def chosen_rule(text: str | None, caches: Sequence[Cache], *, words: Words = OF_DISTILL) -> Rule:
    """The rule asked for: by default `logits`, or `soft-targets` where a cache does not hold all logits.

    Raises:
        UsageError: it is not known.
    """
    if text is not None:
        return parse_rule(text, option=words.rule)
    return Rule("logits" if all(cache.encoding.has_all_logits for cache in caches) else "soft-targets")


def matched_calibrations(files: Sequence[str], caches: Sequence[Cache]) -> list[StoredCalibration | None]:
    """The calibration of each cache, by the root hash that it is bound to; None for a cache without one.

    Raises:
        MismatchError: one is of no cache here.
        UsageError: no such file, two of one cache, or rows that cannot serve it.
        CorruptCacheError: not what `kdcache calibrate` wrote.
    """
    found: list[StoredCalibration | None] = [None] * len(caches)
    for file in files:
        root = read_calibration(file).root
        numbers = [number for number, cache in enumerate(caches) if cache.root == root]
        if not numbers:
            names = ", ".join(cache.path.name for cache in caches)
            raise MismatchError(
                f"{Path(file).name} calibrates the cache with the root hash {root}, which is none of {names}: run "
                "`kdcache calibrate` for the cache that it is meant for"
            )
        if found[numbers[0]] is not None:
            raise UsageError(f"--calibration names two files for {caches[numbers[0]].path.name}: give one")
        found[numbers[0]] = load_calibration(file, caches[numbers[0]])
    return found


def class_map_of(
    cache: Cache, caches: Sequence[Cache], source: Source, options: DistillOptions
) -> StoredClassMap | None:
    """How the classes of one teacher become the student's: by --classes, else by names in the order of the first.

    Raises:
        UsageError: some caches name their classes and some do not, or a map with classes that a teacher does not know.
        MismatchError: other classes.
    """
    name = cache.path.name
    if options.classes is not None:
        found = load_class_map(
            options.classes,
            novel=options.novel or NOVEL[0],
            teacher=cache.classes,
            teacher_count=cache.num_classes,
            student=source.class_names,
            cache_name=name,
            others=[(other.path.name, other.classes, other.num_classes) for other in caches if other is not cache],
        )
        if found.classes.novel:
            shown = ", ".join(found.student[number] for number in found.classes.novel[:6])
            raise UsageError(
                f"--classes: {name} does not know {len(found.classes.novel)} of the student's classes ({shown:.200}), "
                "and several teachers have to know the same classes: leave it out, or distil from it alone"
            )
        check_labels(found, source)
        check_rows(found.classes, cache)
        return found
    return ordered_like(cache, caches[0])


def ordered_like(cache: Cache, first: Cache, *, words: Words = OF_DISTILL) -> StoredClassMap | None:
    """The map of a cache's classes to the order of the first one's, by their names; None for the same order.

    Raises:
        UsageError: one of the two has names and the other has not.
        MismatchError: other classes, or rows of another shape.
    """
    name, other = cache.path.name, first.path.name
    if cache.encoding.row_shape[1:] != first.encoding.row_shape[1:]:
        raise MismatchError(
            f"the rows of {name} have the shape {cache.encoding.row_shape}, those of {other} "
            f"{first.encoding.row_shape}: teachers of one ensemble say something about the same positions"
        )
    mine, theirs = cache.classes, first.classes
    if mine is None and theirs is None:
        if cache.num_classes != first.num_classes:
            raise MismatchError(f"{name} has {cache.num_classes} classes, {other} {first.num_classes}: {words.classes}")
        return None
    if mine is None or theirs is None:
        unnamed = name if mine is None else other
        raise UsageError(
            f"{unnamed} does not name its classes, so that their order is not known beside the other: {words.classes}"
        )
    if mine == theirs:
        return None
    missing = sorted({*mine} ^ {*theirs})
    if missing:
        shown = ", ".join(repr(one) for one in missing[:6])
        raise MismatchError(
            f"{name} and {other} have other classes ({shown:.300} in one of them alone): {words.classes}"
        )
    return StoredClassMap(ClassMap.of_names(mine, theirs), tuple(theirs), "names")


def members_of(
    caches: Sequence[Cache],
    weights: Sequence[float],
    calibrations: Sequence[StoredCalibration | None],
    maps: Sequence[StoredClassMap | None],
) -> tuple[Member, ...]:
    """The teachers, each with what is done to its rows."""
    return tuple(
        Member(
            cache,
            OneTeacher(
                None if calibration is None else calibration.calibration,
                None if found is None or found.classes.is_identity else found.classes,
            ),
            weight,
        )
        for cache, weight, calibration, found in zip(caches, weights, calibrations, maps, strict=True)
    )
