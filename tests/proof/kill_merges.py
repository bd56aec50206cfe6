"""Merges into one file that are killed at random moments: `kdcache.merge`, and the ranks that end a dump."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kill_runs import committed
from precompute_runs import DATE, FORKS, contents, exit_codes

from kdcache.store.merge import merge

WAYS = ("new", "replacing", "two_ranks")
WIDE = {"teacher": "precompute_task:wide_teacher", "data": "precompute_task:Many"}
SIZES = {"shard_rows": 2000, "batch_size": 500}


def kill_merges(dumps: Any, folder: Path, *, kills: int) -> Counter[str]:
    """Kills merges, `kills` of each of the three ways, and merges again after each kill.

    Returns:
        How many kills landed in each way; how many of them found a file half written (`in_the_middle`).
    """
    rng, tally = random.Random(kills), Counter[str]()
    source = folder / "source"
    dumps.here(source, **WIDE, **SIZES)
    begun = time.monotonic()
    merge(source, folder / "expected.h5")
    scene = Scene(dumps, source, (folder / "expected.h5").read_bytes(), time.monotonic() - begun, rng)
    before = contents(source)
    attempts = 0
    while tally[way := min(WAYS, key=lambda name: tally[name])] < kills:
        out = folder / str(attempts) / "teacher.h5"
        out.parent.mkdir()
        attempts += 1
        landed = scene.kill_ranks(out) if way == "two_ranks" else scene.kill_merge(out, replacing=way == "replacing")
        tally[way] += landed
        tally["in_the_middle"] += landed > 0 and any(out.parent.glob(".tmp-*"))
        scene.check_and_repair(out, way)
        shutil.rmtree(out.parent)
    assert contents(source) == before
    return tally


class Scene:
    """What all kills start from: a finished folder, the bytes that it merges to, and how long that takes."""

    def __init__(self, dumps: Any, source: Path, expected: bytes, seconds: float, rng: random.Random) -> None:
        self._dumps, self._source, self._expected, self._rng = dumps, source, expected, rng
        self._seconds: Callable[[], float] = lambda: rng.uniform(0, 1.2 * seconds)

    def kill_merge(self, out: Path, *, replacing: bool) -> int:
        """One `kdcache.merge`; returns how many kills landed."""
        if replacing:
            out.write_bytes(b"what was there before")
        here, there = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=merge_into, args=(self._source, out, there), kwargs={"overwrite": replacing})
        process.start()
        there.close()  # so that a process that fails to start is an error here and not a wait
        here.recv()
        process.join(self._seconds())
        process.kill()
        code = exit_codes([process])[0]
        assert code in (0, -9)
        return int(code == -9)

    def kill_ranks(self, out: Path) -> int:
        """Two ranks of a dump that lacks nothing but its one file, one or both of them killed when it is begun."""
        parts = out.with_name("teacher.h5.parts")
        shutil.copytree(self._source, parts, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))
        ranks = self._dumps.start_ranks(out, 2, environment={"TASK_ROWS": os.environ["TASK_ROWS"]}, **WIDE, **SIZES)
        while any(rank.is_alive() for rank in ranks) and not any(out.parent.glob(".tmp-*")):
            ranks[0].join(0.001)
        ranks[0].join(self._seconds())
        for rank in self._rng.sample(ranks, self._rng.randint(1, 2)):
            rank.kill()
        codes = exit_codes(ranks)
        assert set(codes) <= {0, -9}
        assert out.is_file() or (0 not in codes and committed(parts) == committed(self._source))
        return codes.count(-9)

    def check_and_repair(self, out: Path, way: str) -> None:
        """A kill leaves nothing, the old file or the whole new one under the final name; the next run ends it all."""
        left = out.read_bytes() if out.exists() else None
        assert left in (self._expected, b"what was there before" if way == "replacing" else None)
        if way == "two_ranks":
            assert self._dumps.here(out, **WIDE, **SIZES).computed == 0
        else:
            merge(self._source, out, overwrite=left is not None)
        assert contents(out) == {".h5": self._expected}


def merge_into(source: Path, out: Path, at_work: Connection, *, overwrite: bool) -> None:
    """Makes one file of a folder."""
    os.environ.update(DATE)
    at_work.send(None)
    merge(source, out, overwrite=overwrite)
