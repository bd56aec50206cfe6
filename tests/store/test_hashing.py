"""A sha256 that is computed beside the caller's work."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from kdcache.store.hashing import OverlappedHash

SMALL, LARGE = b"a row", bytes(range(256)) * 1024


def test_blocks_are_hashed_in_their_order_whatever_their_size() -> None:
    state, expected = OverlappedHash(), hashlib.sha256()
    for block in (SMALL, LARGE, SMALL, LARGE, LARGE):
        with state.hashing(memoryview(block)):
            expected.update(block)
    state.update(SMALL)
    expected.update(SMALL)
    assert state.hexdigest() == expected.hexdigest()
    state.close()
    state.close()


@pytest.mark.parametrize("block", [SMALL, LARGE], ids=["small", "large"])
def test_an_error_of_the_work_beside_it_comes_out(block: bytes) -> None:
    state = OverlappedHash()
    with pytest.raises(OSError, match="disk"), state.hashing(memoryview(block)):
        raise OSError("disk")
    state.close()


def test_a_block_may_change_once_the_body_is_left() -> None:
    state, block = OverlappedHash(), np.zeros(1 << 20, np.uint8)
    with state.hashing(block.data):
        expected = hashlib.sha256(block).hexdigest()
    block[:] = 1
    assert state.hexdigest() == expected
    state.close()
