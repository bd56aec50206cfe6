"""How samples are cut into shards, against a plain loop; numbers of any size cost nothing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CorruptCacheError
from kdcache.format.tiling import Tiling, extents_from_json

TILINGS = st.builds(
    lambda rows, pieces: Tiling(rows, tuple(itertools.accumulate(pieces))),
    st.integers(1, 9),
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
)


def spans(tiling: Tiling) -> list[tuple[int, int]]:
    """As the format says it: from each extent on, `shard_rows` at a time."""
    found, start = [], 0
    for stop in tiling.extents:
        while start < stop:
            found.append((start, min(start + tiling.shard_rows, stop)))
            start = found[-1][1]
    return found


@given(TILINGS)
def test_shards_are_cut_anew_from_each_extent(tiling: Tiling) -> None:
    expected = spans(tiling)
    assert tiling.count == len(expected)
    assert [tiling.span(index) for index in range(tiling.count)] == expected
    assert [tiling.stop_of(start) for start, _ in expected] == [stop for _, stop in expected]


@given(TILINGS, st.integers(1, 30))
def test_what_grows_keeps_its_shards(tiling: Tiling, more: int) -> None:
    longer = Tiling(tiling.shard_rows, (*tiling.extents, tiling.extents[-1] + more))
    assert spans(longer)[: tiling.count] == spans(tiling)
    assert longer.extends(tiling)
    assert not tiling.extends(longer)
    assert not longer.extends(longer)
    assert not longer.extends(Tiling(tiling.shard_rows + 1, tiling.extents))


def test_huge_numbers_cost_nothing() -> None:
    tiling = Tiling(1, (2**40, 2**47))
    assert tiling.count == 2**47
    assert tiling.span(2**46) == (2**46, 2**46 + 1)


@pytest.mark.parametrize(
    "value",
    [[], [5], [5, 5], [7, 5], [0, 5], [-1, 5], [2, 6], [True, 5], [2.0, 5], ["2", 5], {"2": 5}, "25", 5, [[2], 5]],
)
def test_other_extents_are_refused(value: object) -> None:
    with pytest.raises(CorruptCacheError, match="extents must"):
        extents_from_json(value, 5, where="manifest.json")


def test_no_field_means_that_it_never_grew() -> None:
    assert extents_from_json(None, 5, where="manifest.json") == ()
    assert extents_from_json([2, 5], 5, where="manifest.json") == (2, 5)
