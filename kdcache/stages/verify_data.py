"""`kdcache verify --data`: replays some samples and compares them with a cache: does the student see what was dumped?

No model is run: 64 samples of 32 x 32 in four views take well under a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import MismatchError, UsageError
from kdcache.format.identity import input_digest, show_id
from kdcache.stages.dump_feed import plain_label
from kdcache.stages.loaded_data import NO_LABEL
from kdcache.stages.precompute_inputs import data_of
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.stages.verify_rows import ReplayedRows, contradictions, replayed_rows
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.train.cache_views import Augment
from kdcache.train.checks import reason_against_inputs
from kdcache.train.diagnosis import diagnose, mismatch
from kdcache.train.items import first_input, label_of

_BATCH_ROWS = 64


@dataclass(frozen=True)
class DataReport:
    """What `verify_data` found; `problem` is None where all that was compared is as it was dumped.

    Attributes:
        samples: samples that were looked at.
        views: the views in which each of them was.
        rows: samples x views.
        labels_differ: rows that have two different labels; None where the cache has none.
        inputs_differ: rows whose input is another one; None where they cannot be compared.
        note: why inputs cannot be compared.
        cause: the likely one of inputs that differ.
        problem: sample, view, likely cause, and what to do.
    """

    samples: int
    views: tuple[int, ...]
    rows: int
    labels_differ: int | None
    inputs_differ: int | None
    note: str | None = None
    cause: str | None = None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return self.problem is None

    def raise_on_error(self) -> None:
        """Raises what was found.

        Raises:
            MismatchError: inputs or labels that differ.
        """
        if self.problem is not None:
            raise MismatchError(self.problem)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"ok": self.ok, **asdict(self), "views": list(self.views)}


def verify_data(
    path: str | Path,
    data: Any,
    *,
    sample_ids: Any = None,
    id_key: str | None = None,
    augment: Augment | None = None,
    sample: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> DataReport:
    """Compares digests and labels of some samples, in all views of a cache, with those of a data set.

    Args:
        path: of the cache.
        data: the data set, or a SPEC; it must hold the samples.
        sample_ids: one per item of the data set, as in `precompute`.
        id_key: as in `precompute`.
        augment: the pipeline of the dump, where it is a transform of your own (see `kdcache.join`).
        sample: how many samples: the first and last of shards, and random ones.
        seed: of the random ones.
        progress: called with the number of rows after each batch.

    Raises:
        MismatchError: the data set lacks samples, or another pipeline than the dump's.
        UsageError: the cache holds nothing to compare, or the pipeline of the dump has to be given.
        DataError, CoverageError, CorruptCacheError: as in `kdcache.join` and `kdcache.open`.
    """
    with open_cache(path) as cache:
        reason = reason_against_inputs(cache)
        if reason is not None and not cache.has_labels:
            raise UsageError(f"{cache.path.name} holds no labels, and inputs cannot be compared: {reason}")
        options = PrecomputeOptions(data=data if isinstance(data, str) else None)
        loaded = data_of(None if isinstance(data, str) else data, options)
        rows = replayed_rows(
            cache, loaded, sample_ids=sample_ids, id_key=id_key, augment=augment, sample=sample, seed=seed
        )
        return _report(cache, rows, reason, progress)


def _report(cache: Cache, rows: ReplayedRows, reason: str | None, progress: Callable[[int], None] | None) -> DataReport:
    stored = rows.stored
    digests, labels, partners = [], [], []
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = rows.load(list(range(start, min(start + _BATCH_ROWS, len(rows)))))
        digests += [0 if reason is not None else input_digest(first_input(one.item)) for one in batch]
        known = [plain_label(label_of(one.item)) for one in batch]
        labels += [NO_LABEL if label is None else label for label in known]
        partners += [NO_LABEL if one.label_b is None else one.label_b for one in batch]
        if progress is not None:
            progress(len(batch))
    found = np.array(digests, np.uint64)
    wrong = [
        contradictions(np.array(given), kept)
        for given, kept in ((labels, stored.label), (partners, stored.label_b))
        if kept is not None
    ]
    labels_differ = sum(wrong) if wrong else None
    inputs_differ = None if reason is not None else int((found != stored.input_digest).sum())
    problems, cause = [], None
    if labels_differ:
        problems.append(_about_labels(cache, rows, np.array(labels), labels_differ))
    if inputs_differ:
        agree = None if labels_differ is None else not labels_differ
        cause = diagnose(cache, stored, found, labels_agree=agree).cause
        problems.append(mismatch(cache, stored, found, labels_agree=agree))
    views = tuple(dict.fromkeys(stored.view.tolist()))
    return DataReport(
        samples=len(rows) // len(views),
        views=views,
        rows=len(rows),
        labels_differ=labels_differ,
        inputs_differ=inputs_differ,
        note=None if reason is None else f"inputs are not compared: {reason}",
        cause=cause,
        problem="; ".join(problems) or None,
    )


def _about_labels(cache: Cache, rows: ReplayedRows, labels: np.ndarray, count: int) -> str:
    stored = rows.stored
    assert stored.label is not None
    differs = np.flatnonzero((labels != stored.label) & (labels != NO_LABEL) & (stored.label != NO_LABEL))
    if not len(differs):
        return f"{count} labels of partners that samples are mixed with are not those of {cache.path.name}"
    at = int(differs[0])
    return (
        f"{count} of the {len(rows)} labels are not those of {cache.path.name} (sample {show_id(stored.sample_id[at])} "
        f"has {int(labels[at])}, and {int(stored.label[at])} in the cache): labels were corrected since the dump, "
        "classes are numbered in another order, or the ids belong to other samples"
    )
