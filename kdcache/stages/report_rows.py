"""One pass over a cache for its report: all views of a sample are read side by side, so that they can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcache.errors import DataError, UsageError
from kdcache.format.topk import TopK
from kdcache.store.parts import Catalog
from kdcache.store.rows import TeacherRows
from kdcache.store.scan import scan
from kdcache.train.teacher_figures import Figures
from kdcache.train.teacher_statistics import NO_LABEL_LOGITS, Row, TeacherStatistics, histogram

SUSPECTS = 50
# Modified z-score of Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993: 0.6745 * distance / MAD.
UNLIKE, _NORMAL = 3.5, 0.6745
LEAST_SPREAD = 1e-3  # MAD of energies below which the logits are normalised, and their energies rounding
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Measured:
    """The parts of a report that come from rows.

    Attributes:
        teacher: as in the JSON of `kdcache report`.
        data: the same, without `coverage`.
        unavailable: name -> why it is None.
    """

    teacher: dict[str, Any]
    data: dict[str, Any]
    unavailable: dict[str, str]


def measure(catalog: Catalog, name: str, progress: Callable[[int], None] | None = None) -> Measured:
    """Reads every row once.

    Args:
        catalog: of the cache.
        name: of the cache, for messages.
        progress: called with the number of rows after each block.

    Raises:
        UsageError: a cache of dense prediction, or one without logits.
        DataError: one class, or a label beyond the last class.
        CorruptCacheError, IncompleteCacheError, StorageError: of the cache.
    """
    encoding, views = catalog.schema.encoding, catalog.views
    if len(encoding.row_shape) > 1:
        raise UsageError(
            f"{name} holds dense prediction, rows of shape {encoding.row_shape}: a report is of one prediction a row"
        )
    if not encoding.has_all_logits and not isinstance(encoding, TopK):
        raise UsageError(
            f"{name} holds {encoding.name}, the mean of several teachers, which has no logits: report the caches that "
            "it was made of, each on its own, or an ensemble by mean of logits"
        )
    if encoding.num_classes < 2:
        raise DataError(f"{name} is of one class, and softmax over one class is always 1: there is nothing to report")
    if catalog.head is not None:
        catalog.head.keep()
    worst = _Worst()
    compare = len(views) > 1 and encoding.has_all_logits
    agree, tops = 0, []
    with _workers() as workers:
        statistics = TeacherStatistics(encoding.num_classes, workers)
        for block in _blocks(catalog):
            first: list[Figures] = []
            for number, rows in enumerate(block):
                found = statistics.add(rows, block[0] if number and compare else None)
                if number:
                    agree += sum(int((a.top == b.top).sum()) for a, b in zip(first, found, strict=True))
                else:
                    first = found
                    worst.add(rows, found)
                if progress is not None:
                    progress(len(rows))
            tops.append((len(block[0]), len(block)))
    kept = statistics.rows()
    view_of = np.concatenate([np.repeat(np.arange(count), rows) for rows, count in tops])
    teacher, missing = statistics.result()
    teacher["views"] = None
    if len(views) > 1:
        if not compare:
            missing["views.kl_mean"] = "topk rows do not hold the logits of all classes"
        teacher["views"] = {
            "views": list(views),
            "top1_each": [_top1(kept, view_of == place) for place in range(len(views))],
            "agreement": agree / (catalog.samples * (len(views) - 1)),
            "kl_mean": statistics.kl_mean,
        }
    data = _data(kept, view_of == 0, worst, missing)
    return Measured(teacher, {"samples": catalog.samples, **data}, missing)


class _Worst:
    """The rows whose label has the least probability, as `kdcache suspects` ranks them."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, Any, int, int]] = []

    def add(self, rows: TeacherRows, found: list[Figures]) -> None:
        if rows.label is None or any(one.log_label is None for one in found):
            return
        own = np.exp(np.concatenate([one.log_label for one in found if one.log_label is not None]))
        top = np.concatenate([one.top for one in found])
        places = np.flatnonzero(~np.isnan(own))
        places = places[np.argsort(own[places], kind="stable")[:SUSPECTS]]
        self._rows += zip(
            own[places].tolist(),
            rows.sample_id[places].tolist(),
            np.asarray(rows.label)[places].tolist(),
            top[places].tolist(),
            strict=True,
        )
        self._rows = sorted(self._rows, key=lambda one: one[0])[:SUSPECTS]

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "sample_id": one.decode("utf-8", "replace") if isinstance(one, bytes) else one,
                "label": label,
                "teacher_class": top,
                "score": score,
            }
            for score, one, label, top in self._rows
        ]


