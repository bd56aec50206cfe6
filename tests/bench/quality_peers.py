"""What others store of a row, made from the descriptions of their formats: the other side of `quality.py`.

Only the payload counts, as for ours: no id, no seed of an augmentation, no transform, no checksum. Where a description
leaves something open it is read in the format's favour, and the function says so. None stores what other temperatures
need, so that at T other than 1 a row says what its owner would make of it, softmax(log q / T) where nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

BUDGET, RECOMMENDED = (0.0, 1.0, 0.5), (0.0, 1.0, 2.0, 3.0, 4.0, 0.5)  # powers of the rank


@dataclass(frozen=True, eq=False)
class Said:
    """What one format stores of N rows, and what can be read from it.

    Attributes:
        name: of the format.
        k: classes kept; None for all.
        row_bytes: of the payload.
        log_probs: (N, C) float64 log-probabilities at a temperature; -inf where the row says that it is impossible.
        ours: whether this is an encoding of kdcache.
        note: to be printed beside it.
    """

    name: str
    k: int | None
    row_bytes: int
    log_probs: Callable[[float], np.ndarray]
    ours: bool = False
    note: str = ""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) float64; -inf stays -inf."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    total: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return total


def plain_float16(logits: np.ndarray) -> Said:
    """Logits cast to float16: what `logits.half()` saves."""
    return Said("plain float16", None, 2 * logits.shape[1], _tempered(logits.astype("<f2").astype(np.float64)))


def renormalised(logits: np.ndarray, k: int) -> Said:
    """The k largest logits in float16 and their classes, softmax over these: all others are taken to be impossible."""
    top = _largest(logits, k)
    values = np.full(logits.shape, -math.inf)
    np.put_along_axis(values, top, np.take_along_axis(logits, top, 1).astype("<f2").astype(np.float64), axis=1)
    return Said("renormalised top-k", k, k * (2 + _class_bytes(logits)), _tempered(values))


def tinyvit(logits: np.ndarray, k: int) -> Said:
    """TinyViT: k probabilities in float16 and their classes; the rest of the mass in equal shares over all others.

    Classes are counted with 4 bytes above 65,536 (theirs are int16, which wraps above 32,767).
    """
    return _smoothed("TinyViT-like", logits, k, "<f2", least_rest=2.0**-12)


def datadr(logits: np.ndarray, k: int) -> Said:
    """Data set reinforcement (DataDR): the same with probabilities in float32, of which gzip saves next to nothing."""
    return _smoothed("DataDR-like", logits, k, "<f4", least_rest=2.0**-25)


def distillkit(logits: np.ndarray, k: int, *, exact: int, powers: tuple[float, ...], name: str) -> Said:
    """DistillKit: k log-probabilities in order, the first few as they are, the others a curve over their ranks.

    The curve is the least-squares polynomial, its terms in float32; classes are packed into ceil(log2 C) bits. Exact
    values are in float16, which is finer here than the bfloat16 of its recommended settings. At T the rest of the mass
    is raised to the power 1 / T as one bucket, as its loss does ("symmetric uniform").
    """
    classes = logits.shape[1]
    top = _largest(logits, k)
    values = np.take_along_axis(log_softmax(logits), top, axis=1)
    ranks = np.arange(1, k - exact + 1, dtype=np.float64)
    basis = np.stack([ranks**power for power in powers], axis=1)
    terms = np.linalg.lstsq(basis, values[:, exact:].T, rcond=None)[0].astype("<f4").astype(np.float64)
    said = np.concatenate([values[:, :exact].astype("<f2").astype(np.float64), (basis @ terms).T], axis=1)
    row_bytes = math.ceil(k * math.ceil(math.log2(classes)) / 8) + 2 * exact + 4 * len(powers)
    rest = np.log(np.maximum(1 - np.exp(said).sum(axis=1, keepdims=True), 2.0**-12))

    def log_probs(temperature: float) -> np.ndarray:
        share = rest / temperature - math.log(max(classes - k, 1))  # of a class of the bucket
        full = np.broadcast_to(share, logits.shape).copy()
        np.put_along_axis(full, top, said / temperature, axis=1)
        return log_softmax(full)

    return Said(name, k, row_bytes, log_probs)


def peers(logits: np.ndarray, sizes: Iterable[int]) -> Iterator[Said]:
    """Every format of others, those that keep k classes with each of `sizes` that is below C."""
    classes = logits.shape[1]
    yield plain_float16(logits)
    for k in sorted(set(sizes)):
        if k >= classes:
            continue
        yield renormalised(logits, k)
        yield tinyvit(logits, k)
        yield datadr(logits, k)
    for k, exact, powers, name in (
        (50, 1, BUDGET, "DistillKit-like, budget"),
        (128, 16, RECOMMENDED, "DistillKit-like, recommended"),
    ):
        kept = min(k, classes)
        if kept - exact > len(powers):
            yield distillkit(logits, kept, exact=exact, powers=powers, name=name)


def _smoothed(name: str, logits: np.ndarray, k: int, dtype: str, *, least_rest: float) -> Said:
    """Probabilities at T = 1, the rest spread evenly.

    Rounding can make the kept ones sum up to 1 or more, and then the rest is 0 or negative in the original. Here it is
    half a rounding step of a probability near 1 at least, and no kept one is below half the least float16, so that no
    KL is infinite.
    """
    classes = logits.shape[1]
    top = _largest(logits, k)
    kept = np.exp(np.take_along_axis(log_softmax(logits), top, axis=1)).astype(dtype).astype(np.float64)
    rest = np.maximum(1 - kept.sum(axis=1, keepdims=True), least_rest)
    values = np.broadcast_to(np.log(rest / (classes - k)), logits.shape).copy()
    np.put_along_axis(values, top, np.log(np.maximum(kept, 2.0**-25)), axis=1)
    return Said(name, k, k * (np.dtype(dtype).itemsize + _class_bytes(logits)), _tempered(values))


def _tempered(values: np.ndarray) -> Callable[[float], np.ndarray]:
    return lambda temperature: log_softmax(values / temperature)


def _largest(logits: np.ndarray, k: int) -> np.ndarray:
    """(N, k) the classes of the largest logits, the largest first."""
    found: np.ndarray = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return found


def _class_bytes(logits: np.ndarray) -> int:
    return 2 if logits.shape[1] <= 1 << 16 else 4
