"""Dumps that are killed at random moments and started again, and what the disk must say between two starts."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dump_history import Loss, check_history, read_events
from precompute_runs import contents, exit_codes
from precompute_task import ROWS

SUFFIXES = ("", ".h5")
SHARD_ROWS = 41
ROWS_OF = {
    f"v000-{number:05}.h5": min(SHARD_ROWS, ROWS - number * SHARD_ROWS) for number in range(-(-ROWS // SHARD_ROWS))
}
MOST_LINES = 30  # an uninterrupted dump leaves about 45 in its trace


@dataclass
class Tally:
    """What a series of kills came to.

    Attributes:
        kills: that landed, by the number of ranks of their launch.
        caches: that were finished, each compared byte for byte.
        resumed: starts on what a kill had left.
        losses: what each kill cost.
    """

    kills: Counter[int] = field(default_factory=Counter)
    caches: int = 0
    resumed: int = 0
    losses: list[Loss] = field(default_factory=list)


def committed(folder: Path) -> dict[str, tuple[int, int]]:
    """The committed shards of a dump at rest, by name: which file it is, and when it was written."""
    shards = folder / "shards"
    records = "*.h5" if (folder / "manifest.json").exists() else "*.json"  # the manifest takes their place
    names = [path.with_suffix(".h5") for path in shards.glob(records)]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in names}


def kill_and_resume(
    dumps: Any, folder: Path, finished: dict[str, dict[str, bytes]], *, kills: int, world_sizes: tuple[int, ...]
) -> Tally:
    """Starts dumps, kills some of their ranks at random moments, and starts them again with other numbers of ranks.

    Args:
        dumps: the fixture.
        folder: where.
        finished: the files of the uninterrupted cache, by the suffix of its name.
        kills: at least so many with each number of ranks.
        world_sizes: the numbers of ranks; each launch takes one of which the fewest were killed so far.
    """
    rng, tally = random.Random(kills), Tally()
    while min(tally.kills[n] for n in world_sizes) < kills or tally.caches < 2 * len(SUFFIXES):
        suffix = SUFFIXES[tally.caches % 2]
        one = Cache(dumps, folder / str(tally.caches), f"teacher{suffix}", rng, tally)
        is_finished = False
        while not is_finished:
            world_size = min(world_sizes, key=lambda n: (tally.kills[n], rng.random()))
            is_finished = one.launch(world_size, may_kill=tally.kills[world_size] < kills)
            tally.resumed += not is_finished
        assert contents(one.out) == finished[suffix]
        tally.losses += check_history(read_events(one.trace), one.killed, ROWS_OF).values()
        tally.caches += 1
    return tally


def wait_for_lines(processes: list[BaseProcess], trace: Path, lines: int) -> None:
    """Until a trace has so many lines, or its writers have ended."""
    while any(process.is_alive() for process in processes):
        if lines <= 0 or (trace.exists() and trace.read_bytes().count(b"\n") >= lines):
            return
        processes[0].join(0.002)


class Cache:
    """One cache on its way, over several launches."""

    def __init__(self, dumps: Any, folder: Path, name: str, rng: random.Random, tally: Tally) -> None:
        self.out, self.trace, self.killed = folder / name, folder / "trace", set[str]()
        self._parts = folder / f"{name}.parts" if name.endswith(".h5") else self.out
        self._dumps, self._rng, self._tally, self._launches = dumps, rng, tally, 0
        folder.mkdir(parents=True)

    def launch(self, world_size: int, *, may_kill: bool) -> bool:
        """Runs the ranks of one launch, some of which may be killed; returns whether the cache is finished."""
        before, seen = committed(self._parts), len(read_events(self.trace))
        self._launches += 1
        traced = {"TASK_TRACE": str(self.trace), "TASK_PROCESS": str(self._launches)}
        slow = self._rng.choice([{"TASK_ITEM_SECONDS": "0.001"}, {"TASK_FSYNC_SECONDS": "0.03"}])
        workers = self._rng.choice([0, 1, 2])
        ranks = self._dumps.start_ranks(self.out, world_size, workers=workers, environment={**traced, **slow})
        if may_kill:
            self._wait(ranks, seen)
            for rank in self._rng.sample(ranks, self._rng.randint(1, world_size)):
                rank.kill()
        codes = exit_codes(ranks)
        assert set(codes) <= {0, -9}
        self.killed |= {f"{self._launches}:{rank}" for rank, code in enumerate(codes) if code == -9}
        self._tally.kills[world_size] += codes.count(-9)
        self._check_kept(before, seen)
        if 0 in codes and -9 in codes:
            self._dumps.here(self.out)  # a rank that joined late and was killed may have made the emptied folder again
        return 0 in codes

    def _wait(self, ranks: list[BaseProcess], seen: int) -> None:
        """Until a random moment: some lines of the trace, counted since a busy machine stretches time, and a little."""
        wait_for_lines(ranks, self.trace, seen + self._rng.randint(0, MOST_LINES))
        ranks[0].join(self._rng.uniform(0, 0.03))

    def _check_kept(self, before: dict[str, tuple[int, int]], seen: int) -> None:
        """What was committed before a launch is the same file after it, and nobody computed any of it."""
        touched = {event.name for event in read_events(self.trace)[seen:] if event.what != "found"}
        assert not touched & before.keys(), "a committed shard was done again"
        after = committed(self._parts)
        if self._parts == self.out or after:  # else merged into one file, and cleared away
            assert {name: after.get(name) for name in before} == before
