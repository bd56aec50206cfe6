"""What `topk` rows leave out: captured mass, and the share of the whole KL that the kept classes and their bucket hold.

The share is that of KL(teacher || uniform): what a student that knows nothing has to learn. The part that is missing
is the shape of the teacher's distribution over the classes that were not kept; its entropy follows from the slope of
the tail's logsumexp in 1/T, which is convex, so that the stored temperatures bound it from both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.format.ranking import largest_classes
from kdcache.format.topk import Z2, TopK
from kdcache.store.cache import Cache
from kdcache.store.rows import TeacherRows

SAMPLE_ROWS = 1024
POOR_SHARE = 0.9


@dataclass(frozen=True)
class Captured:
    """Of some rows, at one temperature.

    Attributes:
        temperature: T, of the softmax.
        mass: mean probability of the kept classes.
        kl_share: mean bucketed KL over mean KL to the uniform distribution, (least, most) that it can be.
    """

    temperature: float
    mass: float
    kl_share: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"temperature": self.temperature, "mass": self.mass, "kl_share": list(self.kl_share)}


def captured(cache: Cache) -> list[Captured]:
    """Of up to 1,024 rows, at each stored temperature; empty where all logits are kept.

    Raises:
        CorruptCacheError, IncompleteCacheError: of a row or its shard.
    """
    encoding = cache.encoding
    if not isinstance(encoding, TopK) or encoding.has_all_logits:
        return []
    return of_rows(sampled_rows(cache))


def sampled_rows(cache: Cache) -> TeacherRows:
    """Up to 1,024 rows of a cache at even distances.

    Raises:
        CorruptCacheError, IncompleteCacheError: of a row or its shard.
    """
    places = np.linspace(0, len(cache) - 1, min(SAMPLE_ROWS, len(cache))).astype(np.int64)
    return cache.gather(places)


def of_rows(rows: TeacherRows) -> list[Captured]:
    """Of NumPy rows of the encoding `topk`, at each stored temperature but `z2`."""
    encoding = rows.encoding
    assert isinstance(encoding, TopK)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _of_kept(rows, encoding)


def _of_kept(rows: TeacherRows, encoding: TopK) -> list[Captured]:
    kept, count = _kept_logits(rows, encoding)
    tail_classes = encoding.num_classes - count
    betas = [0.0, *(1 / t for t in reversed(encoding.temperatures) if isinstance(t, float))]
    stored = rows.arrays["tail_logsumexp"].astype(np.float64)
    at = [stored[:, place] for place, t in enumerate(encoding.temperatures) if t != Z2]
    with np.errstate(divide="ignore"):
        f = [np.log(tail_classes), *reversed(at)]
    slopes = _slopes(f, betas, rows, kept)
    found = []
    for place in range(len(betas) - 1, 0, -1):
        mass, share = _at(kept, f[place], betas[place], slopes[place], tail_classes, encoding.num_classes)
        if math.isfinite(mass + sum(share)):  # nothing is said of rows that no writer stores; `verify` names them
            found.append(Captured(1 / betas[place], mass, share))
    return found


def of_logits(encoding: TopK, logits: np.ndarray, labels: np.ndarray | None) -> list[Captured]:
    """Of raw logits (N, C, ...) before they are encoded, exactly: least and most are equal.

    Args:
        encoding: what they would be stored as.
        logits: floats.
        labels: (N, L) int64 with -1 for none, whose logits are kept as well; None for none.
    """
    logits = logits.astype(np.float32, copy=False)
    is_kept = np.zeros(logits.shape, bool)
    np.put_along_axis(is_kept, largest_classes(logits, encoding.k), True, axis=1)
    for label in () if labels is None else labels.T:
        at = np.flatnonzero(label >= 0)
        is_kept[at, label[at]] = True
    found = []
    for temperature in (t for t in encoding.temperatures if isinstance(t, float)):
        scaled = logits.astype(np.float64) / temperature
        top = scaled.max(axis=1, keepdims=True)
        log_p = scaled - top - np.log(np.exp(scaled - top).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        with np.errstate(divide="ignore", invalid="ignore"):
            each = np.where(p > 0, p * (log_p + math.log(encoding.num_classes)), 0)
            tail, left = (p * ~is_kept).sum(axis=1), (~is_kept).sum(axis=1)
            bucket = np.where(tail > 0, tail * np.log(tail * encoding.num_classes / left), 0)
        whole = float(each.sum(axis=1).mean())
        share = float(((each * is_kept).sum(axis=1) + bucket).mean()) / whole if whole > 0 else 1.0
        found.append(Captured(temperature, float((p * is_kept).sum(axis=1).mean()), (share, share)))
    return found


def _kept_logits(rows: TeacherRows, encoding: TopK) -> tuple[np.ndarray, np.ndarray]:
    """(N, K + L, ...) float64 kept logits relative to `row_max`, -inf where a slot is empty, and (N, ...) how many."""
    pieces = [rows.arrays["topk_logits"].astype(np.float64)]
    classes = rows.arrays["topk_classes"].astype(np.int64)
    count = np.full(classes[:, 0].shape, encoding.k)
    seen = classes
    for column, labels in enumerate((rows.label, rows.label_b)[: encoding.labels]):
        label = np.asarray(labels)
        is_new = (label >= 0) & (seen != label[:, None]).all(axis=1)
        pieces.append(np.where(is_new, rows.arrays["label_logits"][:, column], -math.inf)[:, None])
        seen = np.concatenate([seen, label[:, None]], axis=1)
        count = count + is_new
    return np.concatenate(pieces, axis=1), count


def _slopes(
    f: list[np.ndarray], betas: list[float], rows: TeacherRows, kept: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Bounds of the tail's mean logit at each 1/T: the chords on both sides, the mean at 0, the least kept logit."""
    mean = rows.arrays["tail_mean"].astype(np.float64)
    first = rows.arrays["topk_logits"][:, -1].astype(np.float64)
    with np.errstate(invalid="ignore"):
        chords = [(f[i + 1] - f[i]) / (betas[i + 1] - betas[i]) for i in range(len(f) - 1)]
    low = [np.where(np.isfinite(mean), mean, -math.inf), *chords]
    high = [*chords, first]
    return [(np.minimum(a, b), np.minimum(b, first)) for a, b in zip(low, high, strict=True)]


