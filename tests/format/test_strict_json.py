"""JSON from files of others: a plain object, or a typed refusal; never another exception."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError
from kdcache.format.identity import canonical_json
from kdcache.format.strict_json import load_json

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_what_we_write_comes_back(value: dict[str, object]) -> None:
    assert load_json(canonical_json(value).encode(), where="x") == value


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_an_object_or_a_typed_error(text: bytes) -> None:
    with contextlib.suppress(CorruptCacheError):
        assert isinstance(load_json(text, where="x"), dict)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not readable"),
        (b"[]", "JSON object"),
        (b"1", "JSON object"),
        (b'{"a":1', "not readable"),
        (b'{"a":1}{}', "not readable"),
        (b'{"a":"\xff"}', "not readable"),
        (b'{"a":1,"a":1}', "stands twice"),
        (b'{"b":{"a":1,"a":2}}', "stands twice"),
        (b'{"a":NaN}', "NaN is not allowed"),
        (b'{"a":-Infinity}', "-Infinity is not allowed"),
        (b'{"a":1e999}', "1e999 is not allowed"),
        (b'{"a":' + b"1" * 21 + b"}", "21 digits"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "64 levels"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "RecursionError|64 levels"),
    ],
)
def test_surprises_are_refused(text: bytes, reason: str) -> None:
    with pytest.raises(CorruptCacheError, match=reason):
        load_json(text, where="x")


def test_64_levels_are_enough() -> None:
    assert load_json(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}", where="x")
