"""How good each of several teachers is on the labelled rows of its cache, for the rules that weigh by it.

Measured once, at the start of a run. On rows that a teacher was trained on it is right more often than elsewhere, so
that the worst of over-fitted teachers would get the largest weight: such caches are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kdcache.errors import DataError, UsageError
from kdcache.store.cache import Cache
from kdcache.store.rows import TeacherRows
from kdcache.store.scan import scan
from kdcache.train.calibration_metrics import CalibrationMetrics, clean_labels
from kdcache.train.capability import require
from kdcache.train.ensemble import Member
from kdcache.train.ensemble_rules import OF_DISTILL, Rule, Words
from kdcache.train.ensemble_weights import Skill

LEAST_ROWS = 10
_BLOCK_BYTES = 8 << 20


def measured_skill(
    rule: Rule, members: Sequence[Member], *, words: Words = OF_DISTILL
) -> tuple[Skill | None, list[str]]:
    """What the rule weighs by, and what is to be said about it; None for rules that weigh by something else.

    Raises:
        UsageError: a cache without labels, or whose teacher was trained on its rows.
        DataError: fewer than 10 labelled rows.
        CorruptCacheError, IncompleteCacheError: of a cache.
    """
    if not rule.needs_labelled_cache:
        return None, []
    notes = [note for member in members for note in _check(rule, member, words)]
    measured = [_of_member(rule, member, words) for member in members]
    skill = Skill(
        tuple(float((right.sum() + 0.5) / (rows.sum() + 1)) for right, rows, _ in measured),
        tuple(nll for _, _, nll in measured if nll is not None) or None,
        tuple(tuple(((right + 1) / (rows + 2)).tolist()) for right, rows, _ in measured)
        if rule.name == "class-accuracy"
        else None,
        tuple(int(rows.sum()) for _, rows, _ in measured),
    )
    skill.weights(rule, len(measured[0][0]))  # refuses teachers at chance
    found, what = (skill.accuracy, "accuracy") if skill.nll is None else (skill.nll, "NLL")
    told = ", ".join(f"{member.name} {one:.4f}" for member, one in zip(members, found, strict=True))
    return skill, [f"{what} on the caches' labelled rows: {told}", *notes]


def _check(rule: Rule, member: Member, words: Words) -> list[str]:
    cache = member.cache
    seen = cache.provenance.get("teacher_seen")
    if not cache.has_labels or len(cache.encoding.row_shape) > 1:
        raise UsageError(
            f"{words.rule} {rule} measures each teacher on the labels of its cache, and {member.name} has none of "
            "single rows: dump data with labels, or say the weights yourself (PATH=WEIGHT)"
        )
    if seen == "yes":
        raise UsageError(
            f"the teacher of {member.name} was trained on these rows (teacher_seen: yes), on which it is right more "
            f"often than on new ones, so that {words.rule} {rule} would weigh by over-fitting: measure the teachers on "
            "other rows and say the weights yourself (PATH=WEIGHT)"
        )
    if rule.name == "calibration":
        require("nll", cache.encoding)
    if seen == "no":
        return []
    return [
        f"nobody said whether the teacher of {member.name} was trained on these rows (teacher_seen: unknown): if it "
        "was, its weight is too large"
    ]


def _of_member(rule: Rule, member: Member, words: Words) -> tuple[np.ndarray, np.ndarray, float | None]:
    """(C,) rows of each class that are right, (C,) rows of each class, and the NLL where the rule asks for it."""
    classes = member.cache.num_classes if member.teacher.classes is None else member.teacher.classes.num_classes
    right, rows, metrics = np.zeros(classes), np.zeros(classes), CalibrationMetrics()
    for block in _blocks(member.cache):
        made = member.teacher.rows(block, None, step=0)
        labels = clean_labels(made)
        known = torch.nonzero(labels >= 0).squeeze(1)
        own, top = labels[known], made.encoding.top_class(made.arrays).long()[known]
        rows += torch.bincount(own, minlength=classes).numpy()
        right += torch.bincount(own[own == top], minlength=classes).numpy()
        if rule.name == "calibration":
            metrics.add(made, labels)
    if rows.sum() < LEAST_ROWS:
        raise DataError(
            f"{member.name} has {int(rows.sum())} labelled rows, and {words.rule} {rule} measures its teacher on "
            f"{LEAST_ROWS} at least: say the weights yourself (PATH=WEIGHT)"
        )
    if rule.name != "calibration":
        return right, rows, None
    found = metrics.result()
    if found.nll is None:
        raise UsageError(f"the NLL of {member.name} is not known: {found.missing.get('nll')}")
    return right, rows, found.nll


def _blocks(cache: Cache) -> Iterator[TeacherRows]:
    """The rows of the first view, as tensors, each checked."""
    names = [spec.name for spec in cache.encoding.specs]
    for _, _, block in scan(cache.catalog, views=cache.views[:1], block_bytes=_BLOCK_BYTES):
        count = len(block["sample_id"])
        yield TeacherRows(
            cache.encoding,
            {name: block[name] for name in names},
            block["sample_id"],
            block["view"],
            block["label"],
            np.ones(count, bool),
            label_b=block.get("label_b"),
            mix_ratio=block.get("mix_ratio"),
        ).tensors()
