"""Fits a calibration of a teacher to labels, by the negative log-likelihood (NLL) of rows it should not have seen.

    temperature  z / T                 1 number        convex in 1 / T: safeguarded Newton steps
    bias         z / T + b_c           C + 1 numbers   L-BFGS from the temperature's optimum
    vector       z / T * s_c + b_c     2 C numbers     likewise, T as found for the temperature alone

A temperature cannot be over-fitted by much and never changes the top class; the other two can do both. They carry a
ridge, (sum of b_c**2 [+ sum of (s_c - 1)**2]) / (2 N): without it the bias of a class without a label in N rows would
go to minus infinity. T lies in [0.05, 100]; labels that the teacher gets all right drive it to the lower bound, labels
that it gets worse than chance to the upper one, and the fit says so.

Everything is deterministic: float64, the full batch, no random start.

Source: Guo et al. 2017 (arXiv:1706.04599) for temperature and vector scaling, Alexandari et al. 2020 (arXiv:1901.06852)
for the bias beside the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from kdcache.errors import DataError, UsageError
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.calibrated import Calibration
from kdcache.train.calibration_metrics import TOLERANCE, check_labels, clean_labels
from kdcache.train.capability import require
from kdcache.train.sparse_metrics import label_log_prob

METHODS = ("temperature", "bias", "vector")
LEAST, LARGEST = 0.05, 100.0
_RELATIVE = 1e-9  # of 1 / T, a thousandth of what is promised
_STEPS = 200
_GRID = 49  # temperatures of topk rows that are looked at first, 17 % apart
_BLOCK_VALUES = 1 << 21  # logits that are worked on at a time, in float64


@final
@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        calibration: minimises the NLL.
        nll: of the rows that it was fitted to, nats, without the ridge.
        rows: how many these were.
        bound: "lower" or "upper" where the temperature is one of its bounds, else None.
    """

    calibration: Calibration
    nll: float
    rows: int
    bound: str | None = None


