"""Writing shards, with checksums, hashes and fsync, against writing and fsyncing the same bytes to a plain file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_data import CHUNK, CLASSES, random_rows
from bench_measure import BATCH, interleaved, ratio, timed

import kdcache
from kdcache.format.encodings import Encoding, encode
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store.dump import open_dump, remove_dump
from kdcache.store.plan import Plan, default_shard_rows

SCHEMA = RowSchema(Encoding("float16", (CLASSES,)), "<i8", has_labels=True, has_digests=True)
SHARD_ROWS = default_shard_rows(SCHEMA.row_bytes)

PEAK_CHILD = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[3])
import numpy as np
import kdcache
from kdcache.store.writer import Writer
from bench_measure import anonymous_bytes

logits = np.random.default_rng(0).standard_normal((4096, 1000), dtype=np.float32)
rows, peak = int(sys.argv[2]), 0
with Writer(sys.argv[1], classes=1000, shard_rows=rows) as writer:
    writer.write(np.arange(4096), logits)
    before = anonymous_bytes()
    for start in range(4096, rows, 4096):
        writer.write(np.arange(start, start + 4096), logits)
        peak = max(peak, anonymous_bytes() - before)
print(json.dumps(peak))
"""


def encoded_rows() -> dict[str, np.ndarray]:
    """One piece of rows as they come from a device: encoded, with labels and digests."""
    ids, logits, labels = next(random_rows(CHUNK, CLASSES))
    arrays = encode(SCHEMA.encoding, logits).arrays
    return {**arrays, "sample_id": ids, "label": labels, "input_digest": ids.astype(np.uint64)}


def write_shard(folder: Path, rows: dict[str, np.ndarray]) -> None:
    """A whole shard in batches of 256, as `precompute` writes it, with its commit record and the manifest."""
    dump = open_dump(folder, Plan(SCHEMA, ClassList.of(CLASSES, None), SHARD_ROWS, SHARD_ROWS, {}))
    assert dump.claim(0, 0)
    container = dump.container(0, 0, 0, SHARD_ROWS)
    for start in range(0, SHARD_ROWS, BATCH):
        at = start % CHUNK
        batch = {name: array[at : at + BATCH] for name, array in rows.items()}
        container.append(batch, view=0, positions=np.arange(start, start + BATCH))
    record = container.record(view=0, start=0, ids=None)
    dump.commit(container, record, 0)
    dump.release(0, 0)
    dump.finish([record], samples=SHARD_ROWS)


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
    pieces = list(random_rows(4 * CHUNK, CLASSES))
    encoded = encode(SCHEMA.encoding, pieces[0][1]).arrays["logits"]
    plain = tmp_path / "plain"

    def ours() -> float:
        with kdcache.Writer(tmp_path / "cache", classes=CLASSES, overwrite=True) as writer:
            for _ in range(SHARD_ROWS // (4 * CHUNK)):
                for ids, logits, labels in pieces:
                    writer.write(ids + writer_rows(writer), logits, labels)
        return 1.0

    def writer_rows(writer: kdcache.Writer) -> int:
        return len(writer._seen) // (4 * CHUNK) * 4 * CHUNK

    count = SHARD_ROWS // (4 * CHUNK) * 4 * CHUNK
    found = interleaved(
        {
            "ours": lambda: count / timed(ours),
            "plain": lambda: SHARD_ROWS / timed(lambda: write_plain(plain, encoded, 32)),
        },
        repeats=3,
    )
    against = "writing and fsyncing the encoded bytes to a plain file"
    figures.add("kdcache.Writer from float32 arrays, rows/s", ratio(found["ours"], found["plain"]), "-", against=against)


@pytest.mark.bench
def test_memory_over_the_size_of_a_shard(tmp_path: Path, figures: Any) -> None:
    peaks = []
    for rows in (16_384, 131_072):
        child = [sys.executable, "-c", PEAK_CHILD, str(tmp_path / f"shard{rows}"), str(rows), str(Path(__file__).parent)]
        peaks.append(int(json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)))
    figures.add(
        "memory of a writer, shard of 262 MB against one of 33 MB",
        (peaks[1] - peaks[0]) / 2**20,
        "constant",
        unit="MiB more",
        against="anonymous memory after the first 4,096 rows",
        peaks=peaks,
    )
