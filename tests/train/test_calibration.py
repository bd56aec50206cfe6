"""Fits of a temperature, a bias and a scale to labels: optima, bounds, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_rows import rows_of

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.calibrated import Calibration
from kdcache.train.calibration import LARGEST, LEAST, fit
from kdcache.train.calibration_metrics import CalibrationMetrics

ROWS, CLASSES = 3000, 6
GENERATOR = torch.Generator().manual_seed(0)
TRUE = torch.randn(ROWS, CLASSES, generator=GENERATOR) * 2
BIAS = torch.linspace(-1, 1, CLASSES)
LABELS = torch.multinomial(TRUE.softmax(1), 1, generator=GENERATOR).squeeze(1)
SKEWED = torch.multinomial((TRUE + BIAS).softmax(1), 1, generator=GENERATOR).squeeze(1)


def rows(logits: torch.Tensor) -> TeacherRows:
    return TeacherRows.from_dense(logits)


def nll(logits: torch.Tensor, labels: torch.Tensor, calibration: Calibration | float) -> float:
    metrics = CalibrationMetrics(calibration)
    metrics.add(rows(logits), labels)
    found = metrics.result().nll
    assert found is not None
    return found


@pytest.mark.parametrize("factor", [0.3, 1.0, 5.0])
def test_the_temperature_that_the_labels_were_drawn_with_is_found(factor: float) -> None:
    found = fit(rows(TRUE * factor), labels=LABELS)
    assert found.calibration.temperature == pytest.approx(factor, rel=0.05)
    assert found.bound is None
    assert found.nll == pytest.approx(nll(TRUE * factor, LABELS, found.calibration), abs=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.2, 20))
def test_no_temperature_nearby_is_better_and_the_slope_is_0(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 4, generator=generator) * factor
    labels = torch.where(
        torch.rand(60, generator=generator) < 0.6, logits.argmax(1), torch.randint(0, 4, (60,), generator=generator)
    )
    if len(labels.unique()) < 2:
        return
    found = fit(rows(logits), labels=labels)
    temperature = found.calibration.temperature
    assert LEAST <= temperature <= LARGEST
    if found.bound is None:
        beta = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
        torch.nn.functional.cross_entropy(logits.double() * beta, labels).backward()
        assert beta.grad is not None
        assert abs(float(beta.grad)) < 1e-6 * max(1.0, factor**2)
    best = min(nll(logits, labels, t) for t in np.geomspace(LEAST, LARGEST, 60))
    assert found.nll <= best + 1e-6


def test_a_teacher_that_is_always_right_drives_the_temperature_to_its_lower_bound_and_one_always_wrong_up() -> None:
    right, wrong = (fit(rows(TRUE), labels=labels) for labels in (TRUE.argmax(1), TRUE.argmin(1)))
    assert (right.calibration.temperature, right.bound) == (LEAST, "lower")
    assert (wrong.calibration.temperature, wrong.bound) == (LARGEST, "upper")
    assert fit(rows(TRUE), "bias", labels=TRUE.argmax(1)).bound == "lower"


@pytest.mark.parametrize("method", ["bias", "vector"])
def test_more_numbers_fit_better_and_stand_at_the_optimum_of_their_ridged_likelihood(method: str) -> None:
    logits = TRUE * 3
    start, found = fit(rows(logits), labels=SKEWED), fit(rows(logits), method, labels=SKEWED)
    assert found.nll < start.nll - 0.05
    assert found.nll == pytest.approx(nll(logits, SKEWED, found.calibration), abs=1e-6)
    assert found.calibration.bias is not None
    spread = torch.tensor(found.calibration.bias)
    torch.testing.assert_close(spread - spread.mean(), BIAS, atol=0.25, rtol=0)

    beta = torch.tensor(1 / found.calibration.temperature, dtype=torch.float64, requires_grad=method == "bias")
    bias = torch.tensor(found.calibration.bias, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(found.calibration.scale or [1.0] * CLASSES, dtype=torch.float64, requires_grad=True)
    value = torch.nn.functional.cross_entropy(logits.double() * beta * scale + bias, SKEWED)
    (value + (bias.square().sum() + (scale - 1).square().sum()) / (2 * ROWS)).backward()
    for leaf in (beta, bias) if method == "bias" else (bias, scale):
        assert leaf.grad is not None
        assert float(leaf.grad.abs().max()) < 1e-6


def test_a_class_without_a_label_keeps_a_finite_bias() -> None:
    labels = torch.where(SKEWED == 0, 1, SKEWED)
    for method in ("bias", "vector"):
        found = fit(rows(TRUE), method, labels=labels)
        assert found.calibration.bias is not None
        assert -12 < found.calibration.bias[0] < -2


@pytest.mark.parametrize("method", ["temperature", "bias", "vector"])
def test_the_same_rows_give_the_same_numbers_and_masked_classes_are_no_trouble(method: str) -> None:
    logits = TRUE.clone()
    logits[:, 5] = torch.where(LABELS == 5, logits[:, 5], -math.inf)
    first, second = (fit(rows(logits), method, labels=LABELS) for _ in range(2))
    assert first == second
    assert math.isfinite(first.nll)


def test_topk_rows_give_the_temperature_of_the_dense_ones() -> None:
    logits = (TRUE * 3).numpy()
    exact = fit(rows(TRUE * 3), labels=LABELS)
    stored = tuple(sorted({1.0, 2.0, 4.0, exact.calibration.temperature}))
    found = fit(rows_of(logits, k=4, temperatures=stored, labels=[LABELS.numpy()]))
    assert found.calibration.temperature == pytest.approx(exact.calibration.temperature, rel=0.05)
    with pytest.raises(UsageError, match="logits of all classes"):
        fit(rows_of(logits, k=4, labels=[LABELS.numpy()]), "bias")
    with pytest.raises(UsageError, match="no label"):
        fit(rows_of(logits, k=4), labels=LABELS)
    with pytest.raises(UsageError, match="--temperatures"):
        fit(rows_of(logits, k=1, temperatures=(1.0,), labels=[LABELS.numpy()]))
    every = fit(rows_of(logits, k=CLASSES, temperatures=(1.0,), labels=[LABELS.numpy()]), "vector")
    assert every.calibration.scale is not None


def test_what_cannot_be_fitted_is_refused() -> None:
    for labels, message in ((torch.full((ROWS,), -1), "no row has a label"), (torch.zeros(ROWS).long(), "are class 0")):
        with pytest.raises(DataError, match=message):
            fit(rows(TRUE), labels=labels)
    with pytest.raises(UsageError, match="is not known"):
        fit(rows(TRUE), "matrix", labels=LABELS)
    with pytest.raises(UsageError, match="no labels"):
        fit(rows(TRUE))
    with pytest.raises(UsageError, match=r"rows \(N, C\)"):
        fit(rows(TRUE[:, :, None]), labels=LABELS[:, None])
    with pytest.raises(MismatchError, match="shape"):
        fit(rows(TRUE), labels=LABELS[:5])
    with pytest.raises(DataError, match="probability 0"):
        fit(rows(torch.where(torch.arange(CLASSES) == 2, -math.inf, TRUE)), labels=LABELS)
