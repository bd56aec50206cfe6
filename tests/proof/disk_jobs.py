"""Small jobs that write to the disk, each with what it starts from, what comes after it failed, and what it leaves.

Two shards of a few rows: every call of each job can be made to fail in turn, thousands of times.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kdcache
from kdcache.errors import KDCacheError, UsageError
from kdcache.format import hdf5_header
from kdcache.format.head import HEAD_FILE
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.store import locks
from kdcache.store.card import write_card
from kdcache.store.convert import convert
from kdcache.store.export import export
from kdcache.store.inspect import describe
from kdcache.store.merge import merge
from kdcache.store.verify import verify
from kdcache.store.writer import Writer

ROWS, CLASSES, SHARD_ROWS, WIDTH = 6, 3, 4, 4
LOGITS = np.random.default_rng(5).integers(-600, 600, (ROWS, CLASSES)).astype(np.float32) / 64
OTHER_LOGITS = LOGITS + 1
LABELS = np.arange(ROWS) % CLASSES
INPUTS = np.random.default_rng(6).standard_normal((ROWS, WIDTH)).astype(np.float32)
REFUSED = "refused"
NOT_COMPARED = ("rows_per_second", "train_seconds", "started", "finished")  # times


@dataclass(frozen=True)
class Job:
    """One way to write.

    Attributes:
        name: of the job.
        out: what it makes, below the folder that holds everything.
        prepare: makes what is there before, as the other two given the folder.
        run: what fails.
        again: what a user does next.
        is_cache: whether `out` is a cache, with the rows of the undisturbed job or, before it begins, of `prepare`.
    """

    name: str
    out: str
    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    again: Callable[[Path], Any]
    is_cache: bool = True


def nothing(root: Path) -> None:
    """The job starts in an empty folder."""


def write(path: Path, *, logits: np.ndarray = LOGITS, rows: int = ROWS, **options: Any) -> None:
    """A cache by `Writer`, as a user's loop that skips what is there."""
    with Writer(path, classes=CLASSES, shard_rows=SHARD_ROWS, **options) as writer:
        done = len(writer.done)
        if done < rows:
            writer.write(np.arange(done, rows), logits[done:rows], LABELS[done:rows])


def go_on(path: Path) -> None:
    """`write` with `resume`; a cache that is finished is said to be so."""
    try:
        write(path, resume=True)
    except UsageError as error:
        if "is finished" not in str(error):
            raise


def begin(path: Path) -> None:
    """A dump with one committed shard, whose process raised in the middle of the second."""
    writer = Writer(path, classes=CLASSES, shard_rows=SHARD_ROWS)
    writer.write(np.arange(5), LOGITS[:5], LABELS[:5])
    writer.abandon()


@functools.cache
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, CLASSES)


@functools.cache
def teacher_of_two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def data() -> TensorDataset:
    return TensorDataset(torch.from_numpy(INPUTS), torch.from_numpy(LABELS))


def precompute(path: Path, **options: Any) -> Any:
    settings = {"shard_rows": SHARD_ROWS, "batch_size": 3, "device": "cpu", "threads": 1, "quiet": True}
    model = teacher_of_two_layers() if "factored" in options else teacher()
    return kdcache.precompute(model, data(), path, **settings, **options)


def precompute_factored(path: Path) -> Any:
    return precompute(path, factored="2")


def lose_the_head(path: Path) -> None:
    precompute_factored(path)
    (path / HEAD_FILE).unlink()


def lose_a_shard(path: Path) -> None:
    precompute(path)
    (path / "shards" / "v000-00001.h5").unlink()


def read(path: Path) -> None:
    """Every way to read a cache; wrong rows are an error of the test."""
    for access in ("mmap", "pread"):
        with kdcache.open(path, access=access) as cache:
            assert np.array_equal(cache.gather(np.arange(ROWS)).dense(), LOGITS)
    verify(path, raise_on_error=True)
    describe(path)


