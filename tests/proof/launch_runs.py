"""Several launches of one dump at once, some of which are killed; and one that stays at work while others come."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import precompute_task as task
from dump_history import check_history, read_events
from kill_runs import ROWS_OF, SUFFIXES, wait_for_lines
from precompute_runs import DATE, FORKS, HERE, contents, exit_codes

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def share(
    dumps: Any, folder: Path, finished: dict[str, dict[str, bytes]], *, launches: int, rounds: int
) -> Counter[str]:
    """Starts so many launches at once, again and again; in every second round one is killed at a random moment.

    Returns:
        Counts: `rounds`, without those whose kill came too late; `kills`; and `shared`, the rounds in which several
        launches computed rows.
    """
    rng, tally = random.Random(rounds * launches), Counter[str]()
    while tally["rounds"] < rounds:
        out = folder / str(tally.total()) / f"teacher{SUFFIXES[tally['rounds'] // 2 % 2]}"
        trace = out.with_name("trace")
        out.parent.mkdir(parents=True)
        may_kill = bool(tally["rounds"] % 2)
        traced = {"TASK_TRACE": str(trace), "TASK_ITEM_SECONDS": "0.001" if may_kill else "0"}
        processes = [
            dumps.start(out, workers=rng.choice([0, 0, 1]), environment={**traced, "TASK_PROCESS": str(n)})
            for n in range(launches)
        ]
        if may_kill:
            wait_for_lines(processes, trace, rng.randint(1, 20))
            rng.choice(processes).kill()
        codes = exit_codes(processes)
        assert set(codes) <= {0, -9}
        tally["rounds"] += may_kill == (-9 in codes)
        tally["kills"] += codes.count(-9)
        tally["too_late"] += may_kill and -9 not in codes
        if -9 in codes:
            dumps.here(out)  # one that joined late and was killed may have made the emptied folder again
        tally["shared"] += check(out, finished, killed={f"{n}:0" for n, code in enumerate(codes) if code == -9}) > 1
    return tally


def start_both(dumps: Any, out: Path, plans: list[dict[str, Any]], rng: random.Random) -> list[set[int | None]]:
    """Starts two launches of each of several plans at once, in a random order; returns the exit codes of each plan."""
    order = rng.sample([n for n in range(len(plans)) for _ in range(2)], 2 * len(plans))
    traced = {"TASK_TRACE": str(out.with_name("trace")), "TASK_ITEM_SECONDS": "0.001"}
    processes = [dumps.start(out, environment={**traced, "TASK_PROCESS": str(n)}, **plans[n]) for n in order]
    codes = exit_codes(processes)
    return [{code for which, code in zip(order, codes, strict=True) if which == n} for n in range(len(plans))]


def check(out: Path, finished: dict[str, dict[str, bytes]], *, killed: set[str]) -> int:
    """The cache is the uninterrupted one and its trace has nothing twice; returns how many processes computed rows."""
    assert contents(out) == finished[out.suffix]
    events = read_events(out.with_name("trace"))
    check_history(events, killed, ROWS_OF)
    return len({event.who for event in events if event.what == "computed"})


def run_commands(out: Path, lines: dict[str, list[str]], *, kill: str | None = None, item_seconds: float) -> set[str]:
    """Runs command lines (what follows `python`, by a name) at once.

    Args:
        out: its trace lies beside it.
        lines: each is the name of its process in the trace.
        kill: the one to kill when it has begun to compute.
        item_seconds: to stretch the work.

    Returns:
        The names, as in the trace, of those that were killed.
    """
    trace = out.with_name("trace")
    environment = {**os.environ, **DATE, "PYTHONPATH": os.pathsep.join([HERE, *sys.path]), "TASK_TRACE": str(trace)}
    processes = {
        name: subprocess.Popen(
            [sys.executable, *line],
            env={**environment, "TASK_ITEM_SECONDS": str(item_seconds), "TASK_PROCESS": name},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for name, line in lines.items()
    }
    if kill is not None:
        while processes[kill].poll() is None and not any(e.who == f"{kill}:0" for e in read_events(trace)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[kill].wait(0.01)
        processes[kill].kill()
    errors = {name: process.communicate(timeout=120)[1] for name, process in processes.items()}
    codes = {name: process.returncode for name, process in processes.items()}
    assert set(codes.values()) <= {0, -9}, errors
    return {f"{name}:0" for name, code in codes.items() if code == -9}


@contextlib.contextmanager
def at_work(dumps: Any, out: Path, *, batches: int, **changes: Any) -> Iterator[BaseProcess]:
    """A launch that has computed so many batches and then stands still, until the block is left and it is killed."""
    here, there = FORKS.Pipe()
    process = dumps.start(out, target=dump_until_told, more=(there, batches), **changes)
    there.close()
    here.recv()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def dump_until_told(options: dict[str, Any], environment: dict[str, str], line: Connection, batches: int) -> None:
    """A dump that stops when it has computed so many batches, and says so."""
    from kdcache.stages.dump_sink import ShardSink

    put, done = ShardSink.put, 0

    def counted(self: Any, batch: Any) -> None:
        nonlocal done
        if done == batches:
            line.send(None)
            line.recv()
        done += 1
        put(self, batch)

    ShardSink.put = counted
    task.dump(options, environment)
