from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import UsageError
from kdcache.stages.order import Order, StepSampler, permutation


def order_of(rows: int, batch_size: int, **changes: int | bool) -> Order:
    return Order(np.arange(rows) * 10, batch_size, 3, **changes)  # type: ignore[arg-type]


@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    world_size=st.integers(1, 5),
    pieces=st.integers(1, 4),
)
def test_the_pieces_of_all_ranks_make_each_epoch_once(rows: int, batch_size: int, world_size: int, pieces: int) -> None:
    ranks = [
        order_of(rows, batch_size, rank=rank, world_size=world_size, pieces_per_rank=pieces)
        for rank in range(world_size)
    ]
    taken = []
    for step in range(ranks[0].steps_per_epoch):
        shared = np.concatenate([piece for order in ranks for piece in order.pieces(step)])
        assert shared.tolist() == ranks[0].rows(step).tolist()
        assert ranks[0].pieces(step)  # rank 0 is never without rows
        taken += shared.tolist()
    assert sorted(taken) == (np.arange(rows) * 10).tolist()


def test_an_epoch_has_an_order_of_its_own_and_keeps_it() -> None:
    order = order_of(100, 100)
    assert order.rows(0).tolist() == order.rows(0).tolist()
    assert order.rows(0).tolist() != order.rows(1).tolist()
    assert order_of(100, 100).rows(7).tolist() == order.rows(7).tolist()


def test_the_order_survives_an_upgrade_of_numpy() -> None:
    assert permutation(1, 2, 8).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


def test_the_short_batch_is_left_out_when_asked_for() -> None:
    assert order_of(10, 4).steps_per_epoch == 3
    assert len(order_of(10, 4).rows(2)) == 2
    assert order_of(10, 4, drop_last=True).steps_per_epoch == 2


def test_fewer_rows_than_a_batch_without_the_last_one_is_refused() -> None:
    with pytest.raises(UsageError, match="not one step"):
        order_of(3, 4, drop_last=True)


def test_the_sampler_gives_the_pieces_of_its_steps() -> None:
    order = order_of(10, 4, pieces_per_rank=3)
    sampler = StepSampler(order)
    sampler.start, sampler.stop = 1, 3
    expected = [piece.tolist() for step in (1, 2) for piece in order.pieces(step)]
    assert list(sampler) == expected
    assert len(sampler) == len(expected) == 5  # the last batch of two rows makes two pieces
