from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.errors import UsageError
from kdcache.train.view_order import ViewChoice, own_choice

IDS = np.arange(4000)


def test_epoch_e_takes_view_e_mod_k_of_those_there_are() -> None:
    choice = ViewChoice((0, 3, 5), "epoch")
    for epoch in range(7):
        choice.set_epoch(epoch)
        assert set(choice.take(IDS[:9])) == {(0, 3, 5)[epoch % 3]}
    fresh = ViewChoice(None, "epoch")
    fresh.set_epoch(70_000)
    assert fresh.take(IDS[:2]) == [70_000, 70_000]


def test_an_order_by_epoch_is_refused_where_nobody_tells_the_epoch() -> None:
    for views in ((0, 1), None):
        with pytest.raises(UsageError, match=r"nobody has told it: call set_epoch.* view_order='random'"):
            ViewChoice(views, "epoch").take(IDS)


def test_one_view_needs_no_epoch() -> None:
    choice = ViewChoice((3,), "epoch")
    assert choice.is_fixed
    assert choice.take(IDS[:2]) == [3, 3]
    choice.set_epoch(5)
    assert choice.take(IDS[:2]) == [3, 3]
    with pytest.raises(UsageError, match="an epoch is 0 or more"):
        choice.set_epoch(-1)


def test_without_an_order_views_are_random_until_an_epoch_is_told() -> None:
    choice = ViewChoice((0, 1, 2), None)
    assert set(choice.take(IDS)) == {0, 1, 2}
    choice.set_epoch(1)
    assert set(choice.take(IDS)) == {1}


@pytest.mark.parametrize("views", [(0, 1, 2, 3), (2, 9)])
def test_a_random_access_takes_each_view_as_often_independently_of_the_one_before(views: tuple[int, ...]) -> None:
    choice = ViewChoice(views, "random")
    first, second = (np.array(choice.take(IDS)) for _ in range(2))
    expected = len(IDS) / len(views)
    for view in views:
        assert abs((first == view).sum() - expected) < 5 * np.sqrt(expected)
        both = ((first == view) & (second == view)).sum()
        assert abs(both - expected / len(views)) < 5 * np.sqrt(expected / len(views))


def test_a_random_access_to_views_without_end_takes_any() -> None:
    taken = np.array(ViewChoice(None, "random").take(IDS), np.float64) / 2**32
    assert len(set(taken)) > len(IDS) - 3
    assert abs(taken.mean() - 0.5) < 5 * 0.289 / np.sqrt(len(IDS))


def test_random_draws_come_from_the_seed_of_the_process_and_leave_its_generators_alone() -> None:
    before = torch.get_rng_state().tolist(), np.random.get_state()[2], random.getstate()
    assert ViewChoice((0, 1), "random").take(IDS) == ViewChoice((0, 1), "random").take(IDS)
    assert (torch.get_rng_state().tolist(), np.random.get_state()[2], random.getstate()) == before
    state = torch.get_rng_state()
    torch.manual_seed(77)
    other = ViewChoice((0, 1), "random").take(IDS)
    torch.set_rng_state(state)
    assert other != ViewChoice((0, 1), "random").take(IDS)


def test_with_a_seed_random_views_are_a_function_of_seed_epoch_and_id() -> None:
    def taken(seed: int, epoch: int, ids: Any) -> list[int]:
        choice = ViewChoice((0, 1, 2), "random", seed=seed)
        choice.set_epoch(epoch)
        choice.take(IDS[:17])
        return choice.take(ids)

    assert taken(5, 2, IDS) == taken(5, 2, IDS[::-1])[::-1]
    assert taken(5, 2, IDS) != taken(5, 3, IDS)
    assert taken(5, 2, IDS) != taken(6, 2, IDS)
    assert set(taken(5, 2, IDS)) == {0, 1, 2}
    with pytest.raises(UsageError, match="set_epoch"):
        ViewChoice((0, 1), "random", seed=5).take(IDS)


def test_choices_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(UsageError, match="view_order must be epoch or random, found 'shuffled'"):
        ViewChoice((0,), "shuffled")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no view is left"):
        ViewChoice((), None)
    with pytest.raises(UsageError, match=r"views= \(--views\) must be 1 to 65536, found 0"):
        own_choice(views=0)
    for settings in ({"views": 2}, {"view_order": "random"}):
        with pytest.raises(UsageError, match="give one or the other"):
            own_choice(view=1, **settings)  # type: ignore[arg-type]


def test_without_a_cache_views_count_from_0_or_have_no_end() -> None:
    assert own_choice(views=3).views == (0, 1, 2)
    assert own_choice().views is None
    assert own_choice(view=7).views == (7,)
