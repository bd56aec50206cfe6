"""R1: a kill costs at most the shard in hand of each process, and the finished cache has the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def finished(dumps: Any, tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """What an uninterrupted dump leaves, as a folder and as one file."""
    from kill_runs import SUFFIXES
    from precompute_runs import uninterrupted

    return uninterrupted(dumps, tmp_path, SUFFIXES)


def test_a_kill_at_a_random_moment_costs_the_shard_in_hand_and_no_byte_of_the_cache(
    dumps: Any,
    finished: dict[str, dict[str, bytes]],
    tmp_path: Path,
    count: Callable[[int, int], int],
    proved: Callable[..., None],
) -> None:
    """Over 1, 2 and 4 ranks with 0 to 2 DataLoader workers each, other numbers at each start."""
    from kill_runs import SHARD_ROWS, kill_and_resume

    kills = count(2, 100)
    tally = kill_and_resume(dumps, tmp_path / "killed", finished, kills=kills, world_sizes=(1, 2, 4))
    assert all(tally.kills[world_size] >= kills for world_size in (1, 2, 4))
    assert len(tally.losses) == tally.kills.total()
    most = max(loss.rows for loss in tally.losses)
    assert 0 < most <= SHARD_ROWS  # 0: no kill met a process at work
    assert max(loss.shards for loss in tally.losses) == 1
    proved(
        "R1",
        kills=tally.kills.total(),
        **{f"with_{world_size}_ranks": tally.kills[world_size] for world_size in (1, 2, 4)},
        that_cost_rows=sum(loss.rows > 0 for loss in tally.losses),
        rows_of_a_shard=SHARD_ROWS,
        rows_at_most=most,
        equal_caches=tally.caches,
        resumptions=tally.resumed,
    )


@pytest.mark.parametrize("suffix", ["", ".h5"])
def test_a_writer_that_is_killed_keeps_all_but_the_shard_in_hand(
    dumps: Any, tmp_path: Path, suffix: str, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """The rows whose `write` has returned, less those in committed shards, are fewer than a shard has."""
    from kill_writers import SHARD_ROWS, kill_writer, write
    from precompute_runs import contents

    kills, rng = count(6, 50), random.Random(suffix)
    write(tmp_path / f"uninterrupted{suffix}", tmp_path / "trace")
    expected = contents(tmp_path / f"uninterrupted{suffix}")
    losses: list[int] = []
    caches = 0
    while len(losses) < kills or caches < 2:
        out = tmp_path / str(caches) / f"teacher{suffix}"
        out.parent.mkdir()
        while (lost := kill_writer(out, rng, may_kill=len(losses) < kills)) is not None:
            losses.append(lost)
        assert contents(out) == expected
        caches += 1
    assert 0 < max(losses) < SHARD_ROWS
    proved(
        "R1",
        kills_of_a_writer=len(losses),
        that_cost_rows=sum(lost > 0 for lost in losses),
        rows_of_a_shard=SHARD_ROWS,
        rows_at_most=max(losses),
        equal_caches=caches,
    )


def test_a_merge_that_is_killed_leaves_the_source_and_either_nothing_or_the_whole_file(
    dumps: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: Callable[[int, int], int],
    proved: Callable[..., None],
) -> None:
    """Of `kdcache.merge`, also over another file, and of the ranks of a dump that ends in one file."""
    from kill_merges import kill_merges

    monkeypatch.setenv("TASK_ROWS", "6000")  # 12 MB
    kills = count(2, 20)
    tally = kill_merges(dumps, tmp_path, kills=kills)
    assert all(tally[way] >= kills for way in ("new", "replacing", "two_ranks"))
    assert tally["in_the_middle"] > 0
    proved("R1", kills_of_a_merge=tally["new"] + tally["replacing"] + tally["two_ranks"], **tally)


def test_a_folder_whose_growth_is_killed_stays_the_cache_that_it_was_and_grows_to_the_same_bytes(
    dumps: Any, tmp_path: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """By views and samples at once, over 1, 2 and 4 ranks with 0 to 2 DataLoader workers each."""
    from kill_growth import kill_growth

    kills = count(1, 30)
    tally = kill_growth(dumps, tmp_path, kills=kills)
    assert min(tally.kills.values()) >= kills
    assert tally.seen > 0
    proved("R1", kills_of_growth=tally.kills.total(), equal_caches=tally.caches, old_cache_between=tally.seen)


def test_a_folder_that_is_healed_in_turns_keeps_its_root_and_predecessor(
    dumps: Any, tmp_path: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """A grown folder that loses shards, before and between launches over 1, 2 and 4 ranks, some of which are killed."""
    from kill_healing import kill_healing

    kills = count(1, 30)
    tally = kill_healing(dumps, tmp_path, kills=kills)
    assert min(tally.kills.values()) >= kills
    proved("R1", kills_of_healing=tally.kills.total(), equal_caches=tally.caches)
