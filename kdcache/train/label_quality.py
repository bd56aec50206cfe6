"""How well a teacher's rows support their labels: the confident learning of Northcutt et al. (2021), streamed.

    self-confidence      p(label)
    normalised margin    (p(label) - max of the others + 1) / 2
    threshold of class j mean self-confidence of the rows with label j, at least 2e-6
    guess of a row       the one class whose p reaches its threshold - 1e-6; of several, the most likely; of none, none
    issue                a row whose guess is not its label, nor p(label) within 1e-6 of the largest

The cache is read twice, since a threshold is known only behind the last row; what stays in memory is about 40 bytes a
row and never its probabilities. On the same probabilities all of it is what cleanlab 2.9 gives. NumPy alone: no torch
is loaded for it. The probabilities should be of a teacher that was not trained on these labels: one that was has
learnt the wrong ones too.

Source: Northcutt, Jiang, Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 2021
(arXiv:1911.00068), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.format.encoding import Encoding
from kdcache.format.topk import TopK
from kdcache.store.parts import Catalog, read_catalog
from kdcache.store.scan import scan
from kdcache.train.capability import Service, require

NO_LABEL, NO_GUESS = -1, -1
TOLERANCE = 1e-6
LEAST_THRESHOLD = 2 * TOLERANCE
LARGEST_JOINT = 1 << 27  # cells: of 11,585 classes, 1 GiB
_BLOCK_VALUES = 1 << 20


@dataclass(frozen=True, eq=False)
class LabelQuality:
    """Of the N rows of one view, in stored order.

    Attributes:
        sample_id: (N,) int64 or fixed-length bytes.
        label: (N,) int32, -1 where a row has none; its scores are NaN then.
        teacher_class: (N,) int32, the most likely class.
        teacher_confidence: (N,) float32, its probability.
        self_confidence: (N,) float32 in [0, 1], the probability of the label.
        margin: (N,) float32 in [0, 1], normalised as cleanlab does: 0.5 is a tie; NaN where `topk` rows with k = 1 do
            not hold the second largest.
        guess: (N,) int32, the class that the row confidently belongs to, -1 for none and for rows without a label.
        is_issue: (N,) bool.
        thresholds: (C,) float64; infinite for classes that no row is labelled with.
        view: which was read.
        undecided: rows whose guess might be another one if their `topk` row held more classes; 0 for other encodings.
    """

    sample_id: np.ndarray
    label: np.ndarray
    teacher_class: np.ndarray
    teacher_confidence: np.ndarray
    self_confidence: np.ndarray
    margin: np.ndarray
    guess: np.ndarray
    is_issue: np.ndarray
    thresholds: np.ndarray
    view: int
    undecided: int

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.thresholds)

    def joint(self) -> np.ndarray:
        """(C, C) int64 confident joint: rows with label i whose guess is j; not calibrated.

        As cleanlab with `calibrate=False`, but for its diagonal, which cleanlab makes 1 at least.

        Raises:
            UsageError: more classes than 11,585, of which it would take more than 1 GiB.
        """
        count = self.num_classes
        if count**2 > LARGEST_JOINT:
            raise UsageError(f"the confident joint of {count:,} classes has {count**2:,} cells; count pairs instead")
        is_counted = self.guess != NO_GUESS
        cells = self.label[is_counted].astype(np.int64) * count + self.guess[is_counted]
        return np.bincount(cells, minlength=count**2).reshape(count, count)


def label_quality(
    path: str | Path,
    *,
    view: int | None = None,
    temperature: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> LabelQuality:
    """Scores the labels of a cache by its teacher's rows.

    Args:
        path: of the cache.
        view: which; the first by default.
        temperature: T of softmax(z / T), above 0; 1, or the teacher's calibrated one. Of `topk` rows a stored one.
        progress: called with the number of rows after each block, of both passes.

    Raises:
        UsageError: a cache without labels, of one class, of mixed views, or of dense prediction; `topk` rows without
            the labels' logits or at a temperature that was not stored.
        DataError: no row has a label, or one has a label that is no class.
        MismatchError: no such view.
        CorruptCacheError, IncompleteCacheError, StorageError: of the cache.
    """
    catalog = read_catalog(Path(path))
    _check(catalog, Path(path).name, temperature)
    chosen = catalog.views[0] if view is None else view
    if chosen not in catalog.views:
        raise MismatchError(f"{Path(path).name} has the views {list(catalog.views)}, not {chosen}")
    if catalog.head is not None:
        catalog.head.keep()
    return _measured(catalog, chosen, temperature, progress, Path(path).name)


def _measured(
    catalog: Catalog, view: int, temperature: float, progress: Callable[[int], None] | None, name: str
) -> LabelQuality:
    rows, classes = catalog.samples, catalog.schema.encoding.num_classes
    sample_id = np.empty(rows, catalog.schema.id_dtype)
    label, teacher_class, guess = (np.full(rows, NO_LABEL, np.int32) for _ in range(3))
    confidence, own, margin = (np.full(rows, np.nan, np.float32) for _ in range(3))
    for at, block in _blocks(catalog, view, progress):
        found = _probabilities(catalog.schema.encoding, block, temperature)
        sample_id[at], label[at] = block["sample_id"], _checked_labels(block["label"], classes, name)
        teacher_class[at], confidence[at] = found.top_class, found.top
        mine, other = _against_others(found, label[at])
        own[at], margin[at] = mine, (mine - other + 1) / 2
    labelled = label != NO_LABEL
    if not labelled.any():
        raise DataError(f"no row of {name} (view {view}) has a label: there is nothing that a teacher could contradict")
    count = np.bincount(label[labelled], minlength=classes)
    total = np.bincount(label[labelled], weights=own[labelled], minlength=classes)
    mean = np.divide(total, count, out=np.full(classes, math.inf), where=count > 0)
    thresholds = np.maximum(mean, LEAST_THRESHOLD)
    undecided = 0
    for at, block in _blocks(catalog, view, progress):
        found = _probabilities(catalog.schema.encoding, block, temperature)
        known = labelled[at]
        guesses, unsure = _guesses(found, thresholds)
        undecided += int((unsure & known).sum())
        guess[at] = np.where(known, guesses, NO_GUESS)
    is_issue = (guess != NO_GUESS) & (guess != label) & (teacher_class != label)
    is_issue &= confidence > own + np.float32(TOLERANCE)
    return LabelQuality(
        sample_id, label, teacher_class, confidence, own, margin, guess, is_issue, thresholds, view, undecided
    )


def _check(catalog: Catalog, name: str, temperature: float) -> None:
    schema, encoding = catalog.schema, catalog.schema.encoding
    if not math.isfinite(temperature) or temperature <= 0:
        raise UsageError(f"temperature is {temperature!r:.80}, expected a finite number above 0")
    if len(encoding.row_shape) > 1:
        raise UsageError(
            f"{name} holds dense prediction, rows of shape {encoding.row_shape}: label maps are not stored"
        )
    if not schema.has_labels:
        raise UsageError(
            f"{name} holds no labels, so there is nothing that its teacher could contradict: make the cache from data "
            "with labels (kdcache precompute --data, kdcache import --labels)"
        )
    if encoding.num_classes < 2:
        raise UsageError(f"{name} is of one class: its softmax is always 1, and no label can be doubted")
    if schema.is_mixed:
        raise UsageError(
            f"{name} holds mixed views (MixUp, CutMix), whose rows have two labels: no class is the right one"
        )
    if require("nll", encoding, temperature) is Service.BOUNDED:
        assert isinstance(encoding, TopK)
        raise UsageError(
            f"{name} holds topk rows, whose probabilities are exact at the temperatures {list(encoding.temperatures)} "
            f"and only bounded at {temperature:g}: choose a stored one, or make the cache with --temperatures"
        )


def _blocks(
    catalog: Catalog, view: int, progress: Callable[[int], None] | None
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    encoding = catalog.schema.encoding
    width = encoding.k + 1 if isinstance(encoding, TopK) and not encoding.has_all_logits else encoding.num_classes
    step = max(1, _BLOCK_VALUES // width)
    for _, positions, block in scan(catalog, views=[view], block_bytes=step * catalog.schema.row_bytes):
        yield positions, block
        if progress is not None:
            progress(len(positions))


def _checked_labels(labels: np.ndarray, classes: int, name: str) -> np.ndarray:
    if labels.size and (int(labels.min()) < NO_LABEL or int(labels.max()) >= classes):
        raise DataError(f"labels of {name} run from {labels.min()} to {labels.max()}, expected -1 to {classes - 1}")
    return labels


@dataclass(frozen=True, eq=False)
class _Probabilities:
    """Of n rows: p (n, M), and of which class each column is; None where column j is class j.

    `rest` (n,) is the most that a class without a column can have, None where all have one. An empty slot has p = 0
    and class -2.
    """

    p: np.ndarray
    classes: np.ndarray | None
    rest: np.ndarray | None
    has_second: bool = True

    @property
    def top(self) -> np.ndarray:
        largest: np.ndarray = self.p.max(axis=1)
        return largest

    @property
    def top_class(self) -> np.ndarray:
        return self.class_of(self.p.argmax(axis=1))

    def class_of(self, column: np.ndarray) -> np.ndarray:
        if self.classes is None:
            return column
        own: np.ndarray = np.take_along_axis(self.classes, column[:, None], 1)[:, 0]
        return own

    def column_of(self, label: np.ndarray) -> np.ndarray:
        """0 for no label."""
        is_it = None if self.classes is None else self.classes == label[:, None]
        column: np.ndarray = np.maximum(label, 0) if is_it is None else is_it.argmax(axis=1)
        return column


def _probabilities(encoding: Encoding, block: dict[str, np.ndarray], temperature: float) -> _Probabilities:
    if isinstance(encoding, TopK) and not encoding.has_all_logits:
        return _of_topk(encoding, block, temperature)
    logits = encoding.decode({spec.name: block[spec.name] for spec in encoding.specs})
    with np.errstate(over="ignore"):
        p = logits - logits.max(axis=1, keepdims=True)
        if temperature != 1:
            p /= np.float32(temperature)
        np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    return _Probabilities(p, None, None)


def _of_topk(encoding: TopK, block: dict[str, np.ndarray], temperature: float) -> _Probabilities:
    """The kept classes and the label's, exact: the normaliser is they and the tail, which is stored."""
    classes = encoding.class_index(block).astype(np.int64)
    label = np.asarray(block["label"], np.int64)
    is_new = (label != NO_LABEL) & (classes != label[:, None]).all(axis=1)
    own = np.where(is_new, block["label_logits"][:, 0].astype(np.float64), -math.inf)
    scaled = np.concatenate([block["topk_logits"].astype(np.float64), own[:, None]], axis=1) / temperature
    tail = block["tail_logsumexp"][:, encoding.temperatures.index(temperature)].astype(np.float64)
    p = np.exp(scaled)  # relative to the largest, which is 0
    mass = np.exp(tail)
    normaliser = p.sum(axis=1) + mass
    p /= normaliser[:, None]
    rest = np.minimum(p[:, encoding.k - 1], mass / normaliser)
    labels = np.where(is_new, label, -2)[:, None]
    return _Probabilities(
        p.astype(np.float32), np.concatenate([classes, labels], axis=1), rest, has_second=encoding.k > 1
    )


