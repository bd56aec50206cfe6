"""Growing a finished folder by views and samples, killed at random moments and begun again with other processes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dump_history import read_events
from kill_runs import MOST_LINES, wait_for_lines
from precompute_runs import contents, exit_codes

import kdcache
from kdcache.store.verify import verify

BEFORE: dict[str, Any] = {"augment": "noise0.1", "views": 1, "limit": 120}  # 120 is no multiple of a shard's 41 rows
AFTER: dict[str, Any] = {"augment": "noise0.1", "views": 2}
WORLD_SIZES = (1, 2, 4)


@dataclass
class Tally:
    """What a series of kills came to.

    Attributes:
        kills: that landed, by the number of ranks of their launch.
        caches: that were finished, each compared byte for byte.
        seen: times that the cache of before was there, whole, between two launches.
    """

    kills: Counter[int] = field(default_factory=Counter)
    caches: int = 0
    seen: int = 0


def kill_growth(dumps: Any, folder: Path, *, kills: int) -> Tally:
    """Kills at least so many processes of launches of each size; every cache must end as the undisturbed one."""
    rng, tally = random.Random(kills), Tally()
    dumps.here(folder / "whole", **BEFORE)
    before = contents(folder / "whole")
    dumps.here(folder / "whole", **AFTER)
    after = contents(folder / "whole")
    while min(tally.kills[n] for n in WORLD_SIZES) < kills:
        out = folder / str(tally.caches)
        dumps.here(out, **BEFORE)
        assert contents(out) == before
        old = {path.name: path.stat().st_ino for path in (out / "shards").iterdir()}
        while not launch(dumps, out, rng, tally, kills):
            _check_between(out, tally)
        assert contents(out) == after
        assert {name: (out / "shards" / name).stat().st_ino for name in old} == old
        tally.caches += 1
    return tally


def launch(dumps: Any, out: Path, rng: random.Random, tally: Tally, kills: int) -> bool:
    """Runs the ranks of one launch, some of which are killed; returns whether one has finished."""
    world_size = min(WORLD_SIZES, key=lambda n: (tally.kills[n], rng.random()))
    trace = out.parent / f"{out.name}.trace"
    seen = len(read_events(trace))
    environment = {"TASK_TRACE": str(trace), "TASK_ITEM_SECONDS": "0.001"}
    workers = rng.choice([0, 1, 2])
    ranks = dumps.start_ranks(out, world_size, workers=workers, environment=environment, **AFTER)
    if tally.kills[world_size] < kills:
        wait_for_lines(ranks, trace, seen + rng.randint(0, MOST_LINES))
        ranks[0].join(rng.uniform(0, 0.03))
        for rank in rng.sample(ranks, rng.randint(1, world_size)):
            rank.kill()
    codes = exit_codes(ranks)
    assert set(codes) <= {0, -9}, codes
    tally.kills[world_size] += codes.count(-9)
    if 0 in codes:
        dumps.here(out, **AFTER)  # a rank that was killed right after another had finished may have left its plan
    return 0 in codes


def _check_between(out: Path, tally: Tally) -> None:
    """At every moment the folder is the cache of before, or the one of after."""
    with kdcache.open(out) as cache:
        is_old = cache.views == (0,)
        assert cache.num_samples == (120 if is_old else 203)
    assert verify(out).ok
    tally.seen += is_old
