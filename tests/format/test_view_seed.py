from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import UsageError
from kdcache.format.view_seed import MAX_SEED, check_views, view_seed

IDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.binary(min_size=1, max_size=40))


def test_the_bytes_are_those_of_the_specification() -> None:
    for sample_id, name in ((7, b"i" + (7).to_bytes(8, "little")), (b"cat/1.png", b"scat/1.png")):
        text = (5).to_bytes(8, "little") + (3).to_bytes(4, "little") + name
        for purpose in ("view", "mix", "choice"):
            expected = hashlib.blake2b(text, digest_size=32, person=f"kdcache {purpose}".encode()).digest()
            assert view_seed(5, sample_id, 3, purpose=purpose) == expected  # type: ignore[arg-type]


@given(seed=st.integers(0, MAX_SEED), sample_id=IDS, view=st.integers(0, 2**32 - 1))
def test_every_argument_changes_the_seed(seed: int, sample_id: int | bytes, view: int) -> None:
    found = {
        view_seed(seed, sample_id, view),
        view_seed(seed ^ 1, sample_id, view),
        view_seed(seed, sample_id, view ^ 1),
        view_seed(seed, sample_id ^ 1 if isinstance(sample_id, int) else sample_id + b"x", view),
        view_seed(seed, sample_id, view, purpose="mix"),
        view_seed(seed, sample_id, view, purpose="choice"),
    }
    assert len(found) == 6


def test_numbers_and_bytes_of_numpy_count_as_their_values() -> None:
    assert view_seed(1, np.int64(-9), 0) == view_seed(1, -9, 0)
    assert view_seed(1, np.bytes_(b"x"), 0) == view_seed(1, b"x", 0)
    assert view_seed(1, 120, 0) != view_seed(1, b"x", 0)


@pytest.mark.parametrize(("seed", "view"), [(-1, 0), (2**63, 0), (0, -1), (0, 2**32)])
def test_seeds_and_views_out_of_range_are_refused(seed: int, view: int) -> None:
    with pytest.raises(UsageError, match="a seed is 0 to"):
        view_seed(seed, 0, view)


@pytest.mark.parametrize("count", [0, -1, 65_537])
def test_a_number_of_views_that_cannot_be_meant_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"--views must be 1 to 65536, found {count}"):
        check_views(count)
    assert check_views(65_536) == 65_536
