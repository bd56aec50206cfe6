"""Writing shards, with checksums, hashes and fsync, against writing and fsyncing the same bytes to a plain file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_data import CHUNK, CLASSES, random_rows
from bench_measure import BATCH, anonymous_bytes, interleaved, ratio, timed

import kdcache
from kdcache.format.dense import Dense
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store.dump import open_dump
from kdcache.store.plan import Plan, default_shard_rows
from kdcache.store.removal import remove_dump

SCHEMA = RowSchema(Dense((CLASSES,), "float16"), "<i8", has_labels=True, has_digests=True)
SHARD_ROWS = default_shard_rows(SCHEMA.row_bytes)


def encoded_rows() -> dict[str, np.ndarray]:
    """One piece of rows as they come from a device: encoded, with labels and digests."""
    ids, logits, labels = next(random_rows(CHUNK, CLASSES))
    arrays = SCHEMA.encoding.encode(logits).arrays
    return {**arrays, "sample_id": ids, "label": labels, "input_digest": ids.astype(np.uint64)}


def write_shard(
    folder: Path, rows: dict[str, np.ndarray], shard_rows: int = SHARD_ROWS, look: Callable[[], None] | None = None
) -> None:
    """A whole shard in batches of 256, as `precompute` writes it, with its commit record and the manifest."""
    dump = open_dump(folder, Plan(SCHEMA, ClassList.of(CLASSES, None), shard_rows, shard_rows, {}))
    assert dump.claim(0, 0)
    container = dump.container(0, 0, 0, shard_rows)
    for start in range(0, shard_rows, BATCH):
        at = start % CHUNK
        batch = {name: array[at : at + BATCH] for name, array in rows.items()}
        container.append(batch, view=0, positions=np.arange(start, start + BATCH))
        if look is not None:
            look()
    record = container.record(view=0, start=0, ids=None)
    if look is not None:
        look()
    dump.commit(container, record, 0)
    dump.release(0, 0)
    dump.finish([record], samples=shard_rows)


def write_plain(path: Path, logits: np.ndarray, other_bytes: int) -> None:
    """The same bytes in the same steps to a file, and one fsync."""
    rest = memoryview(bytes(other_bytes * BATCH))
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    try:
        for start in range(0, SHARD_ROWS, BATCH):
            at = start % CHUNK
            os.write(fd, memoryview(logits[at : at + BATCH]).cast("B"))
            os.write(fd, rest)
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.bench
def test_writing_a_shard(tmp_path: Path, figures: Any) -> None:
    rows = encoded_rows()
    other_bytes = SCHEMA.row_bytes - 2 * CLASSES
    folder, plain = tmp_path / "dump", tmp_path / "plain"
    megabytes = SHARD_ROWS * SCHEMA.row_bytes / 1e6

    def rate(write: Callable[[], None], clean: Callable[[], None]) -> float:
        seconds = timed(write)
        clean()
        return megabytes / seconds

    found = interleaved(
        {
            "ours": lambda: rate(lambda: write_shard(folder, rows), lambda: remove_dump(folder)),
            "plain": lambda: rate(lambda: write_plain(plain, rows["logits"], other_bytes), plain.unlink),
        },
        repeats=7,
    )
    against = "writing and fsyncing the same bytes to a plain file"
    name = f"writing a shard of {megabytes:.0f} MB, MB/s"
    figures.add(name, ratio(found["ours"], found["plain"]), ">= 0.4", against=against)


@pytest.mark.bench
def test_writing_from_float32_through_the_writer(tmp_path: Path, figures: Any) -> None:
    _, logits, labels = next(random_rows(CHUNK, CLASSES))
    encoded = SCHEMA.encoding.encode(logits).arrays["logits"]
    plain = tmp_path / "plain"

    def ours() -> None:
        with kdcache.Writer(tmp_path / "cache", classes=CLASSES, shard_rows=SHARD_ROWS, overwrite=True) as writer:
            for start in range(0, SHARD_ROWS, CHUNK):
                writer.write(np.arange(start, start + CHUNK), logits, labels)

    found = interleaved(
        {"ours": lambda: 1 / timed(ours), "plain": lambda: 1 / timed(lambda: write_plain(plain, encoded, 32))},
        repeats=3,
    )
    against = "writing and fsyncing the encoded bytes to a plain file"
    figures.add(
        "kdcache.Writer from float32 arrays, rows/s", ratio(found["ours"], found["plain"]), "-", against=against
    )


@pytest.mark.bench
def test_memory_over_the_size_of_a_shard(tmp_path: Path, figures: Any) -> None:
    rows = encoded_rows()
    peaks = []
    for shard_rows in (CHUNK, 4 * CHUNK, 32 * CHUNK):  # the first brings what is loaded once
        before = anonymous_bytes()
        seen: list[int] = []
        write_shard(tmp_path / str(shard_rows), rows, shard_rows, look=lambda seen=seen: seen.append(anonymous_bytes()))
        peaks.append(max(seen) - before)
    figures.add(
        "memory of a writer, shard of 267 MB against one of 33 MB",
        (peaks[2] - peaks[1]) / 2**20,
        "constant",
        unit="MiB more",
        against="the most anonymous memory while it is written",
        peaks=peaks,
    )
