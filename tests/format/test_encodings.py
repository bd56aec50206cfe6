"""The dense encoding against its float64 twin: what is kept, what is clamped, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache.errors import LogitsError, UsageError
from kdcache.format.dense import Dense
from kdcache.format.encoding import Encoding, bad_rows, holds_nan
from kdcache.format.encodings import encoding_from_json

HALF = Dense((5,), "float16")
FULL = Dense((5,), "float32")


def encode_twin(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16 rows in float64 arithmetic, one row at a time: (logits - max rounded once, max)."""
    tops = [row.max(axis=0) for row in logits.astype(np.float64)]
    shifted = [
        np.where(np.isfinite(row), np.maximum(row - top, -65504.0), row)
        for row, top in zip(logits.astype(np.float64), tops, strict=True)
    ]
    return np.array(shifted).astype(np.float16), np.array(tops, np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def kl(exact: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """KL(softmax(exact) || softmax(stored)) of each row in float64."""
    p, q = softmax(exact.astype(np.float64)), softmax(stored.astype(np.float64))
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


@pytest.mark.parametrize("shape", [(64, 5), (64, 1), (8, 5, 3), (8, 5, 3, 2), (1, 1000)])
def test_float16_rows_are_those_of_the_float64_twin(shape: tuple[int, ...]) -> None:
    # Multiples of 1/64 below 64: the float32 difference is exact, so both sides round once and are equal.
    logits = np.random.default_rng(0).integers(-4096, 4096, shape).astype(np.float32) / 64
    encoded = Dense(shape[1:], "float16").encode(logits)
    shifted, tops = encode_twin(logits)
    np.testing.assert_array_equal(encoded.arrays["logits"], shifted)
    np.testing.assert_array_equal(encoded.arrays["row_max"], tops)
    assert encoded.arrays["logits"].dtype == np.dtype("<f2")
    assert encoded.arrays["row_max"].shape == (shape[0], *shape[2:])


def test_the_row_maximum_apart_keeps_the_kl_of_float16_below_a_millionth() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (400, 1000)).astype(np.float32) + 12
    encoding = Dense((1000,), "float16")
    stored = encoding.decode(encoding.encode(logits).arrays)
    apart = kl(logits, stored).mean()
    assert apart <= 1e-6
    assert apart < kl(logits, logits.astype(np.float16).astype(np.float32)).mean() / 2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_masked_classes_stay_masked(dtype: str) -> None:
    logits = np.array([[-np.inf, 1, 2, -np.inf, 0], [3, -np.inf, -np.inf, -np.inf, -np.inf]], np.float32)
    encoding = Dense((5,), dtype)
    encoded = encoding.encode(logits)
    np.testing.assert_array_equal(encoding.decode(encoded.arrays), logits)
    assert encoded.clamped.sum() == 0


@pytest.mark.parametrize("encoding", [HALF, FULL])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [[0, np.nan, 0, 0, 0], [0, np.inf, 0, 0, 0], [-np.inf] * 5])
def test_what_cannot_be_stored_is_refused_with_its_position(
    encoding: Encoding, dtype: type, value: list[float]
) -> None:
    logits = np.zeros((7, 5), dtype)
    logits[4] = value
    assert bad_rows(logits).tolist() == [4]
    with pytest.raises(LogitsError, match="first at position 4"):
        encoding.encode(logits)


def test_one_bad_position_of_a_dense_prediction_makes_the_row_bad() -> None:
    logits = np.zeros((3, 2, 4, 4), np.float32)
    logits[1, :, 3, 3] = -np.inf
    assert bad_rows(logits).tolist() == [1]


