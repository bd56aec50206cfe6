"""How good a teacher's probabilities are, measured over blocks of rows: NLL, Brier score, calibration errors, accuracy.

    NLL    mean of -log p_y, nats
    Brier  mean over rows of sum over classes of (p_c - [c = y])**2, from 0 to 2: of two classes twice what a score of
           the second class alone gives
    ECE    sum over bins of (rows in the bin / rows) * |accuracy - mean confidence|, confidence = the largest p_c

Equal-width bins are [b / B, (b + 1) / B), and a confidence of exactly 1.0 belongs to the last one. Equal-mass bins end
at the quantiles b / B of the confidences (linear interpolation), and equal confidences share a bin, so that no order
of rows matters and a bin may be empty. The top class is the first of equals.

What is done to all classes is in float32, sums over rows in float64. One row takes 9 bytes until the end, since
quantiles need all confidences: a million rows 9 MB.

Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv:1706.04599).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.calibrated import Calibration
from kdcache.train.capability import Service, service
from kdcache.train.sparse_metrics import Measured, confidence, label_log_prob, top_class

BINS = 15
TOP = 5
# Mean error, of nats and of a probability, up to which topk rows tell at a temperature that they do not store.
TOLERANCE = 0.01
_CACHED_VALUES = 1 << 17  # logits that are gone over while they are in a processor's cache


@final
@dataclass(frozen=True)
class Bins:
    """Rows by confidence, for a calibration error and a reliability diagram.

    Attributes:
        edges: (B + 1,) ascending.
        counts: (B,) rows.
        confidence: (B,) mean, 0 of an empty bin.
        accuracy: (B,) share of rows whose top class is the label, 0 of an empty bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def error(self) -> float:
        """The expected calibration error, 0 to 1."""
        total = sum(self.counts)
        parts = zip(self.counts, self.confidence, self.accuracy, strict=True)
        return sum(count * abs(right - sure) for count, sure, right in parts) / total if total else 0.0


