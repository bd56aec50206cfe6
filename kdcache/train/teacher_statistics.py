"""A teacher's rows summed up in one pass: accuracy, likelihood, calibration, softness, confusions, energy.

Rows come block by block; 20 bytes of each stay (label, top class, confidence, energy, entropy), since quantiles,
medians and pairs of classes are known only behind the last one: a million rows take 20 MB. All else is sums in float64.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from kdcache.format.dense import Dense
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.calibration_metrics import TOLERANCE, check_labels, clean_labels, equal_mass_bins, equal_width_bins
from kdcache.train.teacher_figures import TEMPERATURES, Figures, of_logits, of_topk

CONFUSIONS, BARS = 20, 20
LEAST_ROWS = 10  # of a label, of which more is said than its count
_PIECE_VALUES = 1 << 18  # logits at a time: 1 MB, which a processor's cache holds; with less Python takes longer
NO_LABELS = "the rows have no labels"
NO_LABEL_LOGITS = "these topk rows were made without labels, whose logits they would keep"


@final
@dataclass(frozen=True, eq=False)
class Row:
    """What stays of N rows.

    Attributes:
        label: (N,) int32, -1 = none.
        top: (N,) int32.
        confidence: (N,) float32.
        energy: (N,) float32.
        entropy: (N,) float32, empty where rows cannot tell.
    """

    label: np.ndarray
    top: np.ndarray
    confidence: np.ndarray
    energy: np.ndarray
    entropy: np.ndarray


@final
class TeacherStatistics:
    """Gathers blocks of rows; `result` may be asked for at any time.

    Args:
        num_classes: C, at least 2.
        workers: threads among which pieces of a block are shared out; the results are the same.

    >>> statistics = TeacherStatistics(2)
    >>> _ = statistics.add(TeacherRows.from_dense(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), label=torch.tensor([0, 1])))
    >>> statistics.result()[0]["top1"]
    0.5
    """

    def __init__(self, num_classes: int, workers: Executor | None = None) -> None:
        self._classes, self._map = num_classes, map if workers is None else workers.map
        self._rows, self._labelled, self._within, self._compared = 0, 0, 0, 0
        self._sums: dict[str, Any] = {}
        self._kept: list[Row] = []
        self._missing: dict[str, str] = {}

    def add(self, rows: TeacherRows, against: TeacherRows | None = None) -> list[Figures]:
        """Counts a block.

        Args:
            rows: N rows (N, C) of any encoding, NumPy or tensors on the CPU.
            against: rows of the same samples in another view; with all logits, their mean KL is gathered.

        Returns:
            The figures of the rows in order, piece by piece.

        Raises:
            DataError: labels beyond the last class.
        """
        given = rows.tensors()
        labels = torch.full((len(rows),), -1) if given.label is None else check_labels(given, clean_labels(given))
        other = None if against is None else against.tensors()

        def figures(piece: slice) -> Figures:
            part = given.take(piece)
            if _is_sparse(given):
                return of_topk(part, labels[piece])
            logits, row_max = _logits(part)
            return of_logits(logits, row_max, labels[piece], None if other is None else _logits(other.take(piece))[0])

        pieces = _pieces(given)
        found = list(self._map(figures, pieces))
        for piece, one in zip(pieces, found, strict=True):
            self._count(one, labels[piece].numpy())
        return found

    def _count(self, found: Figures, labels: np.ndarray) -> None:
        known = labels >= 0
        self._rows += len(labels)
        self._labelled += int(known.sum())
        self._sum("error", np.array(found.error)[:, None])
        self._sum("outside_top", found.outside_top)
        if found.entropy is not None:
            self._sum("entropy", found.entropy)
        if found.outside_label is not None:
            self._sum("outside_label", found.outside_label[:, known])
        if found.log_label is not None:
            self._sum("log_label", found.log_label[known])
        if found.squares is not None and found.log_label is not None:
            self._sum("brier", (found.squares - 2 * np.exp(found.log_label) + 1)[known])
        if found.within_five is not None:
            self._within += int(found.within_five.sum())
        else:
            self._missing["top5"] = f"of {self._classes} classes the rows do not tell five that leave any out"
        if found.divergence is not None:
            self._sum("divergence", found.divergence)
            self._compared += len(labels)
        self._kept.append(
            Row(
                labels.astype(np.int32),
                found.top.astype(np.int32),
                (1 - found.outside_top[0]).astype(np.float32),
                found.energy.astype(np.float32),
                np.empty(0, np.float32) if found.entropy is None else found.entropy[0].astype(np.float32),
            )
        )

    def _sum(self, name: str, values: np.ndarray) -> None:
        """Adds up over the last dimension."""
        self._sums[name] = self._sums.get(name, 0.0) + values.sum(axis=-1)

    def rows(self) -> Row:
        """What stays of all rows, in the order in which they came."""
        names = ("label", "top", "confidence", "energy", "entropy")
        return Row(*(np.concatenate([getattr(one, name) for one in self._kept]) for name in names))

    @property
    def kl_mean(self) -> float | None:
        """Mean KL of the rows that were given `against`, nats; None without any."""
        return float(self._sums["divergence"]) / self._compared if self._compared else None

    def result(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The teacher's part of a report without views and names, and why values are None, by name."""
        rows, missing = self.rows(), dict(self._missing)
        softness = [self._softness(at, missing) for at in range(len(TEMPERATURES))]
        found: dict[str, Any] = {"rows": self._rows, "labelled": self._labelled}
        known = rows.label >= 0
        is_vague = "softness[0].outside_top" in missing
        if is_vague:
            missing["ece"] = missing["reliability"] = missing["confidence"] = missing["softness[0].outside_top"]
        if self._labelled:
            found.update(self._against_labels(rows, known, missing, is_vague=is_vague))
        else:
            names = ("top1", "top5", "nll", "brier", "ece", "reliability", "classes", "confusions")
            found.update(dict.fromkeys((*names, "majority_share", "usual_class_share", "prior_nll")))
            missing.update(dict.fromkeys(names, NO_LABELS))
        found["confidence"] = None if is_vague else float(rows.confidence.mean(dtype=np.float64))
        found["confidence_histogram"] = None if is_vague else histogram(rows.confidence, 0.0, 1.0)
        found["entropy_histogram"] = None
        if len(rows.entropy):
            found["entropy_histogram"] = histogram(rows.entropy, 0.0, float(np.log(self._classes)))
        else:
            missing["entropy_histogram"] = missing["softness.entropy"]
        return {**found, "softness": softness}, missing

    def _softness(self, at: int, missing: dict[str, str]) -> dict[str, Any]:
        error = self._sums["error"][at] / self._rows
        found: dict[str, Any] = {"temperature": TEMPERATURES[at]}
        for what, count in (("entropy", self._rows), ("outside_label", self._labelled), ("outside_top", self._rows)):
            found[what] = float(self._sums[what][at]) / count if what in self._sums and count else None
        if found["entropy"] is None:
            missing["softness.entropy"] = "topk rows do not hold the logits of all classes"
        if found["outside_label"] is None:
            missing["softness.outside_label"] = NO_LABEL_LOGITS if self._labelled else NO_LABELS
        if error > TOLERANCE:
            found["outside_label"] = found["outside_top"] = None
            missing[f"softness[{at}].outside_top"] = (
                f"the tail at T = {TEMPERATURES[at]:g} was not stored, and is known to {error:.2g} on the mean only"
            )
        return found

    def _against_labels(
        self, rows: Row, known: np.ndarray, missing: dict[str, str], *, is_vague: bool
    ) -> dict[str, Any]:
        label, top, count = rows.label[known], rows.top[known], self._labelled
        right = label == top
        found: dict[str, Any] = {
            "top1": float(right.mean()),
            "top5": None if "top5" in missing else self._within / count,
            "nll": None if "log_label" not in self._sums else 0.0 - float(self._sums["log_label"]) / count,
            "brier": None if "brier" not in self._sums else float(self._sums["brier"]) / count,
        }
        if is_vague:
            found["nll"] = None
        if found["nll"] is None:
            missing["nll"] = missing.get("ece", NO_LABEL_LOGITS)
        if found["brier"] is None:
            missing["brier"] = "topk rows do not hold the logits of all classes"
        found["ece"], found["reliability"] = (None, None) if is_vague else _calibration(rows.confidence[known], right)
        of_label, of_top = (np.bincount(one, minlength=self._classes) for one in (label, rows.top))
        correct = np.bincount(label[right], minlength=self._classes)
        found["classes"] = [
            {
                "class": number,
                "rows": int(of_label[number]),
                "accuracy": float(correct[number] / of_label[number]) if of_label[number] else None,
                "predicted": float(of_top[number] / self._rows),
            }
            for number in range(self._classes)
        ]
        found["confusions"] = confusions(label, top, self._classes, by="teacher")
        found["usual_class_share"] = _usual_share(label, top, self._classes)
        prior = of_label[of_label > 0] / count
        found["majority_share"], found["prior_nll"] = float(prior.max()), float(-(prior * np.log(prior)).sum())
        return found