def _against_others(found: _Probabilities, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) p(label), and the largest of the other classes; NaN without a label. Takes the label's out of `p`."""
    column = found.column_of(label)[:, None]
    own = np.take_along_axis(found.p, column, 1)[:, 0]
    is_top = found.top_class == label
    np.put_along_axis(found.p, column, -1, axis=1)
    other = found.p.max(axis=1)
    if not found.has_second:
        other = np.where(is_top, np.nan, other)
    unknown = label == NO_LABEL
    return np.where(unknown, np.nan, own), np.where(unknown, np.nan, other)


def _guesses(found: _Probabilities, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the confident class of each row or -1, and whether a class without a column might change that."""
    needed = thresholds - TOLERANCE
    if found.classes is None:
        limit: Any = needed
    else:
        limit = np.where(found.classes < 0, math.inf, needed[np.maximum(found.classes, 0)])
    is_confident = found.p >= limit
    count = is_confident.sum(axis=1)
    top = found.p.argmax(axis=1)
    column = np.where(count > 1, top, is_confident.argmax(axis=1))
    guess = np.where(count > 0, found.class_of(column), NO_GUESS)
    if found.rest is None or found.classes is None:
        return guess, np.zeros(len(guess), bool)
    # With another confident class beside it the most likely one would be taken, which has a column.
    may_change = (count == 0) | ((count == 1) & (column != top))
    lowest = np.argsort(needed)[: found.classes.shape[1] + 1]  # one of so many is not among the kept
    is_kept = (found.classes[:, None, :] == lowest[:, None]).any(axis=2)
    easiest = np.where(is_kept, math.inf, needed[lowest]).min(axis=1)
    return guess, may_change & (found.rest >= easiest)