@final
@dataclass(frozen=True)
class CalibrationReport:
    """What `CalibrationMetrics` found; None where the rows cannot tell, and then `missing` says why.

    Attributes:
        rows: labelled rows (positions of dense prediction).
        nll: nats; inf where a label has probability 0.
        brier: 0 to 2.
        ece: with equal-width bins.
        ece_equal_mass: with equal-mass bins.
        top1: accuracy, the share of rows whose top class is the label.
        top5: share of rows whose label is among the 5 largest.
        confidence: mean.
        equal_width: the bins.
        equal_mass: the bins.
        missing: name -> why it is None.
        errors: `nll` (nats) and `confidence`: the mean by which values of `topk` rows may be off; empty if exact.
    """

    rows: int
    nll: float | None
    brier: float | None
    ece: float | None
    ece_equal_mass: float | None
    top1: float
    top5: float | None
    confidence: float | None
    equal_width: Bins | None
    equal_mass: Bins | None
    missing: dict[str, str]
    errors: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The numbers, without the bins."""
        names = ("rows", "nll", "ece", "brier", "ece_equal_mass", "top1", "top5", "confidence")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**found, "missing": self.missing, **({"errors": self.errors} if self.errors else {})}


@final
class CalibrationMetrics:
    """Gathers blocks of rows; `result` may be asked for at any time.

    Args:
        calibration: done to the logits first; a number is a temperature.
        bins: B, of both kinds.

    >>> metrics = CalibrationMetrics(2.0)
    >>> metrics.add(TeacherRows.from_dense(torch.tensor([[2.0, 0.0], [2.0, 0.0]])), torch.tensor([0, 1]))
    >>> round(metrics.result().ece, 4)  # sure to 0.7311, right in 0.5
    0.2311
    """

    def __init__(self, calibration: Calibration | float = 1.0, *, bins: int = BINS) -> None:
        if bins < 1:
            raise UsageError(f"bins must be at least 1, found {bins}")
        self._calibration = calibration if isinstance(calibration, Calibration) else Calibration(float(calibration))
        self._bins = bins
        self._rows, self._top1, self._top5 = 0, 0, 0
        self._nll, self._brier = 0.0, 0.0
        self._nll_error, self._confidence_error = 0.0, 0.0
        self._sure: list[np.ndarray] = []
        self._right: list[np.ndarray] = []
        self._missing: dict[str, str] = {}

    def add(self, rows: TeacherRows, labels: Tensor | None = None) -> None:
        """Counts the rows of a block that have a label.

        Args:
            rows: N rows of any encoding.
            labels: (N, ...) int64, -1 = none; by default `clean_labels` of the rows.

        Raises:
            UsageError: no labels, or a calibration that these rows cannot serve.
            MismatchError: labels of another shape; `topk` rows that do not keep the logit of a label.
            DataError: labels beyond the last class, or one class only.
        """
        if rows.num_classes < 2:
            raise DataError("the teacher has one class, and softmax over one class is always 1: nothing to measure")
        given = rows.tensors()
        known = check_labels(given, clean_labels(given) if labels is None else labels)
        if isinstance(given.encoding, TopK) and not given.encoding.has_all_logits:
            chosen = np.flatnonzero((known >= 0).cpu().numpy())
            if len(chosen):
                self._add_topk(
                    self._calibration.rows(given.take(chosen)), known[torch.from_numpy(chosen).to(known.device)]
                )
            return
        logits = self._calibration.logits(given.dense())
        classes_last = logits.movedim(1, -1).reshape(-1, rows.num_classes)
        flat = known.reshape(-1)
        if not bool((flat >= 0).all()):
            classes_last, flat = classes_last[flat >= 0], flat[flat >= 0]
        step = max(1, _CACHED_VALUES // rows.num_classes)
        for start in range(0, len(flat), step):
            self._add_dense(classes_last[start : start + step], flat[start : start + step])

    def _add_dense(self, logits: Tensor, labels: Tensor) -> None:
        """Logits (M, C) with a label each. What is done to all classes is in float32, what is left of a row in float64.

        With the mean over rows the rounding is below 1e-7, at a third of the time.
        """
        top = logits.amax(dim=1, keepdim=True)
        own = logits.gather(1, labels[:, None])
        rank = ranks(logits, own, labels)
        if logits.shape[1] > TOP:
            self._top5 += int((rank < TOP).sum())
        else:
            self._missing["top5"] = f"there are {logits.shape[1]} classes"
        p = (logits - top).exp_()
        total = p.sum(dim=1).double()
        log_own = (own.double() - top.double()).squeeze(1) - total.log()
        squares = torch.linalg.vector_norm(p, dim=1).double().square() / total.square()
        self._nll -= float(log_own.sum())
        self._brier += float((squares - 2 * log_own.exp() + 1).sum())
        self._count(1 / total, rank == 0)

    def _add_topk(self, rows: TeacherRows, labels: Tensor) -> None:
        encoding = rows.encoding
        assert isinstance(encoding, TopK)
        self._missing["brier"] = "topk rows do not hold the logits of all classes"
        if service("nll", encoding) is Service.NO:
            self._missing["nll"] = "these topk rows were made without labels, whose logits they would keep"
        else:
            found = label_log_prob(rows, 1.0, labels=labels)
            self._nll -= float(found.value.sum())
            self._nll_error += _total_error(found)
        is_top = rows.arrays["topk_classes"][:, :TOP].long() == labels[:, None]
        if min(encoding.k, encoding.num_classes - 1) < TOP:
            self._missing["top5"] = f"the rows keep {encoding.k} of {encoding.num_classes} classes"
        else:
            self._top5 += int(is_top.any(dim=1).sum())
        sure = confidence(rows, 1.0)
        self._confidence_error += _total_error(sure)
        self._count(sure.value, top_class(rows) == labels)

    def _count(self, sure: Tensor, right: Tensor) -> None:
        self._rows += len(sure)
        self._top1 += int(right.sum())
        self._sure.append(sure.double().cpu().numpy())
        self._right.append(right.cpu().numpy())

    def result(self) -> CalibrationReport:
        """Everything counted so far.

        Raises:
            DataError: no labelled row.
        """
        if not self._rows:
            raise DataError("no row has a label (or all are mixtures of two): calibration is measured against labels")
        count, missing = self._rows, dict(self._missing)
        errors = {"nll": self._nll_error / count, "confidence": self._confidence_error / count}
        vague = {name for name, error in errors.items() if not error <= TOLERANCE}
        for name in vague:
            why = f"the tail at this temperature was not stored, and is known to {errors[name]:.2g} on the mean only"
            missing.update(
                {one: why for one in (["nll"] if name == "nll" else ["ece", "ece_equal_mass", "confidence"])}
            )
        sure = np.concatenate(self._sure)
        right = np.concatenate(self._right)
        width = mass = None
        if "ece" not in missing:
            width, mass = equal_width_bins(sure, right, self._bins), equal_mass_bins(sure, right, self._bins)
        return CalibrationReport(
            rows=count,
            nll=None if "nll" in missing else self._nll / count,
            brier=None if "brier" in missing else self._brier / count,
            ece=None if width is None else width.error,
            ece_equal_mass=None if mass is None else mass.error,
            top1=self._top1 / count,
            top5=None if "top5" in missing else self._top5 / count,
            confidence=None if width is None else float(sure.mean()),
            equal_width=width,
            equal_mass=mass,
            missing=missing,
            errors={name: error for name, error in errors.items() if error and name not in vague},
        )


def equal_width_bins(sure: np.ndarray, right: np.ndarray, bins: int = BINS) -> Bins:
    """Bins [b / B, (b + 1) / B), the last one with 1.0.

    Args:
        sure: (N,) confidences, 0 to 1.
        right: (N,) bool.
        bins: B.
    """
    edges = np.linspace(0, 1, bins + 1)
    return _binned(sure, right, edges, np.clip(np.searchsorted(edges, sure, side="right") - 1, 0, bins - 1))


def equal_mass_bins(sure: np.ndarray, right: np.ndarray, bins: int = BINS) -> Bins:
    """Bins that end at the quantiles b / B; equal confidences share one.

    Args:
        sure: (N,) confidences, 0 to 1, at least one.
        right: (N,) bool.
        bins: B.
    """
    edges = np.quantile(sure, np.linspace(0, 1, bins + 1))
    return _binned(sure, right, edges, np.searchsorted(edges[1:-1], sure, side="left"))


def ranks(logits: Tensor, own: Tensor, labels: Tensor) -> Tensor:
    """(N,) float, how many classes come before the label: larger ones, and equal ones with a smaller number.

    Neither argmax nor topk of torch promise which of equal logits comes first. The sign of the difference tells larger
    from equal in four cheap passes; comparisons, whose sums torch adds up as integers, take five times as long.

    Args:
        logits: (N, C).
        own: (N, 1) the label's.
        labels: (N,) int64; -1 counts as if no class were equal.
    """
    sign = (logits - own).sign_()
    if bool(torch.isinf(own).any()):
        sign.nan_to_num_(0.0)  # -inf less -inf: a label that is masked like others
    unequal = torch.linalg.vector_norm(sign, 1, dim=1)
    found: Tensor = (sign.sum(dim=1) + unequal) / 2
    # Who is behind the five largest anyway needs no order among equals.
    tied = torch.nonzero((unequal < logits.shape[1] - 1) & (found < TOP) & (labels >= 0)).flatten()
    if len(tied):
        before = torch.arange(logits.shape[1], device=logits.device) < labels[tied, None]
        found[tied] += ((logits[tied] == own[tied]) & before).sum(dim=1)
    return found


def clean_labels(rows: TeacherRows) -> Tensor:
    """(N,) int64 labels that say what the input is: -1 where there is none, no teacher, or a mixture of two samples.

    Raises:
        UsageError: the rows have no labels at all.
    """
    if rows.label is None:
        raise UsageError("these rows have no labels (the dump saw none), and calibration is measured against labels")
    given = rows.tensors()
    labels, counts = given.label, given.has_teacher
    assert labels is not None
    if given.label_b is not None:
        assert given.mix_ratio is not None
        counts = counts & ((given.label_b < 0) | (given.label_b == labels) | (given.mix_ratio >= 1))
    found: Tensor = torch.where(counts, labels, -1)
    return found


def check_labels(rows: TeacherRows, labels: Tensor) -> Tensor:
    """The labels, checked against the rows.

    Raises:
        MismatchError: another shape.
        DataError: beyond the last class.
    """
    expected = (len(rows), *rows.encoding.row_shape[1:])
    if tuple(labels.shape) != expected:
        raise MismatchError(f"labels have shape {tuple(labels.shape)}, expected {expected} beside these rows")
    if labels.numel() and int(labels.max()) >= rows.num_classes:
        raise DataError(f"a label is {int(labels.max())}, and the last class is {rows.num_classes - 1}")
    return labels.long()


def _binned(sure: np.ndarray, right: np.ndarray, edges: np.ndarray, places: np.ndarray) -> Bins:
    bins = len(edges) - 1
    counts = np.bincount(places, minlength=bins)
    shares = [np.bincount(places, values, bins) / np.maximum(counts, 1) for values in (sure, right.astype(np.float64))]
    return Bins(tuple(edges.tolist()), tuple(counts.tolist()), *(tuple(share.tolist()) for share in shares))


def _total_error(found: Measured) -> float:
    return 0.0 if found.error is None else float(found.error.sum())
