"""What several caches must have in common before they teach together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdcache.errors import CoverageError, DataError, MismatchError, UsageError
from kdcache.format.identity import show_id, show_ids
from kdcache.format.soft_targets import SoftTargets
from kdcache.format.topk import TopK
from kdcache.store.cache import Cache
from kdcache.train.cache_views import recorded_pipeline
from kdcache.train.capability import require
from kdcache.train.ensemble import Member
from kdcache.train.ensemble_mean import check_stored
from kdcache.train.ensemble_rules import OF_DISTILL, Rule, Words


def check_views(caches: Sequence[Cache], views: Sequence[int]) -> None:
    """Refuses caches of other views, or of another pipeline, than the first one's.

    Args:
        caches: the first says which pipeline it is.
        views: that are used.

    Raises:
        MismatchError: naming both.
    """
    first = recorded_pipeline(caches[0])
    for cache in caches[1:]:
        own = recorded_pipeline(cache)
        if (None if own is None else own.key) != (None if first is None else first.key):
            told = ["no augmentation" if one is None else f"the pipeline {one}" for one in (own, first)]
            raise MismatchError(
                f"{cache.path.name} was dumped with {told[0]}, {caches[0].path.name} with {told[1]}: their teachers "
                "saw other inputs. Dump each with the same --augment and --seed"
            )
        gone = [view for view in views if view not in cache.views]
        if gone and len(views) > 1:
            raise MismatchError(
                f"{cache.path.name} has the views {list(cache.views)}, not {gone}, which {caches[0].path.name} has: "
                "add them with the command of its dump, or take fewer (--views)"
            )
        if len(views) == 1 and first is not None and gone:
            raise MismatchError(f"{cache.path.name} has the views {list(cache.views)}, not {gone}")


def check_coverage(
    caches: Sequence[Cache], sample_ids: np.ndarray, *, missing: str, words: Words = OF_DISTILL
) -> np.ndarray:
    """Which samples have a teacher: positions (n,) int64, ascending.

    Args:
        caches: of the teachers.
        sample_ids: (N,) of the data.
        missing: `error` wants every sample in every cache.
        words: of the command, for messages.

    Raises:
        CoverageError: a cache lacks samples and `missing` is `error`; or it shares none with any other.
        DataError: no sample is left.
    """
    found = np.stack([cache.find(sample_ids, cache.views[0]) >= 0 for cache in caches])
    votes = found.sum(axis=0)
    for number, cache in enumerate(caches):
        absent = np.flatnonzero(~found[number])
        if len(absent) and missing == "error":
            raise CoverageError(
                f"{cache.path.name} lacks {len(absent)} of the {len(sample_ids)} samples: "
                f"{show_ids(sample_ids[absent[:6]])}. Dump them as well, or let the other teachers speak for them "
                f"({words.missing})"
            )
        if not (found[number] & (votes > 1)).any():
            raise CoverageError(
                f"{cache.path.name} shares no sample of the data with any other {words.cache} "
                f"({int(found[number].sum())} of the {len(sample_ids)} are in it): several teachers become one where "
                "they speak about the same sample. Were they dumped from the same data, with the same ids?"
            )
    positions = np.flatnonzero(votes > 0)
    if not len(positions):
        raise DataError(f"no {words.cache} holds any of the {len(sample_ids)} samples")
    return positions


def check_same_labels(members: Sequence[Member], sample_ids: np.ndarray) -> None:
    """Compares the labels of all caches, in the first one's classes, wherever two have one.

    Raises:
        MismatchError: naming the first sample that differs.
    """
    known = np.full(len(sample_ids), -1, np.int64)
    whose = np.full(len(sample_ids), -1, np.int64)
    for number, member in enumerate(members):
        cache = member.cache
        if not cache.has_labels:
            continue
        stored = cache.stored("label", 0, cache.num_samples)
        if stored.ndim != 1:
            continue
        own = stored if member.teacher.classes is None else member.teacher.classes.labels(stored)
        rows = cache.find(sample_ids, cache.views[0])
        labels = np.where(rows >= 0, own[np.maximum(rows, 0)], -1)
        differs = np.flatnonzero((labels >= 0) & (known >= 0) & (labels != known))
        if len(differs):
            at = int(differs[0])
            is_mapped = member.teacher.classes is not None
            own_number = f" (there {int(stored[rows[at]])}, as its classes are mapped)" if is_mapped else ""
            raise MismatchError(
                f"sample {show_id(sample_ids[at])} has the label {int(labels[at])} in {member.name}{own_number} and "
                f"{int(known[at])} in {members[int(whose[at])].name}; {len(differs)} labels differ. The caches are of "
                "other data or ids, or number their classes in another order (class names in the dumps would tell)"
            )
        is_new = (known < 0) & (labels >= 0)
        known, whose = np.where(is_new, labels, known), np.where(is_new, number, whose)


def check_members(rule: Rule, members: Sequence[Member], temperature: float, *, words: Words = OF_DISTILL) -> None:
    """Refuses caches whose rows cannot serve a rule.

    Raises:
        UsageError: naming the cache and what would serve.
    """
    for member in members:
        cache, encoding = member.cache, member.cache.encoding
        if encoding.num_classes < 2:
            raise UsageError(f"the teacher of {member.name} has one class, and softmax over one class is always 1")
        if isinstance(encoding, SoftTargets):
            raise UsageError(
                f"{member.name} is the mean of several teachers itself: give the caches that it was made of"
            )
        is_topk = isinstance(encoding, TopK) and not encoding.has_all_logits
        if rule.needs_all_logits and is_topk:
            raise UsageError(
                f"{words.rule} {rule} needs the logits of all classes, and {member.name} holds {encoding.name} rows: "
                "use soft-targets, or a cache with all logits (--dtype float16, int8 or int4)"
            )
        if (rule.is_per_row or is_topk) and len(encoding.row_shape) > 1:
            raise UsageError(f"{words.rule} {rule} is of rows (N, C), and {member.name} has rows {encoding.row_shape}")
        if is_topk:
            assert isinstance(encoding, TopK)
            calibration = member.teacher.calibration
            divided = 1.0 if calibration is None else calibration.temperature
            stored = tuple(t / divided if isinstance(t, float) else t for t in encoding.temperatures)
            check_stored(stored, temperature, name=member.name)
            if rule.name == "cross-entropy":
                require("nll", encoding)
        if rule.name == "cross-entropy" and cache.catalog.schema.is_mixed:
            raise UsageError(
                f"{words.rule} cross-entropy asks for the label of each row, and the views of {member.name} are mixed"
            )
