"""Positions of ids against a dictionary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError
from kdcache.store.lookup import IdIndex

LOWEST, HIGHEST = -(2**63), 2**63 - 1
INT64 = st.integers(LOWEST, HIGHEST)


@given(st.lists(INT64, min_size=1, max_size=30, unique=True), st.lists(INT64 | st.integers(-3, 3), max_size=30))
def test_any_integers_are_found_as_a_dictionary_finds_them(ids: list[int], others: list[int]) -> None:
    index = IdIndex.of_array(np.array(ids, np.int64), Path("x"))
    expected = {v: n for n, v in enumerate(ids)}
    wanted = [*ids[::-1], *others]
    assert index.find(np.array(wanted, np.int64)).tolist() == [expected.get(w, -1) for w in wanted]
    assert index.sample_ids.tolist() == ids


@given(
    st.lists(
        st.binary(min_size=1, max_size=6).filter(lambda b: not b.endswith(b"\0")), min_size=1, max_size=30, unique=True
    ),
    st.lists(st.binary(min_size=1, max_size=9).filter(lambda b: not b.endswith(b"\0")), min_size=1, max_size=30),
)
def test_any_bytes_are_found_as_a_dictionary_finds_them(ids: list[bytes], others: list[bytes]) -> None:
    index = IdIndex.of_array(np.array(ids, "S6"), Path("x"))
    expected = {v: n for n, v in enumerate(ids)}
    wanted = [*ids[::-1], *others]
    assert index.find(np.array(wanted)).tolist() == [expected.get(w, -1) for w in wanted]
    assert index.sample_ids.tolist() == ids


@given(INT64, st.integers(1, 1000), st.lists(INT64, max_size=20), st.lists(st.integers(-2, 1002), max_size=20))
def test_a_range_is_found_by_arithmetic_without_wrapping_round(
    first: int, count: int, far: list[int], near: list[int]
) -> None:
    first = min(first, HIGHEST - count + 1)
    index = IdIndex.of_range(first, count)
    wanted = [w for w in [*far, *(first + n for n in near), LOWEST, HIGHEST] if LOWEST <= w <= HIGHEST]
    expected = [w - first if 0 <= w - first < count else -1 for w in wanted]
    assert index.find(np.array(wanted, np.int64)).tolist() == expected
    assert index.sample_ids[[0, -1]].tolist() == [first, first + count - 1]


@pytest.mark.parametrize("ids", [np.array([1, 2, 1]), np.array([b"a", b"b", b"a"])])
def test_an_id_that_stands_twice_is_corrupt(ids: np.ndarray) -> None:
    with pytest.raises(CorruptCacheError, match="stands twice"):
        IdIndex.of_array(ids, Path("x"))
