"""Why an input is not the one that the teacher saw: the likely cause, and what to do about it.

The digest of an input says that it differs, not how. But it can be looked for among the cache's other rows, and whether
all of a batch differ or a few, and in which libraries, tells the rest. Only done where a run ends anyway: the lookup
reads all digests of the cache (0.7 s for ten million rows in memory).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from kdcache.format.identity import show_id, show_ids
from kdcache.store.cache import Cache
from kdcache.store.rows import TeacherRows
from kdcache.train.cache_views import recorded_pipeline
from kdcache.train.library_versions import changed_versions

Cause: TypeAlias = Literal["order", "view", "library version", "transform", "sample content"]


@dataclass(frozen=True)
class Diagnosis:
    """What a difference of inputs points to.

    Attributes:
        cause: the likely one.
        sample: position of the row that the message is about, among those that were compared.
        text: what speaks for the cause, and what to do.
    """

    cause: Cause
    sample: int
    text: str


def mismatch(
    cache: Cache, stored: TeacherRows, found: np.ndarray, *, agreed_before: int = 0, labels_agree: bool | None = None
) -> str:
    """The whole message about inputs that differ: sample, view, both digests, cause and advice.

    Args:
        cache: that the rows come from.
        stored: the rows (N,) whose inputs were compared, each with its teacher.
        found: (N,) uint64 digests of the inputs; one of them at least is not the stored one.
        agreed_before: how many inputs were compared before and agreed.
        labels_agree: whether labels were compared, and agree; None where there is nothing to compare.
    """
    diagnosis = diagnose(cache, stored, found, agreed_before=agreed_before, labels_agree=labels_agree)
    at = diagnosis.sample
    assert stored.input_digest is not None
    return (
        f"sample {show_id(stored.sample_id[at])}: its input is not the one that the teacher saw in view "
        f"{int(stored.view[at])} (digest {int(found[at]):016x}, in {cache.path.name} "
        f"{int(stored.input_digest[at]):016x}). Likely cause: {diagnosis.text}; or compare ids and labels alone with "
        "check='ids' (--check ids)"
    )


def diagnose(
    cache: Cache, stored: TeacherRows, found: np.ndarray, *, agreed_before: int = 0, labels_agree: bool | None = None
) -> Diagnosis:
    """The likely cause of inputs that differ; arguments as in `mismatch`."""
    assert stored.input_digest is not None
    differs = np.flatnonzero(found != stored.input_digest)
    scope = f"{len(differs)} of the {len(found)} inputs compared differ"
    moved = _moved(cache, stored, found, differs)
    if moved is not None:
        return Diagnosis(moved.cause, moved.sample, f"{moved.cause}. {scope}; {moved.text}")
    first = int(differs[0])
    if len(differs) < len(found) or (agreed_before and len(found) == 1):
        return Diagnosis("sample content", first, f"sample content. {scope}{_content(stored, differs, agreed_before)}")
    others = f", though {agreed_before} before them agreed" if agreed_before else ""
    alike = _alike(labels_agree)
    changed = changed_versions(cache.provenance)
    if changed:
        listed = ", ".join(f"{name} {there!r:.40} in the dump and {here!r:.40} here" for name, there, here in changed)
        return Diagnosis(
            "library version",
            first,
            f"library version. {scope}{others}, {alike}, and libraries that decode or transform are other ones: "
            f"{listed}. Install the versions of the dump, or dump again with these",
        )
    single = " Only one input was compared, which may also have changed by itself." if len(found) == 1 else ""
    return Diagnosis(
        "transform",
        first,
        f"transform. {scope}{others}, {alike}, and no library is known to be another: random augmentation that is not "
        f"replayed, another crop, resize, normalisation or dtype, or all files prepared anew. {_recorded(cache)}"
        f"{single} Give the student the inputs that were dumped, or dump again with these",
    )


def _moved(cache: Cache, stored: TeacherRows, found: np.ndarray, differs: np.ndarray) -> Diagnosis | None:
    """Inputs that the cache knows as those of other rows: the cause, if that holds for half of those that differ."""
    digests = cache.stored("input_digest")
    wanted = np.unique(found[differs])
    places = np.minimum(np.searchsorted(wanted, digests), len(wanted) - 1)  # a sort of all digests takes 4 s
    known = np.flatnonzero(wanted[places] == digests)
    samples: dict[int, int] = {}  # by position among the compared: the row that its input belongs to
    views: dict[int, int] = {}
    for at in differs.tolist():
        rows = known[digests[known] == found[at]]
        if not len(rows):
            continue
        position = int(cache.find(stored.sample_id[at : at + 1], cache.views[0])[0])
        same = rows[rows % cache.num_samples == position]
        if len(same):
            views[at] = int(same[0])
        else:
            slot = cache.views.index(int(stored.view[at]))
            here = rows[rows // cache.num_samples == slot]
            samples[at] = int((here if len(here) else rows)[0])
    if 2 * (len(samples) + len(views)) < len(differs):
        return None
    if len(views) > len(samples):
        at, row = next(iter(views.items()))
        return Diagnosis(
            "view",
            at,
            f"the views are out of step: this is the input of view {cache.views[row // cache.num_samples]} of the same "
            f"sample, and {len(views)} of those that differ are inputs of another view. Take pixels and rows from one "
            "object (kdcache.join, or attach over kdcache.with_ids(dataset, cache=cache)), or call set_epoch on it",
        )
    at, row = next(iter(samples.items()))
    name = show_id(cache.stored("sample_id", row, row + 1)[0])
    return Diagnosis(
        "order",
        at,
        f"this is the input of sample {name}, and {len(samples)} of those that differ are inputs of other samples of "
        "this cache: ids and items are not in the order of the dump. Give each item the id that it had in the dump "
        "(sample_ids=, or a data set that says them; of a Subset those of its items, not their positions in it)",
    )


def _content(stored: TeacherRows, differs: np.ndarray, agreed_before: int) -> str:
    more = f" ({agreed_before} before them agreed)" if agreed_before else ""
    names = show_ids(dict.fromkeys(stored.sample_id[differs].tolist()))
    return (
        f"{more}, the others are as they were: the content of these samples has changed since the dump ({names}): "
        "files that were replaced, cut short or repaired. Bring the old files back, or dump again"
    )


def _alike(labels_agree: bool | None) -> str:
    return {
        True: "ids and labels agree",
        False: "ids agree, and labels do not",
        None: "ids agree, and labels cannot be compared",
    }[labels_agree]


def _recorded(cache: Cache) -> str:
    """How the dump's inputs came about, as far as the provenance says."""
    pipeline = recorded_pipeline(cache)
    data: Any = cache.provenance.get("data")
    inputs = data.get("inputs") if isinstance(data, dict) else None
    items = f"of items that are {inputs!r:.200}" if isinstance(inputs, str) else "of the data set's items"
    if pipeline is None:
        return f"The digests are {items}, without augmentation."
    return f"The digests are {items}, through the pipeline {pipeline}."
