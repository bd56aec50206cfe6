"""A `Writer` in processes that are killed at random moments, one after another; a trace tells how far each came."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
from kill_runs import committed, wait_for_lines
from precompute_runs import DATE, FORKS, exit_codes

from kdcache.errors import UsageError
from kdcache.store.writer import Writer

ROWS, CLASSES, SHARD_ROWS, BATCH_ROWS = 203, 7, 40, 13
PAUSE_SECONDS = 0.002  # between two batches: the writer alone would be done before anybody could kill it
MOST_LINES = 12  # an uninterrupted writer leaves 17 in its trace


def table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, logits and labels of all rows."""
    logits = np.sin(np.arange(ROWS * CLASSES, dtype=np.float32)).reshape(ROWS, CLASSES)
    return np.arange(ROWS) * 3, logits, np.arange(ROWS) % CLASSES


def write(out: Path, trace: Path) -> None:
    """Goes on with a cache, batch by batch; `trace` gets how many rows were found, then how many are written."""
    os.environ.update(DATE)
    ids, logits, labels = table()
    with trace.open("a", buffering=1) as told:
        try:
            with Writer(out, classes=CLASSES, shard_rows=SHARD_ROWS, resume=True) as writer:
                first = len(writer.done)
                assert (writer.done == ids[:first]).all()
                told.write(f"found {first}\n")
                for start in range(first, ROWS, BATCH_ROWS):
                    rows = slice(start, start + BATCH_ROWS)
                    writer.write(ids[rows], logits[rows], labels[rows])
                    told.write(f"written {min(ROWS, start + BATCH_ROWS)}\n")
                    time.sleep(PAUSE_SECONDS)
        except UsageError as error:  # it was killed after the last rename
            if "is finished" not in str(error):
                raise


def kill_writer(out: Path, rng: random.Random, *, may_kill: bool) -> int | None:
    """One start of a writer; returns how many written rows a kill cost, None where it finished instead."""
    parts = out.with_name(f"{out.name}.parts") if out.suffix else out
    trace = out.with_name("trace")
    before, rows_before, seen = committed(parts), _committed_rows(parts), len(_lines(trace))
    process = FORKS.Process(target=write, args=(out, trace))
    process.start()
    if may_kill:
        wait_for_lines([process], trace, seen + rng.randint(0, MOST_LINES))
        process.join(rng.uniform(0, 2 * PAUSE_SECONDS))
        process.kill()
    code = exit_codes([process])[0]
    assert code in (0, -9)
    told = _lines(trace)[seen:]
    if told and before:
        assert told[0] == ("found", rows_before)
    after = committed(parts)
    if after or not out.is_file():
        full = {name: which for name, which in before.items() if name in _full(rows_before)}
        assert {name: after.get(name) for name in full} == full, "a committed shard was written again"
    if code == 0:
        return None
    if out.is_file():
        return 0
    return max(0, max([rows for _, rows in told], default=0) - _committed_rows(parts))


def _committed_rows(parts: Path) -> int:
    """Rows that a resumption may count on: of full shards, one behind the other; all once there is a manifest."""
    if (parts / "manifest.json").exists():
        return ROWS
    names = committed(parts)
    full = ROWS // SHARD_ROWS
    return SHARD_ROWS * next((n for n in range(full) if f"v000-{n:05}.h5" not in names), full)


def _full(rows: int) -> set[str]:
    return {f"v000-{number:05}.h5" for number in range(rows // SHARD_ROWS)}


def _lines(trace: Path) -> list[tuple[str, int]]:
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [(what, int(rows)) for what, rows in map(str.split, lines)]
