"""`kdcache report --json` against one plain sequential read and softmax of the same rows in NumPy, and its memory.

100,000 rows of 1000 classes in float16; `KDCACHE_BENCH_ROWS=1000000` takes a million (2 GB). Both sides are processes
of their own, started in turn, with the threads of the machine; the time is that of the work, without the imports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_data import CLASSES, random_rows, without_fsync
from bench_measure import interleaved, ratio

import kdcache

ROWS = int(os.environ.get("KDCACHE_BENCH_ROWS", "100000"))

PLAIN = """
import json, resource, sys, time
import h5py, numpy as np
began = time.perf_counter()
total = 0.0
for path in sys.argv[1:]:
    with h5py.File(path) as file:
        logits = file["logits"]
        for start in range(0, len(logits), 4096):
            p = logits[start : start + 4096].astype(np.float32)
            p -= p.max(axis=1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(axis=1, keepdims=True)
            total += float(p[:, 0].sum())
seconds = time.perf_counter() - began
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""

REPORT = """
import json, resource, sys, time
from kdcache.stages.report import report
from kdcache_cli.output import to_json
began = time.perf_counter()
text = to_json(report(sys.argv[1]).to_json())
seconds = time.perf_counter() - began
assert json.loads(text)["teacher"]["rows"] > 0
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


@pytest.fixture
def large_cache(bench_folder: Path) -> Iterator[Path]:
    path = bench_folder / "report"
    with without_fsync(), kdcache.Writer(path, classes=CLASSES, overwrite=True) as writer:
        for ids, logits, labels in random_rows(ROWS, CLASSES):
            writer.write(ids, logits, labels)
    yield path
    shutil.rmtree(path)


def child(code: str, *arguments: object) -> tuple[float, float]:
    """Seconds of the work and peak bytes of a process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # Somebody's OMP_NUM_THREADS (the tests' own is 1) must not decide a measurement.
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    seconds, peak = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout)
    return float(seconds), float(peak)


@pytest.mark.bench
def test_a_report_against_reading_and_softmax(large_cache: Path, figures: Any) -> None:
    peaks: list[float] = []

    def ours() -> float:
        seconds, peak = child(REPORT, large_cache)
        peaks.append(peak)
        return seconds

    shards = sorted(large_cache.glob("shards/*.h5"))
    found = interleaved({"report": ours, "plain": lambda: child(PLAIN, *shards)[0]}, repeats=5)
    figures.add(
        f"kdcache report --json, {ROWS:,} rows of {CLASSES} classes, float16",
        ratio(found["report"], found["plain"]),
        "<= 3",
        against="h5py read and softmax in NumPy, float32",
    )
    figures.add("its peak memory", max(peaks) / 2**20, "<= 1024", unit="MiB", against="-")