def _at(
    kept: np.ndarray,
    tail: np.ndarray,
    beta: float,
    slope: tuple[np.ndarray, np.ndarray],
    tail_classes: np.ndarray,
    classes: int,
) -> tuple[float, tuple[float, float]]:
    """Mean captured mass, and least and most share of the KL, at 1/T = beta."""
    top = np.logaddexp(np.log(np.exp(beta * kept).sum(axis=1)), tail)
    log_p = beta * kept - top[:, None]
    p = np.exp(log_p)
    log_p_tail = tail - top
    p_tail = np.exp(log_p_tail)
    with np.errstate(divide="ignore", invalid="ignore"):
        bucketed = np.where(p > 0, p * (log_p + math.log(classes)), 0).sum(axis=1)
        bucketed += np.where(p_tail > 0, p_tail * (log_p_tail + math.log(classes) - np.log(tail_classes)), 0)
        # Within the tail: log n - entropy = log n - f(beta) + beta f'(beta), which is at least 0.
        missing = [p_tail * np.maximum(np.log(tail_classes) - tail + beta * s, 0) for s in slope]
        less, more = (np.where(p_tail > 0, value, 0).mean() for value in missing)
    whole = bucketed.mean()
    shares = (float(whole / (whole + more)), float(whole / (whole + less))) if whole > 0 else (1.0, 1.0)
    return float(p.sum(axis=1).mean()), shares