@pytest.mark.parametrize("shape", [(5,), (5, 2, 2)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_stored_row_of_minus_infinity_alone_is_a_flaw(dtype: str, shape: tuple[int, ...]) -> None:
    encoding = Dense(shape, dtype)
    arrays = encoding.encode(np.zeros((4, *shape), np.float32)).arrays
    arrays["logits"][1, :3] = -np.inf
    assert encoding.flaw(arrays) is None
    arrays["logits"][2, :, ...] = -np.inf
    assert encoding.flaw(arrays) == "a row holds -inf alone"


def test_values_far_below_the_maximum_are_clamped_and_counted() -> None:
    logits = np.array([[0, -65504, -65505, -1e30, -np.inf], [3e38, -3e38, 0, 3e38, 1]], np.float32)
    encoded = HALF.encode(logits)
    assert encoded.clamped.sum() == 5
    assert encoded.arrays["logits"][0].tolist() == [0, -65504, -65504, -65504, -np.inf]
    assert encoded.arrays["logits"][1].tolist() == [0, -65504, -65504, 0, -65504]


@pytest.mark.parametrize(("encoding", "lowest"), [(HALF, -65504.0), (FULL, -float(np.finfo(np.float32).max))])
def test_a_float64_below_the_float32_range_is_clamped_and_not_masked(encoding: Encoding, lowest: float) -> None:
    encoded = encoding.encode(np.array([[0, -1e300, -np.inf, 0, 0]]))
    assert encoded.arrays["logits"][0].tolist() == [0, lowest, -np.inf, 0, 0]
    assert encoded.clamped.sum() == 1


def test_a_float64_above_the_float32_range_is_refused() -> None:
    with pytest.raises(LogitsError, match="position 1"):
        FULL.encode(np.array([[0.0] * 5, [1e300, 0, 0, 0, 0]]))


@pytest.mark.parametrize("encoding", [HALF, FULL])
def test_no_rows_are_no_rows(encoding: Encoding) -> None:
    encoded = encoding.encode(np.empty((0, 5), np.float32))
    assert {n: len(a) for n, a in encoded.arrays.items()} == {s.name: 0 for s in encoding.specs}


@pytest.mark.parametrize("logits", [np.zeros((2, 4)), np.zeros(5), np.zeros((2, 5, 1)), np.zeros((2, 5), np.int64)])
def test_another_shape_or_integers_are_refused(logits: np.ndarray) -> None:
    with pytest.raises(LogitsError):
        HALF.encode(logits)


def test_the_input_is_not_changed() -> None:
    logits = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    before = logits.copy()
    HALF.encode(logits)
    FULL.encode(logits)
    np.testing.assert_array_equal(logits, before)


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=6),
        elements=st.floats(-3e4, 3e4, width=32) | st.just(-np.inf),
    )
)
def test_any_storable_row_comes_back_within_half_a_unit_of_float16(logits: np.ndarray) -> None:
    encoding = Dense(logits.shape[1:], "float16")
    if bad_rows(logits).size:
        with pytest.raises(LogitsError):
            encoding.encode(logits)
        return
    encoded = encoding.encode(logits)
    back = encoding.decode(encoded.arrays)
    assert back.dtype == np.float32
    assert back.shape == logits.shape
    masked = np.isinf(logits)
    np.testing.assert_array_equal(np.isinf(back), masked)
    depth = np.abs(logits.max(axis=1, keepdims=True) - np.where(masked, 0, logits))
    # 2**-11 of the distance from the maximum is half a unit of float16; 2**-22 of the maximum pays for float32.
    room = depth * 2.0**-11 + np.abs(logits.max(axis=1, keepdims=True)) * 2.0**-22 + 2.0**-24
    assert (np.abs(np.where(masked, 0, back - np.where(masked, 0, logits))) <= room)[~masked].all()
    assert (encoded.arrays["logits"].max(axis=1) == 0).all()
    assert encoded.clamped.sum() == 0


@given(hnp.arrays(np.float32, (4, 3), elements=st.floats(width=32, allow_nan=False)))
def test_float32_rows_come_back_bit_for_bit(logits: np.ndarray) -> None:
    encoding = Dense((3,), "float32")
    if not bad_rows(logits).size:
        assert encoding.decode(encoding.encode(logits).arrays).tobytes() == logits.tobytes()


@pytest.mark.parametrize("encoding", [HALF, FULL, Dense((21, 4, 4), "float16")])
def test_an_encoding_survives_its_json(encoding: Encoding) -> None:
    assert encoding_from_json(encoding.to_json()) == encoding


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"name": "dense", "dtype": "float16"},
        {"name": "topk", "dtype": "float16", "shape": [5]},
        {"name": "dense", "dtype": "int2", "shape": [5]},
        {"name": "dense", "dtype": "float16", "shape": []},
        {"name": "dense", "dtype": "float16", "shape": [0]},
        {"name": "dense", "dtype": "float16", "shape": [5, 1, 1, 1, 1]},
        {"name": "dense", "dtype": "float16", "shape": [True]},
        {"name": "dense", "dtype": "float16", "shape": [5.0]},
        {"name": "dense", "dtype": "float16", "shape": "5"},
        {"name": "dense", "dtype": "float16", "shape": [5], "more": 1},
    ],
)
def test_an_unknown_encoding_is_refused(value: object) -> None:
    with pytest.raises(UsageError):
        encoding_from_json(value)


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_nan_and_infinity_are_found_in_stored_bits_and_nothing_else(dtype: str) -> None:
    limit = float(np.finfo(dtype).max)
    for value in (0.0, -0.0, 1.0, -1.0, limit, -limit, float(np.finfo(dtype).tiny), -np.inf):
        assert not holds_nan(np.array([[value, 0]], dtype))
    for value in (np.inf, np.nan, -np.nan):
        assert holds_nan(np.array([[0, value], [0, 0]], dtype))
