"""The tail at any temperature against a sum over its classes in float64.

Stored float32 values are rounded to 6e-8 of the exponents they are made of; the bounds carry 8 times that, so the true
value must lie between them without further allowance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topk_rows import rows_of, true_tail

from kdcache.errors import UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.kept import kept
from kdcache.train.tail import DEFAULT_TAIL_TOLERANCE, check_width, mass_error, tail_logsumexp

TEMPERATURES = [0.01, 0.3, 0.7, 1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 5.5, 20.0, 1000.0]


@st.composite
def drawn_rows(draw: st.DrawFn) -> tuple[TeacherRows, np.ndarray]:
    """Rows of 2 to 40 classes, with ties, masked classes and logits up to 1e30, and their logits."""
    classes = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = (rng.standard_normal((4, classes)) * draw(st.sampled_from([0.0, 0.01, 1, 5, 1e4, 1e30]))).astype("f4")
    if draw(st.booleans()):
        logits = np.round(logits, -int(math.log10(np.abs(logits).max() + 1e-9)))  # ties
    logits += np.float32(draw(st.sampled_from([0, 100, -1e4])))
    logits[rng.random(logits.shape) < draw(st.sampled_from([0, 0.3, 0.9]))] = -math.inf
    logits[:, rng.integers(classes)] = 1.0
    labels = draw(st.integers(0, 2))
    k = draw(st.sampled_from([1, 2, min(5, classes), classes]))
    stored = draw(st.sampled_from([(1.0,), (1.0, 2.0, 4.0), (2.0, 2.0001, "z2"), ("z2",), (0.01, 1e6)]))
    drawn = [rng.integers(-1, classes, 4) for _ in range(labels)]
    return rows_of(logits, k=k, temperatures=stored, labels=drawn), logits


@settings(max_examples=300, deadline=None)
@given(drawn_rows(), st.sampled_from([*TEMPERATURES, "z2"]))
def test_the_true_value_lies_between_the_bounds(drawn: tuple[TeacherRows, np.ndarray], temperature: Any) -> None:
    rows, logits = drawn
    slots = kept(rows)
    found = tail_logsumexp(rows, temperature, slots=slots, dtype=torch.float64)
    expected = true_tail(rows, logits, temperature)
    is_empty = np.isneginf(expected)
    assert (torch.isneginf(found.middle).numpy() == is_empty).all()
    middle, expected = found.middle.numpy()[~is_empty], expected[~is_empty]
    if found.half_width is None:  # as stored
        allowed = 5e-7 * (1 + np.abs(expected) + math.log(logits.shape[1]))
    else:
        allowed = found.half_width.numpy()[~is_empty]
        assert (found.half_width.numpy()[is_empty] == 0).all()
    assert (np.abs(middle - expected) <= allowed).all(), (middle - expected, allowed)


@pytest.mark.parametrize("temperature", [1.0, 2.0, "z2"])
def test_a_stored_temperature_gives_the_stored_value(temperature: Any) -> None:
    logits = np.random.default_rng(0).standard_normal((5, 30)).astype("f4")
    rows = rows_of(logits, k=3, temperatures=(1.0, 2.0, "z2"))
    found = tail_logsumexp(rows, temperature)
    column = (1.0, 2.0, "z2").index(temperature)
    assert found.half_width is None
    assert torch.equal(found.middle, rows.arrays["tail_logsumexp"][:, column])


def test_the_rows_own_temperatures_give_what_z2_gives() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 30)).astype("f4")
    rows = rows_of(logits, k=3, temperatures=(1.0, "z2"))
    found = tail_logsumexp(rows, 2 * rows.arrays["logit_std"], dtype=torch.float64)
    stored = tail_logsumexp(rows, "z2", dtype=torch.float64)
    torch.testing.assert_close(found.middle, stored.middle, rtol=1e-6, atol=1e-6)
    assert found.half_width is not None
    assert float(found.half_width.max()) < 1e-5


def test_positions_of_dense_prediction_are_rows_of_their_own() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 9, 3, 4)).astype("f4")
    rows = rows_of(logits, k=3, temperatures=(1.0, 4.0, "z2"))
    flat = rows_of(np.moveaxis(logits, 1, -1).reshape(-1, 9), k=3, temperatures=(1.0, 4.0, "z2"))
    for temperature in (1.0, 2.0, "z2"):
        found, expected = tail_logsumexp(rows, temperature), tail_logsumexp(flat, temperature)
        torch.testing.assert_close(found.middle.reshape(-1), expected.middle)
        if expected.half_width is not None:
            assert found.half_width is not None
            torch.testing.assert_close(found.half_width.reshape(-1), expected.half_width)


def test_more_stored_temperatures_leave_less_open() -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((50, 200)).astype("f4")
    widths = []
    for stored in [(1.0,), (1.0, 4.0), (1.0, 2.0, 4.0), (1.0, 2.0, 2.9, 3.1, 4.0)]:
        half = tail_logsumexp(rows_of(logits, k=5, temperatures=stored), 3.0).half_width
        assert half is not None
        widths.append(float(half.mean()))
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.1 * widths[1]


def test_the_largest_slope_allows_for_the_rounding_of_the_smallest_kept_logit() -> None:
    """-1.0006 is stored as -1.00098, and the class of the tail has it as well: its slope lies above what is stored."""
    logits = np.array([[0, -1.0006, -1.0006]], "f4")
    rows = rows_of(logits, k=2, temperatures=(1.0,))
    found = tail_logsumexp(rows, 0.1, dtype=torch.float64)
    assert found.half_width is not None
    assert abs(float(found.middle) - float(true_tail(rows, logits, 0.1)[0])) <= float(found.half_width)


def error_at(temperature: float, rows: TeacherRows) -> torch.Tensor:
    slots = kept(rows)
    tail = tail_logsumexp(rows, temperature, slots=slots)
    return mass_error(tail, (slots.logits / temperature).logsumexp(1))


def test_what_is_too_vague_is_refused_with_the_stored_temperatures() -> None:
    rows = rows_of(3 * np.random.default_rng(0).standard_normal((50, 200)).astype("f4"), k=1, temperatures=(1.0, 4.0))
    error = error_at(2.0, rows)
    options: dict[str, Any] = {"encoding": rows.encoding, "temperature": 2.0}
    with pytest.raises(UsageError, match=r"temperature 2\.0 was not stored \(stored: 1, 4\).*--tail-tolerance"):
        check_width(error, None, tolerance=DEFAULT_TAIL_TOLERANCE, **options)
    check_width(error, None, tolerance=0.5, **options)
    check_width(error, torch.zeros(50, dtype=torch.bool), tolerance=0.0, **options)
    with pytest.raises(UsageError, match="tail tolerance is nan"):
        check_width(error, None, tolerance=math.nan, **options)


def test_a_temperature_far_from_the_stored_ones_is_fine_where_the_tail_weighs_nothing() -> None:
    logits = np.random.default_rng(0).standard_normal((8, 100)).astype("f4")
    logits[:, 0] = 60
    assert float(error_at(1.7, rows_of(logits, k=1, temperatures=(1.0, 4.0))).max()) < 1e-6


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, "z3", None])
def test_what_is_no_temperature_is_refused(temperature: Any) -> None:
    rows = rows_of(np.eye(3, dtype="f4"), k=1)
    with pytest.raises(UsageError, match="temperature is"):
        tail_logsumexp(rows, temperature)


def test_rows_of_another_encoding_are_refused() -> None:
    with pytest.raises(UsageError, match="encoded as dense, expected topk"):
        tail_logsumexp(TeacherRows.from_dense(torch.eye(3)), 1.0)
