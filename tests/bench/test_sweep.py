"""A sweep of 12 runs in 2 processes against 12 `kdcache distill` commands, one after another as a user types them.

What is saved: the second core, the import of torch (once a process, not once a run), and data that are loaded once.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_measure import interleaved, ratio

import kdcache

ROWS, PIXELS, CLASSES = 8_000, 784, 10
STEPS = os.environ.get("KDCACHE_BENCH_STEPS", "500")
TEMPERATURES, SEEDS = ("1", "2", "4", "8", "16"), ("0", "1")
LISTS = ("--alpha", "0.9", "--temperature", ",".join(TEMPERATURES), "--seed", ",".join(SEEDS))
LISTS += ("--labels-budget", "same-values")  # 12 runs


def made(folder: Path) -> tuple[str, ...]:
    """Arguments that all runs share, over data of the size of a part of MNIST."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, PIXELS))
    for name, rows in (("train", ROWS), ("val", 1_000)):
        y = rng.integers(0, CLASSES, rows)
        x = (centres[y] + 3 * rng.normal(size=(rows, PIXELS))).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=y)
        if name == "train":
            with kdcache.Writer(folder / "teacher.h5", classes=CLASSES) as writer:
                writer.write(np.arange(rows), (x @ centres.T / 100).astype(np.float32), y)
    data = ("--data", f"npz:{folder}/train.npz", "--val", f"npz:{folder}/val.npz")
    student = ("--student", f"mlp:{PIXELS}-256-{CLASSES}", "--device", "cpu", "--steps", STEPS, "--eval-steps", "250")
    return (*data, "--cache", f"{folder}/teacher.h5", *student, "--quiet")


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "kdcache", *arguments, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def settings() -> list[tuple[str, ...]]:
    """The same 12 runs as the lists make."""
    pairs = itertools.product(TEMPERATURES, SEEDS)
    taught = [("--alpha", "0.9", "--temperature", temperature, "--seed", seed) for temperature, seed in pairs]
    return [*taught, *(("--alpha", "0", "--seed", seed) for seed in SEEDS)]


@pytest.mark.bench
def test_a_sweep_in_two_processes_against_single_commands(figures: Any, bench_folder: Path) -> None:
    folder = bench_folder / "sweep"
    folder.mkdir(exist_ok=True)
    shared = made(folder)
    assert len(settings()) == 12

    def swept() -> float:
        shutil.rmtree(folder / "out", ignore_errors=True)
        begun = time.perf_counter()
        report = run("sweep", *shared, *LISTS, "--processes", "2", "--threads", "1", "--out", str(folder / "out"))
        assert (report["runs"], report["failed"]) == (12, 0)
        return time.perf_counter() - begun

    def one_by_one(*threads: str) -> float:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        begun = time.perf_counter()
        for number, setting in enumerate(settings()):
            run("distill", *shared, *setting, *threads, "--out", str(folder / "runs" / str(number)))
        return time.perf_counter() - begun

    sides = {
        "sweep": swept,
        "one thread": lambda: one_by_one("--threads", "1"),
        "all threads": one_by_one,
    }
    found = interleaved(sides, repeats=2)
    runs = f"12 runs of {STEPS} steps, sweep --processes 2 --threads 1"
    for name, target in (("one thread", "<= 0.6"), ("all threads", "-")):
        figures.add(runs, ratio(found["sweep"], found[name]), target, against=f"12 x kdcache distill, {name}")
