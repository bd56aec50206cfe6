"""What arrays must be to pass as logits, labels and ids, and what becomes of probabilities."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kdcache.errors import DataError, LogitsError
from kdcache.stages.import_arrays import (
    as_logits,
    check_arrays,
    looks_like_log_probabilities,
    looks_like_probabilities,
)
from kdcache.store.foreign import ForeignArray

RAW = np.random.default_rng(0).normal(size=(40, 5)) * 3


def softmax(values: np.ndarray) -> np.ndarray:
    """Over axis 1."""
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def array(name: str, shape: tuple[int, ...], dtype: str) -> ForeignArray:
    return ForeignArray(name, shape, np.dtype(dtype))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("trailing", [(), (3, 2)])
def test_each_kind_is_told_from_the_others(dtype: str, trailing: tuple[int, ...]) -> None:
    raw = np.random.default_rng(1).normal(size=(40, 5, *trailing)).astype(dtype)
    shares = softmax(raw.astype(np.float64)).astype(dtype)
    logarithms = np.log(softmax(raw.astype(np.float64))).astype(dtype)
    assert [looks_like_probabilities(values) for values in (raw, shares, logarithms)] == [False, True, False]
    assert [looks_like_log_probabilities(values) for values in (raw, shares, logarithms)] == [False, False, True]


def test_one_row_that_does_not_sum_to_one_is_enough_for_logits() -> None:
    shares = softmax(RAW)
    shares[39] *= 0.5
    assert not looks_like_probabilities(shares)


def test_a_single_class_never_looks_like_probabilities() -> None:
    assert not looks_like_probabilities(np.ones((4, 1)))
    assert not looks_like_log_probabilities(np.zeros((4, 1)))


def test_float16_probabilities_of_fifty_thousand_classes_still_look_like_probabilities() -> None:
    raw = np.random.default_rng(2).normal(size=(20, 50_000)) * 2
    assert looks_like_probabilities(softmax(raw).astype(np.float16))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_logarithm_of_probabilities_gives_them_back_at_any_temperature(temperature: float) -> None:
    logits = as_logits(softmax(RAW), "probabilities", where="", first=0)
    np.testing.assert_allclose(softmax(logits / temperature), softmax(RAW / temperature), rtol=1e-12)


def test_a_probability_of_zero_becomes_the_logarithm_of_the_smallest_normal_float32() -> None:
    logits = as_logits(np.array([[1.0, 0.0]], np.float32), "probabilities", where="", first=0)
    np.testing.assert_allclose(logits, [[0, -87.3365]], atol=1e-4)


@pytest.mark.parametrize("kind", [None, "logits"])
def test_logits_stay_as_they_are_with_classes_that_are_masked(kind: str | None) -> None:
    masked = RAW.copy()
    masked[3, 1] = -np.inf
    assert as_logits(masked, kind, where="", first=0) is masked


def test_log_probabilities_stay_as_they_are() -> None:
    values = np.log(softmax(RAW))
    assert as_logits(values, "log-probabilities", where="", first=0) is values


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [None, "logits", "log-probabilities", "probabilities"])
def test_nan_and_infinity_are_refused_with_the_number_of_the_row(bad: float, kind: str | None) -> None:
    values = softmax(RAW)
    values[7, 2] = bad
    with pytest.raises(LogitsError, match=r"theirs: row 1007 holds NaN, \+inf or -inf alone"):
        as_logits(values, kind, where="theirs", first=1000)


def test_a_signalling_nan_is_refused_without_a_warning() -> None:
    values = RAW.astype(np.float32)
    values.view(np.uint32)[7, 2] = 0x7FA00000
    with pytest.raises(LogitsError, match="row 7 holds NaN"):
        as_logits(values, None, where="theirs", first=0)


@pytest.mark.parametrize("bad", [[-0.1, 1.1, 0, 0, 0], [2, 0, 0, 0, 0], [0.1] * 5, [-np.inf, 1, 0, 0, 0]])
def test_rows_that_are_no_probabilities_are_refused_with_their_number(bad: list[float]) -> None:
    values = softmax(RAW)
    values[7] = bad
    with pytest.raises(LogitsError, match="theirs: row 1007: not in"):
        as_logits(values, "probabilities", where="theirs", first=1000)


@pytest.mark.parametrize("bad", [[0, 0, 0, 0, 0], [5, -9, -9, -9, -9], [1000, 0, 0, 0, 0]])
def test_rows_that_are_no_log_probabilities_are_refused_with_their_number(bad: list[float]) -> None:
    values = np.log(softmax(RAW))
    values[7] = bad
    with pytest.raises(LogitsError, match="theirs: row 1007: the exponentials do not sum to 1"):
        as_logits(values, "log-probabilities", where="theirs", first=1000)


def test_probabilities_of_one_class_are_refused_with_the_formula() -> None:
    with pytest.raises(LogitsError, match=re.escape("log(p / (1 - p))")):
        as_logits(np.full((3, 1), 0.5), "probabilities", where="theirs", first=0)


REFUSED = {
    "integers": ({"logits": ((9, 3), "<i4")}, "logits z holds int32; expected float16"),
    "flags": ({"logits": ((9, 3), "|b1")}, "logits z holds bool"),
    "text": ({"logits": ((9, 3), "|S4")}, "logits z holds text"),
    "one number": ({"logits": ((), "<f4")}, r"has shape \(\); expected"),
    "one logit a row": ({"logits": ((9,), "<f4")}, r"save one logit a row as \(N, 1\)"),
    "six dimensions": ({"logits": ((9, 3, 2, 2, 2, 2), "<f4")}, "expected"),
    "no rows": ({"logits": ((0, 3), "<f4")}, "at least one row and one class"),
    "no classes": ({"logits": ((9, 0), "<f4")}, "at least one row and one class"),
    "labels of floats": ({"labels": ((9,), "<f4")}, "holds float32; expected integers; round them"),
    "labels of flags": ({"labels": ((9,), "|b1")}, "holds bool; expected integers"),
    "labels of text": ({"labels": ((9,), "|S4")}, r"holds \|S4; expected integers"),
    "one-hot labels": ({"labels": ((9, 3), "<i4")}, "as one-hot labels do; save their argmax"),
    "labels in a column": ({"labels": ((9, 1), "<i4")}, r"has shape \(9, 1\).*expected \(9,\)"),
    "fewer labels": ({"labels": ((8,), "<i4")}, r"has shape \(8,\), and z has 9 rows"),
    "ids of floats": ({"ids": ((9,), "<f8")}, "expected integers or text; round them"),
    "ids in two columns": ({"ids": ((9, 2), "|S4")}, r"expected \(9,\)"),
    "more ids": ({"ids": ((10,), "<i8")}, "and z has 9 rows"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_import_is_refused_of(what: str) -> None:
    changed, message = REFUSED[what]
    arrays = {"logits": array("z", (9, 3), "<f4"), "labels": array("y", (9,), "<i8"), "ids": array("i", (9,), "|S7")}
    check_arrays("theirs.npz", arrays)  # as they are, they pass
    arrays |= {role: array({"logits": "z", "labels": "y", "ids": "i"}[role], *of) for role, of in changed.items()}
    with pytest.raises(DataError, match=message):
        check_arrays("theirs.npz", arrays)