def histogram(values: np.ndarray, low: float, high: float, bars: int = BARS) -> dict[str, list[Any]]:
    """Counts of values in equal bars from low to high, those beyond in the outer bars.

    >>> histogram(np.array([0.1, 0.9, 1.0]), 0.0, 1.0, 2)
    {'edges': [0.0, 0.5, 1.0], 'counts': [1, 2]}
    """
    counts, edges = np.histogram(np.clip(values, low, high), bars, (low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _calibration(confidence: np.ndarray, right: np.ndarray) -> tuple[dict[str, float], list[dict[str, Any]]]:
    sure = confidence.astype(np.float64)
    width, mass = equal_width_bins(sure, right), equal_mass_bins(sure, right)
    columns = (width.edges[:-1], width.edges[1:], width.counts, width.confidence, width.accuracy)
    bins = [
        {
            "low": low,
            "high": high,
            "rows": count,
            "confidence": mean if count else None,
            "accuracy": share if count else None,
        }
        for low, high, count, mean, share in zip(*columns, strict=True)
    ]
    return {"equal_width": width.error, "equal_mass": mass.error}, bins


def _pairs(label: np.ndarray, top: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, teacher's class and rows of each pair that occurs."""
    pairs, counts = np.unique(label.astype(np.int64) * classes + top, return_counts=True)
    return pairs // classes, pairs % classes, counts


def confusions(label: np.ndarray, top: np.ndarray, classes: int, *, by: str) -> list[dict[str, int]]:
    """The pairs of different classes that are most frequent, at most 20, the most frequent first.

    Args:
        label: (N,) int64.
        top: (N,) int64, the class that is most likely instead.
        classes: C.
        by: teacher or student, whose class it is.
    """
    labels, tops, counts = _pairs(label, top, classes)
    largest = np.argsort(-counts, kind="stable")
    names = ("label", f"{by}_class", "rows")
    different = largest[(labels != tops)[largest]][:CONFUSIONS]
    return [
        dict(zip(names, map(int, one), strict=True))
        for one in zip(labels[different], tops[different], counts[different], strict=True)
    ]


def _usual_share(label: np.ndarray, top: np.ndarray, classes: int) -> float | None:
    """Share of rows that would be right if teacher's classes were labels in another order; None of too few rows.

    Each label takes the class that its rows mostly get, each class is taken once, by whom it gives most rows.
    """
    labels, tops, counts = _pairs(label, top, classes)
    of_label = np.bincount(label, minlength=classes)
    enough = of_label[labels] >= LEAST_ROWS
    labels, tops, counts = labels[enough], tops[enough], counts[enough]
    if not len(counts):
        return None
    order = np.argsort(counts, kind="stable")
    usual, most, best = (np.zeros(classes, np.int64) for _ in range(3))
    usual[labels[order]], most[labels[order]] = tops[order], counts[order]  # of each label the last one stays
    np.maximum.at(best, usual, most)
    return float(best.sum() / of_label[of_label >= LEAST_ROWS].sum())


def _is_sparse(rows: TeacherRows) -> bool:
    return isinstance(rows.encoding, TopK) and not rows.encoding.has_all_logits


def _pieces(rows: TeacherRows) -> list[slice]:
    width = rows.encoding.specs[0].row_shape[0] if _is_sparse(rows) else rows.num_classes
    step = max(1, _PIECE_VALUES // width)
    return [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def _logits(rows: TeacherRows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(N, C) float32 logits, a copy; relative to `row_max` (N,) where they are stored so."""
    if isinstance(rows.encoding, Dense) and rows.encoding.stored == "float16":
        return rows.arrays["logits"].float(), rows.arrays["row_max"]
    found: torch.Tensor = rows.dense()
    return (found.clone() if isinstance(rows.encoding, Dense) else found), None
