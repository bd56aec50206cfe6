"""The factored encoding: its arithmetic, the stated bound of its error, and what a header may say of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError, LogitsError, UsageError
from kdcache.format.encodings import encoding_from_json
from kdcache.format.factored import Factored
from kdcache.format.head import parse_head
from kdcache.format.known_heads import Head, announce_head, forget_heads, head_of, keep_head

SHA = "ab" * 32


@pytest.fixture(autouse=True)
def no_heads_stay() -> Iterator[None]:
    yield
    forget_heads()


def encoding(features: int, classes: int = 3, head: str = SHA) -> Factored:
    return Factored((classes,), features, head)


def known(weight: np.ndarray, bias: np.ndarray) -> None:
    forget_heads()
    keep_head(SHA, Head(weight.astype("<f4"), bias.astype("<f4")))


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (N, D) of any size and spread, weight (C, D) and bias (C,), float32."""
    rows, features, classes = (draw(st.integers(1, high)) for high in (5, 40, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 1.0, 10.0, 30.0]))
    sizes = np.exp2(draw(st.integers(-140, 90)) + spread * rng.standard_normal((rows, features)).clip(-1, 1))
    inputs = (rng.standard_normal((rows, features)) * sizes).astype("<f4")
    inputs[rng.random(inputs.shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    weight = (rng.standard_normal((classes, features)) * 10.0 ** draw(st.integers(-3, 3))).astype("<f4")
    return inputs, weight, rng.standard_normal(classes).astype("<f4")


@given(layers())
def test_the_error_of_decoded_logits_stays_below_the_stated_bound(
    layer: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    inputs, weight, bias = layer
    known(weight, bias)
    factored = encoding(inputs.shape[1], len(weight))
    arrays = factored.encode_features(inputs).arrays
    exact = inputs.astype(np.float64) @ weight.T.astype(np.float64) + bias
    bound = factored.error_bound(arrays)
    # What float32 cannot hold at all: products below its range, which it rounds to its least multiple.
    assert (np.abs(factored.decode(arrays) - exact) <= bound + 2.0**-149 * (inputs.shape[1] + 1)).all()
    simple = 16.1 * np.sqrt(inputs.shape[1]) * arrays["row_scale"].astype(np.float64)[:, None]
    lengths = np.linalg.norm(weight.astype(np.float64), axis=1)
    of_features = np.abs(factored.inputs(arrays).astype(np.float64) - inputs) @ np.abs(weight).T.astype(np.float64)
    assert (of_features <= simple * lengths + 1e-300).all()


@given(layers())
def test_scaling_alone_loses_nothing(layer: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    inputs = layer[0]
    arrays = encoding(inputs.shape[1]).encode_features(inputs).arrays
    scale = arrays["row_scale"]
    assert (np.frexp(scale)[0] == 0.5).all()
    assert np.isfinite(arrays["features"]).all()
    largest = np.abs(inputs).max(axis=1)
    normal = largest >= 2.0**-111
    top = np.abs(arrays["features"][normal].astype(np.float64)).max(axis=1)
    assert ((top >= 2.0**14) & (top <= 2.0**15)).all()


def test_inputs_at_the_ends_of_float32_do_not_overflow() -> None:
    inputs = np.array([[3.4e38, -1.0], [1e-45, 0.0], [0.0, 0.0], [65504.0, 1e-3]], np.float32)
    arrays = encoding(2).encode_features(inputs).arrays
    stored = encoding(2).inputs(arrays)
    assert np.allclose(stored[0], [3.4e38, 0], rtol=2**-11)
    assert (stored[1:3] == inputs[1:3]).all()
    assert arrays["row_scale"][2] == 1
    assert np.allclose(stored[3], [65504, 1e-3], rtol=2**-11)


def test_decoding_is_the_layer_and_rows_without_a_teacher_are_zero() -> None:
    weight, bias = np.array([[1.0, 2.0], [0.0, 1.0], [4.0, 0.0]]), np.array([0.5, 0.0, -1.0])
    known(weight, bias)
    arrays = encoding(2).encode_features(np.array([[1.0, 3.0], [2.0, 2.0]])).arrays
    assert encoding(2).decode(arrays).tolist() == [[7.5, 3.0, 3.0], [6.5, 2.0, 7.0]]
    assert encoding(2).top_class(arrays).tolist() == [0, 2]
    for array in arrays.values():
        array[1] = 0
    assert encoding(2).decode(arrays)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(LogitsError, match="position 1"):
        encoding(2).encode_features(np.array([[1.0, 2.0], [3.0, bad]]))


def test_features_of_another_width_or_type_are_refused() -> None:
    with pytest.raises(LogitsError, match=r"\(N, 2\)"):
        encoding(2).encode_features(np.zeros((1, 3)))
    with pytest.raises(LogitsError, match="int64"):
        encoding(2).encode_features(np.zeros((1, 2), np.int64))


def test_logits_alone_cannot_be_encoded() -> None:
    with pytest.raises(UsageError, match="--factored"):
        encoding(2).encode(np.zeros((1, 3), np.float32))


def test_rows_of_a_head_that_nobody_opened_do_not_decode() -> None:
    unknown = encoding(2, head="cd" * 32)
    arrays = unknown.encode_features(np.ones((1, 2))).arrays
    with pytest.raises(UsageError, match=r"kdcache\.open"):
        unknown.decode(arrays)


def test_of_several_places_a_sound_one_is_enough() -> None:
    from pathlib import Path

    def broken() -> Head:
        raise CorruptCacheError("damaged")

    announce_head("ef" * 32, Path("first"), broken)
    with pytest.raises(CorruptCacheError):
        head_of("ef" * 32)
    announce_head("ef" * 32, Path("second"), lambda: Head(np.ones((1, 1), "<f4"), np.ones(1, "<f4")))
    assert head_of("ef" * 32).bias.tolist() == [1]


def test_an_encoding_survives_its_json() -> None:
    assert encoding_from_json(encoding(7).to_json()) == encoding(7)
    assert encoding(7).to_json().keys() == {"name", "dtype", "shape", "features", "head"}


@pytest.mark.parametrize(
    "change",
    [
        {"features": 0},
        {"features": -1},
        {"features": True},
        {"features": 2.0},
        {"features": 2**40},
        {"features": None},
        {"head": "AB" * 32},
        {"head": "ab" * 31},
        {"head": None},
        {"head": "../" + "a" * 61},
        {"dtype": "float32"},
        {"dtype": ["float16"]},
        {"shape": [3, 4]},
        {"more": 1},
    ],
)
def test_what_no_writer_says_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        encoding_from_json({**encoding(7).to_json(), **change})


def head_json(**changes: Any) -> dict[str, Any]:
    arrays = {"weight": [1024, "<f4", [3, 2]], "bias": [2048, "<f4", [3]]}
    return {"size": 4096, "sha256": SHA, "arrays": arrays, **changes}


def test_a_head_is_read_back_as_it_was_written() -> None:
    record = parse_head(head_json(), encoding(2), where="here")
    assert record is not None
    assert record.to_json() == head_json()


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        head_json(more=1),
        head_json(size=0),
        head_json(size=True),
        head_json(size=100),
        head_json(sha256="cd" * 32),
        head_json(arrays=[]),
        head_json(arrays={"weight": [1024, "<f4", [3, 2]]}),
        head_json(arrays={"weight": [1024, "<f4", [2, 3]], "bias": [2048, "<f4", [3]]}),
        head_json(arrays={"weight": [1024, "<f8", [3, 2]], "bias": [2048, "<f4", [3]]}),
        head_json(arrays={"weight": [1024, "<f4", [3, 2]], "bias": [1030, "<f4", [3]]}),
        head_json(arrays={"weight": [-8, "<f4", [3, 2]], "bias": [2048, "<f4", [3]]}),
    ],
)
def test_a_head_that_is_not_that_of_the_rows_is_refused(value: Any) -> None:
    with pytest.raises(CorruptCacheError):
        parse_head(value, encoding(2), where="here")


def test_the_largest_float_stays_finite() -> None:
    largest = np.finfo(np.float32).max
    inputs = np.array([[largest, 0.0, -largest], [1.0, 2.0, 3.0]], np.float32)
    encoding = Factored((2,), 3, "0" * 64)
    arrays = encoding.encode_features(inputs).arrays
    decoded = encoding.inputs(arrays)
    assert np.isfinite(decoded).all()
    assert np.allclose(decoded, inputs, rtol=2**-10)
    assert encoding.flaw(arrays) is None
