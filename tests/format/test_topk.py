"""The top-k rows against plain Python: what is kept, what the tail sums to, what options and headers may say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache.errors import DataError, UsageError
from kdcache.format.encoding import bad_rows
from kdcache.format.encodings import EncodingChoice, encoding_from_json
from kdcache.format.topk import TopK, check_temperatures, temperatures_of

GOOD: dict[str, Any] = {
    "name": "topk",
    "dtype": "float16",
    "shape": [5],
    "k": 2,
    "temperatures": [1.0, "z2"],
    "labels": 1,
}


def logsumexp(values: list[float]) -> float:
    finite = [v for v in values if v > -math.inf]
    return max(finite) + math.log(sum(math.exp(v - max(finite)) for v in finite)) if finite else -math.inf


def row_twin(row: list[float], labels: list[int], encoding: TopK) -> dict[str, Any]:
    """One row (C,) as docs/format.md says it, with a stable sort."""
    top = max(row)
    z = [v - top for v in row]
    order = sorted(range(len(row)), key=lambda c: (-row[c], c))[: encoding.k]
    tail = [z[c] for c in range(len(row)) if c not in {*order, *labels}]
    finite = [v for v in z if v > -math.inf]
    mean = sum(finite) / len(finite)
    std = math.sqrt(sum((v - mean) ** 2 for v in finite) / len(finite))
    divisors = [max(2 * std, 1e-37) if t == "z2" else float(t) for t in encoding.temperatures]
    return {
        "topk_logits": [z[c] for c in order],
        "topk_classes": order,
        "label_logits": [z[c] if c >= 0 else -math.inf for c in labels],
        "tail_logsumexp": [logsumexp([v / t for v in tail]) for t in divisors],
        "row_max": top,
        "tail_mean": -math.inf if not tail or min(tail) == -math.inf else sum(tail) / len(tail),
        "logit_std": std,
    }


@given(data=st.data())
def test_rows_are_what_the_format_says(data: Any) -> None:
    classes, labels = data.draw(st.integers(2, 9)), data.draw(st.integers(0, 2))
    values = data.draw(st.sampled_from([st.integers(-2, 2), st.integers(-3000, 3000)]))
    elements = values.map(lambda n: n / 64) | st.just(-np.inf)
    logits = data.draw(hnp.arrays(np.float32, (4, classes), elements=elements))
    logits = np.delete(logits, bad_rows(logits), axis=0)
    encoding = TopK((classes,), data.draw(st.integers(1, classes)), (0.5, 1.0, 4.0, "z2"), labels)
    own = data.draw(hnp.arrays(np.int64, (len(logits), labels), elements=st.integers(-1, classes - 1)))
    encoded = encoding.encode(logits, own)
    assert encoding.flaw(encoded.arrays) is None
    for row, values in enumerate(logits.astype(np.float64).tolist()):
        for name, expected in row_twin(values, own[row].tolist(), encoding).items():
            if name == "label_logits" and not labels:
                assert name not in encoded.arrays
                continue
            found, wanted = encoded.arrays[name][row], np.array(expected)
            half = wanted.astype(found.dtype) if found.dtype == np.float16 else wanted
            np.testing.assert_allclose(found, half, rtol=1e-6, atol=1e-6, err_msg=name)


@given(
    hnp.arrays(np.float32, (3, 12), elements=st.floats(-300, 300, width=32)),
    st.integers(1, 12),
    st.sampled_from([0.5, 1.0, 2.0, 8.0]),
)
def test_the_normaliser_at_a_stored_temperature_is_that_of_all_classes(
    logits: np.ndarray, k: int, temperature: float
) -> None:
    arrays = TopK((12,), k, (temperature,), 0).encode(logits).arrays
    z = logits.astype(np.float64) / temperature
    whole = np.log(np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1))
    kept = arrays["topk_logits"].astype(np.float64) / temperature
    found = np.logaddexp(np.log(np.exp(kept).sum(axis=1)), arrays["tail_logsumexp"][:, 0].astype(np.float64))
    # Rounding a kept logit to float16 moves it by 2**-11 of its depth d, which weighs exp(-d / T) in the sum.
    np.testing.assert_allclose(found, whole, atol=12 * 2.0**-11 * math.exp(-1) + 1e-6)


def test_a_row_of_a_thousand_classes_takes_62_bytes() -> None:
    encoding = EncodingChoice("float16", 10, (1.0, 2.0)).of((1000,), labels=1)
    assert sum(spec.row_bytes for spec in encoding.specs) == 62


def test_of_equal_logits_the_lower_classes_are_kept() -> None:
    logits = np.zeros((1, 100), np.float32)
    logits[0, ::2] = -0.0
    logits[0, 60] = 1
    arrays = TopK((100,), 5, (1.0,), 0).encode(logits).arrays
    assert arrays["topk_classes"].tolist() == [[60, 0, 1, 2, 3]]


def test_many_rows_are_encoded_block_by_block_as_at_once() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (1100, 600)).astype(np.float32)
    labels = np.arange(1100)[:, None] % 600
    encoding = TopK((600,), 7, (1.0, "z2"), 1)
    whole = encoding.encode(logits, labels).arrays
    pieces = [encoding.encode(logits[n : n + 1], labels[n : n + 1]).arrays for n in (0, 872, 873, 874, 1099)]
    for name, array in whole.items():
        np.testing.assert_array_equal(array[[0, 872, 873, 874, 1099]], np.concatenate([p[name] for p in pieces]))


@pytest.mark.parametrize(("classes", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_the_last_class_of_long_rows_is_not_cut(classes: int, dtype: str) -> None:
    logits = np.zeros((1, classes), np.float32)
    logits[0, -1] = 9
    encoding = TopK((classes,), 3, (1.0,), 1)
    arrays = encoding.encode(logits, np.array([[classes - 1]])).arrays
    assert arrays["topk_classes"].dtype == np.dtype(dtype)
    assert arrays["topk_classes"].tolist() == [[classes - 1, 0, 1]]
    assert arrays["tail_logsumexp"][0, 0] == pytest.approx(math.log(classes - 3) - 9, abs=1e-6)


def test_each_pixel_of_a_dense_prediction_is_a_row() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 9, 3, 4)).astype(np.float32)
    maps, pixels = TopK((9, 3, 4), 4, (1.0, 2.0), 0), TopK((9,), 4, (1.0, 2.0), 0)
    found = maps.encode(logits).arrays
    rows = pixels.encode(np.moveaxis(logits, 1, -1).reshape(-1, 9)).arrays
    for name, array in found.items():
        assert array.shape == next(spec for spec in maps.specs if spec.name == name).shape(2)
        as_rows = np.moveaxis(array, 1, -1).reshape(24, -1) if array.ndim == 4 else array.reshape(24)
        np.testing.assert_array_equal(as_rows, rows[name])


def test_with_all_classes_kept_the_rows_decode() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (4, 6, 2)).astype(np.float32)
    logits[1, 2, 1] = -np.inf
    encoding = EncodingChoice("float16", 99).of((6, 2))
    arrays = encoding.encode(logits).arrays
    assert encoding.has_all_logits
    assert (arrays["tail_logsumexp"] == -np.inf).all()
    assert (arrays["tail_mean"] == -np.inf).all()
    np.testing.assert_allclose(encoding.decode(arrays), logits, rtol=2e-3, atol=1e-2)


def test_rows_that_lack_classes_do_not_decode_and_say_what_does() -> None:
    encoding = TopK((6,), 2, (1.0,), 0)
    arrays = encoding.encode(np.eye(6, dtype=np.float32)).arrays
    assert not encoding.has_all_logits
    assert encoding.top_class(arrays).tolist() == list(range(6))
    with pytest.raises(UsageError, match=r"top 2 of 6 classes.*--dtype float16, int8 or int4"):
        encoding.decode(arrays)


def test_kept_values_far_below_the_maximum_are_clamped_and_counted_once() -> None:
    logits = np.array([[0, -70_000, -80_000, -90_000]], np.float32)
    encoding = TopK((4,), 2, (1.0,), 2)
    encoded = encoding.encode(logits, np.array([[1, 3]]))
    assert encoded.arrays["topk_logits"].tolist() == [[0, -65504]]
    assert encoded.arrays["label_logits"].tolist() == [[-65504, -65504]]
    assert encoded.clamped.tolist() == [2]


@pytest.mark.parametrize("labels", [np.zeros((3, 2), np.int64), np.full((3, 1), 5), np.full((3, 1), -2)])
def test_labels_that_are_none_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(DataError, match="label"):
        TopK((5,), 2, (1.0,), 1).encode(np.zeros((3, 5), np.float32), labels)


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("topk_classes", [7, 3], "beyond"),
        ("topk_classes", [3, 3], "twice"),
        ("topk_logits", [-1, -2], "descend"),
        ("topk_logits", [0, 1], "descend"),
        ("logit_std", -1, "logit_std"),
    ],
)
def test_what_no_writer_stores_is_named(array: str, value: Any, message: str) -> None:
    encoding = TopK((6,), 2, (1.0,), 0)
    arrays = encoding.encode(np.eye(6, dtype=np.float32)).arrays
    arrays[array][4] = value
    assert message in str(encoding.flaw(arrays))
    assert encoding.class_index(arrays).max() <= 5


@pytest.mark.parametrize("shape", [[5], [21, 4, 4]])
def test_an_encoding_survives_its_json(shape: list[int]) -> None:
    encoding = EncodingChoice("float16", 3, (1, 2.5, "z2")).of(tuple(shape), labels=2)
    assert encoding_from_json(encoding.to_json()) == encoding
    assert encoding.to_json()["labels"] == (2 if len(shape) == 1 else 0)


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0},
        {"k": 6},
        {"k": True},
        {"k": 2.0},
        {"k": 10**19},
        {"k": [2]},
        {"labels": 3},
        {"labels": -1},
        {"labels": True},
        {"labels": None},
        {"labels": 1, "shape": [5, 2]},
        {"shape": [1], "k": 1},
        {"shape": [2**31], "k": 2},
        {"temperatures": []},
        {"temperatures": "z2"},
        {"temperatures": {}},
        {"temperatures": [1]},
        {"temperatures": [0.0]},
        {"temperatures": [-1.0]},
        {"temperatures": [2.0, 1.0]},
        {"temperatures": [1.0, 1.0]},
        {"temperatures": ["z2", 1.0]},
        {"temperatures": ["z2", "z2"]},
        {"temperatures": ["z3"]},
        {"temperatures": [[1.0]]},
        {"temperatures": [1e300]},
        {"temperatures": [1.0 + n for n in range(1000)]},
        {"dtype": "float32"},
        {"dtype": ["float16"]},
        {"name": ["topk"]},
        {"more": 1},
    ],
)
def test_a_header_that_says_anything_else_is_refused(change: dict[str, Any]) -> None:
    assert encoding_from_json(GOOD) == TopK((5,), 2, (1.0, "z2"), 1)
    with pytest.raises(UsageError):
        encoding_from_json({**GOOD, **change})


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_header_that_lacks_a_field_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        encoding_from_json({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("text", ["", "1,,2", "1;2", "warm", "0", "-1,2", "nan", "1,nan", "inf", "2,1", "1,1", "z2,1"])
def test_temperatures_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="temperature"):
        temperatures_of(text)


def test_temperatures_are_read_as_they_are_written() -> None:
    assert temperatures_of(" 0.5, 1 ,z2") == (0.5, 1.0, "z2")
    assert check_temperatures([1]) == (1.0,)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("float32", 5), "--dtype float32"),
        (("int8", 5), "--dtype int8"),
        (("float16", 0), "at least 1"),
        (("float16", -3), "at least 1"),
        (("float16", True), "at least 1"),
        (("float16", None, (1.0,)), "belongs to --top-k"),
        (("float16", 5, (0.0,)), "temperature"),
        (("float16", 5, (math.nan,)), "temperature"),
        (("float8",), "not known"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(choice: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EncodingChoice(*choice)


def test_one_class_has_no_top_k() -> None:
    with pytest.raises(UsageError, match="two classes"):
        EncodingChoice("float16", 5).of((1,))