def fit(rows: TeacherRows, method: str = "temperature", *, labels: Tensor | None = None) -> Fit:
    """Fits a calibration to all rows that have a label.

    Args:
        rows: N rows of any encoding, (N, C); `topk` rows take a temperature alone.
        method: one of `METHODS`.
        labels: (N,) int64, -1 = none; by default `clean_labels` of the rows.

    Raises:
        UsageError: a method that is not known, or that the rows cannot serve; dense prediction; no labels.
        DataError: no labelled row, labels of a single class, or of a class that the teacher rules out (-inf).
        MismatchError: labels of another shape, or whose logits `topk` rows do not keep.

    >>> logits = torch.tensor([[4.0, 0.0]] * 4)  # sure to 0.98, right in 3 of 4
    >>> found = fit(TeacherRows.from_dense(logits), labels=torch.tensor([0, 0, 0, 1]))
    >>> round(found.calibration.temperature, 4), round(4 / math.log(3), 4)
    (3.641, 3.641)
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r:.80} is not known; choose one of {', '.join(METHODS)}")
    if len(rows.encoding.row_shape) != 1 or rows.num_classes < 2:
        raise UsageError(
            f"calibration is fitted to rows (N, C) of two classes or more, found {rows.encoding.row_shape} a row"
        )
    given = rows.tensors()
    known = check_labels(given, clean_labels(given) if labels is None else labels)
    chosen = torch.nonzero(known >= 0).squeeze(1)
    _check_classes(known[chosen])
    given, known = given.take(chosen.numpy()), known[chosen]
    if isinstance(given.encoding, TopK) and not given.encoding.has_all_logits:
        if method != "temperature":
            require("entropy", given)  # what needs all logits
        require("nll", given)
        return _fit_topk(given, known)
    batch = _Batch(given, known)
    start = _fit_temperature(batch)
    return start if method == "temperature" else _fit_classes(batch, start, with_scale=method == "vector")


def _check_classes(labels: Tensor) -> None:
    if not len(labels):
        raise DataError("no row has a label (or all are mixtures of two): a calibration is fitted to labels")
    first = int(labels[0])
    if bool((labels == first).all()):
        raise DataError(f"all {len(labels)} labels are class {first}: a calibration needs rows of two classes or more")


class _Batch:
    """Labelled rows with all logits, of which blocks (n, C) float64 are looked at; raw, since `vector` sees a shift."""

    def __init__(self, rows: TeacherRows, labels: Tensor) -> None:
        self._rows, self._labels = rows, labels
        self.classes = rows.num_classes
        self._step = max(1, _BLOCK_VALUES // self.classes)
        ruled_out = sum(int(torch.isneginf(own).sum()) for _, _, own, _ in self.blocks())
        if ruled_out:
            raise DataError(
                f"{ruled_out} rows have a label to which the teacher gives probability 0 (a masked class, -inf), and "
                "no calibration changes that: correct the labels, or leave these rows out"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def blocks(self) -> Any:
        """(logits with 0 for -inf, where they are -inf or None, the label's logit (n,), labels (n,)) of each block."""
        for start in range(0, len(self), self._step):
            part = slice(start, start + self._step)
            logits, labels = self._rows.take(part).dense().double(), self._labels[part]
            own = logits.gather(1, labels[:, None]).squeeze(1)
            masked = torch.isneginf(logits)
            yield (logits.masked_fill(masked, 0), masked, own, labels) if masked.any() else (logits, None, own, labels)

    def at(self, beta: float) -> tuple[float, float, float]:
        """Mean NLL at 1 / T = beta, and its first and second derivative: E_p[z] - z_y and Var_p[z]."""
        sums = torch.zeros(3, dtype=torch.float64)
        for logits, masked, own, _ in self.blocks():
            scaled = logits * beta if masked is None else (logits * beta).masked_fill(masked, -math.inf)
            normaliser = scaled.logsumexp(dim=1)
            p = (scaled - normaliser[:, None]).exp()
            mean = (p * logits).sum(dim=1)
            spread = (p * (logits - mean[:, None]).square()).sum(dim=1)
            sums += torch.stack([(normaliser - beta * own).sum(), (mean - own).sum(), spread.sum()])
        value, slope, curvature = (sums / len(self)).tolist()
        return value, slope, curvature

    def with_classes(self, beta: float, scale: Tensor, bias: Tensor) -> tuple[float, float, Tensor, Tensor]:
        """Mean NLL of beta * z * scale + bias, and its derivatives by beta, by the scale (C,) and by the bias (C,)."""
        value, by_beta = 0.0, 0.0
        by_scale, by_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        for logits, masked, _, labels in self.blocks():
            made = logits * (beta * scale) + bias
            if masked is not None:
                made = made.masked_fill(masked, -math.inf)
            log_p = made.log_softmax(dim=1)
            value -= float(log_p.gather(1, labels[:, None]).sum())
            slope = log_p.exp()
            slope.scatter_add_(1, labels[:, None], torch.full_like(slope[:, :1], -1))
            by_bias += slope.sum(dim=0)
            of_class = (slope * logits).sum(dim=0)
            by_scale += of_class * beta
            by_beta += float((of_class * scale).sum())
        return value / len(self), by_beta / len(self), by_scale / len(self), by_bias / len(self)


def _fit_temperature(batch: _Batch) -> Fit:
    """The root of the slope, which grows with beta: Newton where it stays between the two ends, else halving."""
    low, high = 1 / LARGEST, 1 / LEAST
    for beta, sign, name in ((high, 1, "lower"), (low, -1, "upper")):
        value, slope, _ = batch.at(beta)
        if slope * sign <= 0:
            return Fit(Calibration(LEAST if name == "lower" else LARGEST), value, len(batch), name)
    beta = 1.0
    for _ in range(_STEPS):
        value, slope, curvature = batch.at(beta)
        low, high = (beta, high) if slope < 0 else (low, beta)
        following = beta - slope / curvature if curvature > 0 else math.inf
        if not low < following < high:
            following = math.sqrt(low * high)
        done = abs(following - beta) <= _RELATIVE * beta or high - low <= _RELATIVE * beta
        beta = following
        if done:
            break
    return Fit(Calibration(1 / beta), batch.at(beta)[0], len(batch))


def _fit_classes(batch: _Batch, start: Fit, *, with_scale: bool) -> Fit:
    """L-BFGS over (log beta, bias), or over (scale, bias) at the temperature found, from where that one ended."""
    classes = batch.classes
    first = 1 / start.calibration.temperature
    parameters = torch.zeros(classes * 2 if with_scale else classes + 1, dtype=torch.float64, requires_grad=True)

    def parts() -> tuple[float, Tensor, Tensor]:
        moved = parameters.detach()
        bias = moved[-classes:]
        if with_scale:
            return first, 1 + moved[:classes], bias
        beta = min(max(first * math.exp(float(moved[0].clamp(-9, 9))), 1 / LARGEST), 1 / LEAST)
        return beta, torch.ones(classes, dtype=torch.float64), bias

    def closure() -> Tensor:
        beta, scale, bias = parts()
        value, by_beta, by_scale, by_bias = batch.with_classes(beta, scale, bias)
        is_inside = 1 / LARGEST < beta < 1 / LEAST
        head = by_scale if with_scale else torch.tensor([by_beta * beta if is_inside else 0.0], dtype=torch.float64)
        slope = torch.cat([head, by_bias])
        ridged = parameters.detach().clone()
        if not with_scale:
            ridged[0] = 0
        parameters.grad = slope + ridged / len(batch)
        return torch.tensor(value + float(ridged.square().sum()) / (2 * len(batch)), dtype=torch.float64)

    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=_STEPS,
        max_eval=2 * _STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    beta, scale, bias = parts()
    value = batch.with_classes(beta, scale, bias)[0]
    temperature = start.calibration.temperature if with_scale else 1 / beta
    found = Calibration(temperature, tuple(scale.tolist()) if with_scale else None, tuple(bias.tolist()))
    return Fit(found, value, len(batch), _bound_of(temperature))


def _fit_topk(rows: TeacherRows, labels: Tensor) -> Fit:
    """A grid, then golden section: between stored temperatures the tail is the middle of two bounds, with kinks."""

    def at(temperature: float) -> tuple[float, float]:
        found = label_log_prob(rows, temperature, labels=labels)
        error = 0.0 if found.error is None else float(found.error.mean())
        return -float(found.value.mean()), error

    grid = torch.logspace(math.log10(LEAST), math.log10(LARGEST), _GRID, dtype=torch.float64).tolist()
    encoding = rows.encoding
    assert isinstance(encoding, TopK)
    grid = sorted({*grid, *(t for t in encoding.temperatures if isinstance(t, float) and LEAST <= t <= LARGEST)})
    known = [(t, *at(t)) for t in grid]
    trusted = [(nll, t) for t, nll, error in known if error <= TOLERANCE]
    if not trusted:
        raise UsageError(
            f"at no temperature from {LEAST:g} to {LARGEST:g} do these topk rows tell the NLL to {TOLERANCE:g} nats: "
            "make the cache again with more --temperatures, or calibrate a cache with all logits"
        )
    best = min(trusted)[1]
    place = grid.index(best)
    low, high = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    temperature, nll = _golden(lambda t: at(t)[0], low, high)
    if nll > min(trusted)[0]:
        temperature, nll = best, min(trusted)[0]
    if at(temperature)[1] > TOLERANCE:
        raise UsageError(
            f"the best temperature lies near {temperature:.3g}, where these topk rows tell the NLL to "
            f"{at(temperature)[1]:.2g} nats only (stored temperatures: {encoding.temperatures}): make the cache again "
            f"with --temperatures that have {temperature:.2g}, or calibrate a cache with all logits"
        )
    bound = _bound_of(temperature)
    return Fit(Calibration(temperature), nll, len(rows), bound)


def _golden(function: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """(where, value) of a minimum between two temperatures, to 1e-7 of it."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    at_c, at_d = function(math.exp(c)), function(math.exp(d))
    while b - a > 1e-7:
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - ratio * (b - a)
            at_c = function(math.exp(c))
        else:
            a, c, at_c = c, d, at_d
            d = a + ratio * (b - a)
            at_d = function(math.exp(d))
    ends: Sequence[tuple[float, float]] = [(function(t), t) for t in (low, high, math.exp((a + b) / 2))]
    value, temperature = min(ends)
    return temperature, value


def _bound_of(temperature: float) -> str | None:
    if temperature <= LEAST * (1 + 1e-6):
        return "lower"
    return "upper" if temperature >= LARGEST * (1 - 1e-6) else None
