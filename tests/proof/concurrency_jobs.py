"""Data sets, readers and writers for several processes; what a row holds follows from its id and the dump's number.

Ids are neither consecutive nor in order, so that a row that is taken by position, or from the shard beside, is seen.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import kdcache
from kdcache.errors import KDCacheError
from kdcache.format.dense import Dense
from kdcache.format.identity import input_digest
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store.dump import open_dump
from kdcache.store.plan import Plan
from kdcache.store.shards import TEMPORARY_PREFIX

ROWS, CLASSES, SHARD_ROWS = 1000, 12, 300
IDS = np.random.default_rng(0).permutation(ROWS).astype(np.int64) * 3 + 5  # in stored order


def logits_of(ids: np.ndarray, number: int = 0) -> np.ndarray:
    """(N, C) float32, quarters that float16 holds exactly, of dump `number`."""
    codes = ids[:, None].astype(np.int64) * 1_000_003 + np.arange(CLASSES) * 7919 + number * 104_729
    return ((codes >> 3) % 512).astype(np.float32) / 4


def inputs_of(ids: np.ndarray) -> np.ndarray:
    """(N, 3) float32."""
    return np.sin(ids[:, None] * np.array([0.37, 1.1, 2.3])).astype(np.float32)


def write(path: Path, *, number: int = 0, overwrite: bool = False, ids: np.ndarray = IDS) -> None:
    """A cache of dump `number`; 4 shards."""
    digests = np.array([input_digest(x) for x in inputs_of(ids)], np.uint64)
    provenance = {"data": {"name": "proof", "digest_point": "item"}}
    with kdcache.Writer(
        path, classes=CLASSES, shard_rows=SHARD_ROWS, overwrite=overwrite, provenance=provenance
    ) as writer:
        for start in range(0, len(ids), 250):
            part = slice(start, start + 250)
            writer.write(ids[part], logits_of(ids[part], number), ids[part] % CLASSES, input_digests=digests[part])


def plan() -> Plan:
    """The plan of a dump whose number of rows is known, as `precompute` makes one."""
    schema = RowSchema(Dense((CLASSES,), "float16"), "<i8", has_labels=True, has_digests=False)
    return Plan(schema, ClassList.of(CLASSES, None), SHARD_ROWS, ROWS, {})


def dump(folder: Path) -> int:
    """Starts a dump, or goes on with it, or mends one that lacks a shard; returns the shards written."""
    work, made = open_dump(folder, plan()), 0
    try:
        for index in range(work.plan.shard_count):
            view, start, stop = work.plan.span(index)
            if not work.finished and work.claim(view, index):
                container = work.container(view, index, start, stop)
                rows = {"sample_id": IDS[start:stop], "label": IDS[start:stop] % CLASSES}
                rows |= work.plan.schema.encoding.encode(logits_of(IDS[start:stop])).arrays
                container.append(rows, view=view, positions=np.arange(start, stop))
                work.commit(container, container.record(view=view, start=start, ids=None), index)
                work.release(view, index)
                made += 1
        records = work.all_records()
        if not work.finished and records is not None:
            work.finish(records, samples=ROWS)
    finally:
        work.leave()
    return made


@dataclass
class Seen:
    """What a reader found: rows that were right, errors by place and type; wrong rows end it."""

    rows: int = 0
    opened: Counter[str] = field(default_factory=Counter)
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: str = ""

    def plus(self, other: Seen) -> Seen:
        """Both together."""
        return Seen(
            self.rows + other.rows, self.opened + other.opened, self.errors + other.errors, self.wrong or other.wrong
        )


def check_rows(cache: kdcache.Cache, rows: np.ndarray, numbers: range) -> int:
    """Reads rows and compares every value; returns the number of the dump that they are all of."""
    stored, wanted = cache.gather(rows), IDS[rows]
    dense = stored.dense()
    number = next((n for n in numbers if np.array_equal(dense[:1], logits_of(wanted[:1], n))), -1)
    if number < 0 or not np.array_equal(dense, logits_of(wanted, number)):
        raise AssertionError(f"{cache.path.name}: wrong logits, of no dump or of several")
    if not np.array_equal(stored.sample_id, wanted) or not np.array_equal(stored.label, wanted % CLASSES):
        raise AssertionError(f"{cache.path.name}: wrong ids or labels")
    return number


class Reader:
    """Opens caches and reads random rows of them; `numbers` says which dumps may be at a name (else dump 0)."""

    def __init__(self, root: Path, numbers: dict[str, range], seed: int) -> None:
        self.seen = Seen()
        self._root, self._numbers, self._rng = root, numbers, np.random.default_rng(seed)
        self._open: dict[str, tuple[kdcache.Cache, int]] = {}  # with the dump that each one is of

    def names(self) -> list[str]:
        """What there is to open, finished or not."""
        hidden = (TEMPORARY_PREFIX, "end")
        return sorted(n for n in os.listdir(self._root) if not n.startswith(hidden) and not n.endswith(".parts"))

    def read(self, name: str, rows: np.ndarray, *, again: bool = False) -> None:
        """Reads rows of an open cache, or opens it (`again`: anew); typed errors are counted."""
        try:
            if again or name not in self._open:
                cache = kdcache.open(self._root / name, access=str(self._rng.choice(["mmap", "pread"])))
                self._open[name] = cache, check_rows(cache, rows, self._numbers.get(name, range(1)))
                self.seen.opened[name] += 1
            else:
                cache, first = self._open[name]
                if check_rows(cache, rows, self._numbers.get(name, range(1))) != first:
                    raise AssertionError(f"{name}: rows of another dump than before from one open cache")
            self.seen.rows += len(rows)
        except KDCacheError as error:
            self._open.pop(name, None)
            self.seen.errors[name, type(error).__name__] += 1

    def read_something(self) -> None:
        """A random batch, more often than not of one shard: the others are then opened later, if ever."""
        first = int(self._rng.integers(0, ROWS)) // SHARD_ROWS * SHARD_ROWS
        among = np.arange(ROWS) if self._rng.random() < 0.3 else np.arange(first, min(first + SHARD_ROWS, ROWS))
        rows = self._rng.choice(among, int(self._rng.integers(1, 200)))
        self.read(str(self._rng.choice(self.names())), rows, again=self._rng.random() < 0.1)
        if len(self._open) > 12:
            self._open.pop(next(iter(self._open)))[0].close()


def read(root: Path, numbers: dict[str, range], seed: int, answer: Connection) -> None:
    """Reads until a file `end` appears; sends a word when it has begun, and a `Seen` in the end.

    What was there in the beginning is opened then, one shard of it, and read in full after the end.
    """
    early, reader = Reader(root, numbers, seed), Reader(root, numbers, seed)
    try:
        for name in early.names():
            early.read(name, np.arange(10))
        answer.send("begun")
        while not (root / "end").exists() or not any(name.startswith("new") for name in reader.seen.opened):
            reader.read_something()
        for name in sorted(early.seen.opened):
            early.read(name, np.arange(ROWS))
    except AssertionError as error:
        reader.seen.wrong = str(error)
    answer.send(reader.seen.plus(early.seen))


def publish(root: Path, rounds: int, answer: Connection) -> None:
    """Beside the readers: dumps that are made, finished and merged, shards added, a cache mended, one replaced."""
    for turn in range(1, rounds + 1):
        write(root / f"new-{turn}")
        write(root / f"new-{turn}.h5")
        dump(root / "growing")
        lost = root / "growing" / "shards" / f"v000-0000{turn % 4}.h5"
        lost.unlink()
        assert dump(root / "growing") == 1
        extra = root / "stable" / "shards" / f"v001-{turn:05d}.h5"
        temporary = extra.with_name(f"{TEMPORARY_PREFIX}{extra.name}-{os.getpid()}-00000000")
        temporary.write_bytes((root / "stable" / "shards" / "v000-00000.h5").read_bytes())
        temporary.rename(extra)
        write(root / "replaced", number=turn, overwrite=True)
        write(root / "replaced.h5", number=turn, overwrite=True)
    answer.send(rounds)


def compute(root: Path, rounds: int, answer: Connection) -> None:
    """The same with `precompute`, several processes of which share each dump."""
    from concurrency_data import Answers
    from torch import nn

    settings: dict[str, Any] = {"shard_rows": SHARD_ROWS, "batch_size": 70, "device": "cpu", "threads": 1}
    for turn in range(1, rounds + 1):
        for suffix in ("", ".h5"):
            kdcache.precompute(nn.Identity(), Answers(), root / f"new-computed-{turn}{suffix}", quiet=True, **settings)
    answer.send(rounds)


def start(context: Any, target: Any, *arguments: Any) -> Any:
    """Runs a job in a process; each call of what it returns waits for the next thing that it sends."""
    answer, other = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, other))
    process.start()
    other.close()
    return answer.recv
