"""The int8 and int4 rows: sizes and errors they promise, masked classes, short rows, and a plain twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache.errors import LogitsError, UsageError
from kdcache.format.encoding import bad_rows
from kdcache.format.encodings import EncodingChoice, encoding_from_json
from kdcache.format.quantized import Quantized

KINDS = ("int8", "int4")
LAST = {"int8": 254, "int4": 14}


def realistic(rows: int, classes: int) -> np.ndarray:
    """Logits as classifiers give them: a bell of unlikely classes, and a few that stand out."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.2, (rows, classes))
    picked = rng.integers(0, classes, (rows, 10))
    logits[np.arange(rows)[:, None], picked] += rng.exponential(4, (rows, 10))
    return logits.astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def mean_kl(exact: np.ndarray, stored: np.ndarray, temperature: float) -> float:
    p, q = (log_softmax(z.astype(np.float64) / temperature) for z in (exact, stored))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def decode_twin(encoding: Quantized, arrays: dict[str, np.ndarray], row: int) -> list[float]:
    """One row (C,) as docs/format.md says it, value by value in float64."""
    codes = arrays["logits"][row].tolist()
    if encoding.stored == "int4":
        codes = [half for byte in codes for half in (byte & 15, byte >> 4)][: encoding.num_classes]
    top = [float(v) + float(arrays["row_max"][row]) for v in arrays["top_logits"][row]]
    values = [-np.inf if c > LAST[encoding.stored] else top[-1] - c * float(arrays["row_scale"][row]) for c in codes]
    for value, place in zip(top, arrays["top_classes"][row].tolist(), strict=True):
        values[place] = value
    return values


@pytest.mark.parametrize(("kind", "row_bytes", "most"), [("int8", 1040, 2e-5), ("int4", 540, 3e-3)])
def test_a_thousand_classes_have_the_promised_size_and_kl(kind: str, row_bytes: int, most: float) -> None:
    logits = realistic(500, 1000)
    encoding = Quantized((1000,), kind)
    assert sum(spec.row_bytes for spec in encoding.specs) == row_bytes
    stored = encoding.decode(encoding.encode(logits).arrays)
    for temperature in (1, 2, 4):
        assert mean_kl(logits, stored, temperature) <= most


@pytest.mark.parametrize("kind", KINDS)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=12),
        elements=st.floats(-1e4, 1e4, width=32) | st.just(-np.inf),
    )
)
def test_any_storable_row_comes_back_within_half_a_step(kind: str, logits: np.ndarray) -> None:
    encoding = Quantized(logits.shape[1:], kind)
    if bad_rows(logits).size:
        with pytest.raises(LogitsError):
            encoding.encode(logits)
        return
    encoded = encoding.encode(logits)
    back = encoding.decode(encoded.arrays)
    assert back.dtype == np.float32
    masked = np.isinf(logits)
    np.testing.assert_array_equal(np.isinf(back), masked)
    top = logits.max(axis=1, keepdims=True)
    depth = np.abs(top - np.where(masked, top, logits))
    half_a_step = np.expand_dims(encoded.arrays["row_scale"], 1) / 2
    # Half a unit of float16 for the top ones and where the grid begins; 2**-20 pays for the roundings of float32.
    room = np.maximum(half_a_step * (1 + 2.0**-12), depth * 2.0**-11) + (np.abs(top) + depth) * 2.0**-20 + 2.0**-24
    error = np.abs(np.where(masked, 0, back) - np.where(masked, 0, logits))
    assert (error <= room).all()
    assert not encoded.clamped.any()
    assert encoding.flaw(encoded.arrays) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 10, 33])
def test_rows_decode_as_the_format_says(kind: str, classes: int) -> None:
    logits = np.random.default_rng(classes).normal(0, 5, (6, classes)).astype(np.float32)
    logits[1:, classes // 2] = -np.inf if classes > 1 else 0
    encoding = Quantized((classes,), kind)
    arrays = encoding.encode(logits).arrays
    back = encoding.decode(arrays)
    for row in range(6):
        np.testing.assert_allclose(back[row], decode_twin(encoding, arrays, row), rtol=1e-6, atol=1e-6)
    if classes <= 8:  # all of them stand in float16
        np.testing.assert_allclose(back, logits, rtol=2**-10, atol=0.02)
    np.testing.assert_array_equal(encoding.top_class(arrays), logits.argmax(axis=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_one_finite_value_or_of_equal_ones_has_no_step(kind: str) -> None:
    logits = np.full((3, 11), -np.inf, np.float32)
    logits[0, 7] = 3.25
    logits[1] = -2
    logits[2, :9] = 5
    encoding = Quantized((11,), kind)
    arrays = encoding.encode(logits).arrays
    assert arrays["row_scale"].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(encoding.decode(arrays), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_logits_the_lower_classes_are_the_top_ones(kind: str) -> None:
    arrays = Quantized((20,), kind).encode(np.zeros((1, 20), np.float32)).arrays
    assert arrays["top_classes"].tolist() == [list(range(8))]


@pytest.mark.parametrize("kind", KINDS)
def test_values_far_below_the_maximum_are_clamped_and_counted(kind: str) -> None:
    logits = np.zeros((1, 20), np.float32)
    logits[0, 3:6] = [-65505, -3e38, -np.inf]
    encoding = Quantized((20,), kind)
    encoded = encoding.encode(logits)
    assert encoded.clamped.tolist() == [2]
    np.testing.assert_allclose(encoding.decode(encoded.arrays)[0, 3:6], [-65504, -65504, -np.inf], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_the_last_class_of_long_rows_is_not_cut(kind: str, classes: int, dtype: str) -> None:
    logits = np.random.default_rng(0).normal(0, 1, (2, classes)).astype(np.float32)
    logits[:, -1] = 50
    encoding = Quantized((classes,), kind)
    arrays = encoding.encode(logits).arrays
    assert arrays["top_classes"].dtype == np.dtype(dtype)
    assert arrays["top_classes"][:, 0].tolist() == [classes - 1] * 2
    assert encoding.decode(arrays)[:, -1].tolist() == [50, 50]


def test_a_class_beyond_the_last_ends_no_process_and_is_named() -> None:
    encoding = Quantized((20,), "int8")
    arrays = encoding.encode(np.zeros((2, 20), np.float32)).arrays
    arrays["top_classes"][1, 2] = 60_000
    assert np.isfinite(encoding.decode(arrays)).all()
    assert "beyond" in str(encoding.flaw(arrays))
    arrays["row_scale"][0] = -1
    assert "row_scale" in str(encoding.flaw(arrays))


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoding_survives_its_json(kind: str) -> None:
    for shape in ((5,), (21, 4, 4)):
        encoding = EncodingChoice(kind).of(shape)
        assert isinstance(encoding, Quantized)
        assert encoding_from_json(encoding.to_json()) == encoding


def test_another_number_of_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="int8, int4"):
        Quantized((5,), "int2")