def unless_there(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A command whose file is there already says so, and promises nothing about it: `REFUSED`."""
    try:
        return call(*arguments, **options)
    except UsageError as error:
        if "exists" not in str(error):
            raise
        return REFUSED


def train(root: Path, **options: Any) -> Any:
    """Three steps with a checkpoint after each."""
    torch.manual_seed(1)
    source = root / "teacher"
    chosen = {"steps": 3, "batch_size": 4, "checkpoint_steps": 1, "log_steps": 1, "eval_steps": 2}
    where = {"out": str(root / "run"), "device": "cpu", "threads": 1, "quiet": True}
    student = nn.Sequential(nn.Linear(WIDTH, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES))
    return distill(
        DistillOptions(**{**chosen, **where, **options}),
        student=student,
        data=data(),
        cache=source,
        val=data(),
        val_cache=source,
    )


JOBS = (
    Job("writer", "a/teacher", nothing, lambda r: write(r / "a/teacher"), lambda r: go_on(r / "a/teacher")),
    Job("writer-file", "t.h5", nothing, lambda r: write(r / "t.h5"), lambda r: go_on(r / "t.h5")),
    Job("resume", "t", lambda r: begin(r / "t"), lambda r: go_on(r / "t"), lambda r: go_on(r / "t")),
    Job(
        "overwrite",
        "t",
        lambda r: write(r / "t", logits=OTHER_LOGITS),
        lambda r: write(r / "t", overwrite=True),
        lambda r: write(r / "t", overwrite=True),
    ),
    Job(
        "overwrite-file",
        "t.h5",
        lambda r: write(r / "t.h5", logits=OTHER_LOGITS),
        lambda r: write(r / "t.h5", overwrite=True),
        lambda r: write(r / "t.h5", overwrite=True),
    ),
    Job("precompute", "t", nothing, lambda r: precompute(r / "t"), lambda r: precompute(r / "t")),
    Job("precompute-file", "t.h5", nothing, lambda r: precompute(r / "t.h5"), lambda r: precompute(r / "t.h5")),
    Job("factored", "t", nothing, lambda r: precompute_factored(r / "t"), lambda r: precompute_factored(r / "t")),
    Job(
        "repair-factored",
        "t",
        lambda r: lose_the_head(r / "t"),
        lambda r: precompute_factored(r / "t"),
        lambda r: precompute_factored(r / "t"),
    ),
    Job("repair", "t", lambda r: lose_a_shard(r / "t"), lambda r: precompute(r / "t"), lambda r: precompute(r / "t")),
    Job(
        "grow-views",
        "t",
        lambda r: precompute(r / "t", augment="noise0.1"),
        lambda r: precompute(r / "t", augment="noise0.1", views=2),
        lambda r: precompute(r / "t", augment="noise0.1", views=2),
    ),
    Job(
        "grow-samples",
        "t",
        lambda r: precompute(r / "t", limit=3),
        lambda r: precompute(r / "t"),
        lambda r: precompute(r / "t"),
    ),
    Job(
        "merge",
        "b/t.h5",
        lambda r: write(r / "t"),
        lambda r: merge(r / "t", r / "b/t.h5"),
        lambda r: unless_there(merge, r / "t", r / "b/t.h5"),
    ),
    Job(
        "convert",
        "c",
        lambda r: write(r / "t"),
        lambda r: convert(r / "t", r / "c", top_k=2),
        lambda r: unless_there(convert, r / "t", r / "c", top_k=2),
    ),
    Job(
        "convert-file",
        "c.h5",
        lambda r: write(r / "t"),
        lambda r: convert(r / "t", r / "c.h5", dtype="int4"),
        lambda r: unless_there(convert, r / "t", r / "c.h5", dtype="int4"),
    ),
    Job(
        "merge-factored",
        "c",
        lambda r: precompute_factored(r / "t"),
        lambda r: merge(r / "t", r / "c"),
        lambda r: unless_there(merge, r / "t", r / "c"),
    ),
    Job(
        "export-npz",
        "t.npz",
        lambda r: write(r / "t"),
        lambda r: export(r / "t", r / "t.npz"),
        lambda r: unless_there(export, r / "t", r / "t.npz"),
        is_cache=False,
    ),
    Job(
        "export-h5",
        "e.h5",
        lambda r: write(r / "t.h5"),
        lambda r: export(r / "t.h5", r / "e.h5"),
        lambda r: unless_there(export, r / "t.h5", r / "e.h5"),
        is_cache=False,
    ),
    Job(
        "card",
        "t/README.md",
        lambda r: write(r / "t"),
        lambda r: write_card(r / "t"),
        lambda r: unless_there(write_card, r / "t"),
        is_cache=False,
    ),
    Job("read", "t", lambda r: write(r / "t"), lambda r: read(r / "t"), lambda r: read(r / "t")),
    Job("distill", "run", lambda r: write(r / "teacher"), train, lambda r: train(r, resume=True), is_cache=False),
)


def contents(root: Path) -> dict[str, bytes]:
    """Everything below a folder by its path, folders too; of the files of a run all but the times in them."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = b"/" if path.is_dir() else _content(path)
    return found


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        return json.dumps([_without_times(line) for line in lines]).encode()
    if path.name == "run.json":
        return json.dumps(_without_times(json.loads(data))).encode()
    return data


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    options = {k: v for k, v in record.get("options", {}).items() if k not in ("resume", "overwrite")}
    kept = {k: v for k, v in record.items() if k not in NOT_COMPARED}
    return {**kept, "options": options} if options else kept


def rows_of(path: Path) -> bytes | None:
    """The rows of a cache as one text, None if it is refused by an error of ours."""
    try:
        with kdcache.open(path, access="pread") as cache:
            rows = cache.gather(np.arange(len(cache)))
            logits = [rows.dense()] if cache.encoding.has_all_logits else rows.arrays.values()
            return b"|".join(a.tobytes() for a in (rows.sample_id, rows.label, *logits) if a is not None)
    except KDCacheError:
        return None


def start_afresh(patch: pytest.MonkeyPatch) -> None:
    """What makes thousands of runs in one process quick, and equal: one date, each HDF5 header built once."""
    patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    real = hdf5_header.build_layout
    build = functools.cache(real)
    for name, module in list(sys.modules.items()):
        if name.startswith("kdcache.") and vars(module).get("build_layout") is real:
            patch.setattr(module, "build_layout", build)


def end_locks() -> None:
    """Closes the lock files of all dumps, as the end of a process does."""
    for lock in locks._OPEN.values():
        os.close(lock._fd)
    locks._OPEN.clear()
