"""Ids keep their value and kind, or are refused; digests and fingerprints depend on content alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import DataError
from kdcache.format.identity import (
    as_sample_ids,
    canonical_json,
    fingerprint,
    ids_sha256,
    input_digest,
    names_sha256,
    show_ids,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda t: not t.endswith("\0"))


@given(st.lists(INT64, max_size=20))
def test_integers_become_int64(values: list[int]) -> None:
    ids = as_sample_ids(values)
    assert ids.dtype == np.dtype("<i8")
    assert ids.shape == (len(values),)
    assert ids.tolist() == values


@given(st.lists(TEXT, min_size=1, max_size=20))
def test_text_becomes_utf8_bytes(values: list[str]) -> None:
    ids = as_sample_ids(values)
    assert ids.dtype.kind == "S"
    assert [i.decode() for i in ids.tolist()] == values
    np.testing.assert_array_equal(as_sample_ids(np.array(values, object)), ids)
    np.testing.assert_array_equal(as_sample_ids([v.encode() for v in values]), ids)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(3, dtype=np.uint8),
        np.arange(3, dtype=">i4"),
        torch.arange(3),
        range(3),
        (0, 1, 2),
        [np.int32(0), 1, np.uint64(2)],
        iter([0, 1, 2]),
    ],
)
def test_every_kind_of_integers_is_taken(values: object) -> None:
    ids = as_sample_ids(values)
    assert ids.dtype == np.dtype("<i8")
    assert ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, "a"], "int, str"),
        ([1.0], "float"),
        ([True], "bool"),
        ([None], "NoneType"),
        ([(1, 2)], "tuple"),
        (np.array([1.5]), "float"),
        (np.array([True]), "bool"),
        (np.zeros((2, 2), np.int64), "one-dimensional"),
        (np.array(3), "one-dimensional"),
        ([2**63], "fit int64"),
        ([np.uint64(2**63)], "fit int64"),
        (np.array([2**63], np.uint64), "fit int64"),
        ([""], "empty"),
        ([b""], "empty"),
        (np.array([b"a", b""]), "empty"),
        ([b"a\0"], "NUL"),
        (["x" * 1025], "1024"),
        (np.array([b"x" * 1025]), "1024"),
        (["\ud800"], "not Unicode"),
        ("a.png", "one str"),
        (b"a.png", "one bytes"),
        (5, "one int"),
        (None, "one NoneType"),
    ],
)
def test_what_is_not_an_id_is_refused(values: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        as_sample_ids(values)


def test_a_file_name_that_is_not_utf8_is_an_id() -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")  # as os.listdir gives it
    assert as_sample_ids([name]).tolist() == [b"caf\xe9.png"]


def test_ids_are_shown_to_people() -> None:
    assert show_ids(np.array([1, 2])) == "1, 2"
    assert show_ids(np.array([b"a", b"b", b"c"]), limit=2) == "'a', 'b', ..."


def test_a_digest_is_the_documented_one() -> None:
    value = np.arange(6, dtype="<f4").reshape(2, 3)
    expected = hashlib.sha256(b"<f4(2, 3)\0" + value.tobytes()).digest()[:8]
    assert input_digest(value) == int.from_bytes(expected, "little")


def test_equal_inputs_have_equal_digests_whatever_holds_them() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    digest = input_digest(value)
    assert digest == input_digest(torch.from_numpy(value))
    assert digest == input_digest(np.asfortranarray(value))
    assert digest == input_digest(value.astype(">f4"))
    assert digest == input_digest(torch.from_numpy(value).T.contiguous().T)
    assert digest == input_digest(torch.from_numpy(value).requires_grad_())


def test_type_shape_and_content_each_change_the_digest() -> None:
    value = np.arange(6, dtype=np.int32).reshape(2, 3)
    others = [value.astype(np.uint32), value.reshape(3, 2), value.reshape(1, 2, 3), value + 1, np.float32(0), 0]
    assert len({input_digest(v) for v in [value, *others]}) == len(others) + 1


def test_a_picture_and_its_array_have_one_digest() -> None:
    image = pytest.importorskip("PIL.Image").fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    assert input_digest(image) == input_digest(np.asarray(image))


@pytest.mark.parametrize("value", ["text", None, [object()], {"a": 1}])
def test_what_is_not_numbers_has_no_digest(value: object) -> None:
    with pytest.raises(DataError, match="needs numbers"):
        input_digest(value)


def test_canonical_json_does_not_depend_on_order_or_platform() -> None:
    assert canonical_json({"b": [1, 2.5, "é"], "a": None}) == '{"a":null,"b":[1,2.5,"\\u00e9"]}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([float("nan")])


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = "from kdcache.format.identity import fingerprint; print(fingerprint({'a': [1, 'x'], 'b': None}))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == fingerprint({"a": [1, "x"], "b": None})


def test_the_order_of_names_and_ids_counts() -> None:
    assert names_sha256(["a", "b"]) != names_sha256(["b", "a"])
    assert ids_sha256(np.array([1, 2])) != ids_sha256(np.array([2, 1]))
    assert ids_sha256(np.array([1, 2], ">i8")) != ids_sha256(np.array([1, 2], "<i4"))
