"""What the trace of a dump must say, whoever was killed (`precompute_trace` writes it).

Each shard is computed by one process at a time, and a process computes one shard after the other is committed. It is
computed and published again only where the process before was killed with that shard in hand; a committed one is never
touched. There is one manifest, and one file of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ONE_COPY = ("manifest.json", "teacher.h5")


@dataclass(frozen=True)
class Event:
    """One line: process `who` did `what` to the file `name`; of `computed`, samples [start, stop)."""

    who: str
    what: str
    name: str
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Loss:
    """What one kill cost: rows that had been computed and had to be again, in how many shards."""

    rows: int
    shards: int


def read_events(path: Path) -> list[Event]:
    """All lines in the order they were written; none if nothing was."""
    if not path.exists():
        return []
    lines = [line.split() for line in path.read_text().splitlines()]
    return [Event(who, what, name, *map(int, rows)) for who, what, name, *rows in lines]


def check_history(events: list[Event], killed: set[str], rows_of: dict[str, int]) -> dict[str, Loss]:
    """Checks the trace of one finished dump.

    Args:
        events: of all its processes, over all resumptions.
        killed: the names of those that were killed.
        rows_of: of each shard, by file name.

    Returns:
        What each of the killed processes lost.
    """
    for name in ONE_COPY:
        assert sum(e.what == "published" and e.name == name for e in events) <= 1, f"{name} was published twice"
    assert any(e.name == "manifest.json" for e in events)
    for who in {e.who for e in events}:
        _check_one_in_hand([e for e in events if e.who == who])
    lost: dict[str, list[int]] = {who: [] for who in killed}
    for name, rows in rows_of.items():
        of_shard = [e for e in events if e.name == name]
        *before, last = _owners(of_shard)
        assert set(before) <= killed, f"{name} was begun by {before}, of whom only {killed} were killed, then by {last}"
        done = {who: [e for e in of_shard if e.who == who and e.what == "computed"] for who in (*before, last)}
        for who, batches in done.items():
            assert len({e.start for e in batches}) == len(batches), f"{who} computed rows of {name} twice"
        assert sum(e.stop - e.start for e in done[last]) == rows, f"{last} did not compute all of {name}"
        for who in before:
            assert not any(e.who == who and e.what == "committed" for e in of_shard), f"{name} was done again"
            lost[who].append(sum(e.stop - e.start for e in done[who]))
        publishers = [e.who for e in of_shard if e.what == "published"]
        assert len(set(publishers)) == len(publishers)
        assert publishers[-1:] == [last], f"{last} computed {name}, {publishers} published it"
    return {who: Loss(sum(counts), len(counts)) for who, counts in lost.items()}


def _check_one_in_hand(of_process: list[Event]) -> None:
    """A process computes no row before the shard of its last one is committed."""
    in_hand = None
    for event in of_process:
        if event.what == "computed":
            assert in_hand in (None, event.name), f"{event.who} began {event.name} before {in_hand} was committed"
            in_hand = event.name
        elif event.what == "committed":
            assert in_hand == event.name
            in_hand = None


def _owners(of_shard: list[Event]) -> list[str]:
    """The processes that worked on a shard, each once, in their order."""
    owners = [who for who, _ in groupby(of_shard, key=lambda e: e.who)]
    assert len(set(owners)) == len(owners), f"{of_shard[0].name} was in two hands at once: {owners}"
    return owners