def _blocks(catalog: Catalog) -> Iterator[list[TeacherRows]]:
    """The same samples in every view, each row checked: parts of all views are cut at the same samples."""
    size, encoding = max(1, _BLOCK_BYTES // len(catalog.views)), catalog.schema.encoding
    names = [spec.name for spec in encoding.specs]
    scans = [scan(catalog, views=[view], block_bytes=size) for view in catalog.views]
    for together in zip(*scans, strict=True):
        yield [
            TeacherRows(
                encoding,
                {name: block[name] for name in names},
                block["sample_id"],
                block["view"],
                block.get("label"),
                np.ones(len(positions), bool),
                label_b=block.get("label_b"),
                mix_ratio=block.get("mix_ratio"),
            )
            for _, positions, block in together
        ]


@contextmanager
def _workers() -> Iterator[Executor]:
    """As many threads as torch has, each of which works on rows of its own, with torch's own threads off.

    Threads that meet behind each of 40 short operations wait for one another on a busy machine: with two of them a row
    of 1000 classes took 8 to 80 us instead of 4.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before) as workers:
            yield workers
    finally:
        torch.set_num_threads(before)


def _top1(kept: Row, chosen: np.ndarray) -> float | None:
    known = chosen & (kept.label >= 0)
    return float((kept.label == kept.top)[known].mean()) if known.any() else None


def _data(kept: Row, first: np.ndarray, worst: _Worst, missing: dict[str, str]) -> dict[str, Any]:
    """Of the first view."""
    known = first & (kept.label >= 0)
    labelled, differ = int(known.sum()), int(((kept.label != kept.top) & known).sum())
    if not labelled:
        why = missing.get("top1", "no row of the first view has a label")
        missing["disagreement"] = missing["suspects"] = why
    suspects = worst.to_json() or None
    if labelled and suspects is None:
        missing["suspects"] = NO_LABEL_LOGITS
    return {
        "labelled": labelled,
        "disagreement": {"rows": differ, "share": differ / labelled} if labelled else None,
        "suspects": suspects,
        "domain": _domain(kept.energy[first], kept.confidence[first], missing),
    }


def _domain(energy: np.ndarray, confidence: np.ndarray, missing: dict[str, str]) -> dict[str, Any]:
    """How many rows are unlike the others, by their energy."""
    rule = f"{_NORMAL} * |energy - median| / MAD > {UNLIKE}, energy = -logsumexp(logits)"
    found: dict[str, Any] = {"energy_histogram": None, "max_probability_mean": None, "unlike_share": None, "rule": rule}
    if "confidence" in missing:
        missing["domain"] = missing["confidence"]
        return found
    found["max_probability_mean"] = float(confidence.mean(dtype=np.float64))
    found["energy_histogram"] = histogram(energy, float(energy.min()), float(energy.max()))
    middle = np.median(energy)
    distance = np.abs(energy - middle)
    spread = float(np.median(distance))
    if spread < LEAST_SPREAD:
        missing["domain.unlike_share"] = "the energies are (nearly) all equal: these logits are log-probabilities"
    else:
        found["unlike_share"] = float((_NORMAL * distance > UNLIKE * spread).mean())
    return found
