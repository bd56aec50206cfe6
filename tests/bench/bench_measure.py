"""Ratios measured side by side: repeats take turns, so that a load on the machine meets every side alike.

A ratio is the median of the paired ratios of the repeats, given with their quartiles. Nothing here asserts.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 256


@dataclass(frozen=True)
class Ratio:
    """What `ours` is as a multiple of `baseline`: median and quartiles of the paired repeats, and both medians."""

    median: float
    low: float
    high: float
    ours: float
    baseline: float


def interleaved(sides: Mapping[str, Callable[[], float]], *, repeats: int = 7) -> dict[str, list[float]]:
    """Runs all sides `repeats` times in turn, every other round backwards; returns what each measured."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        names = list(sides) if repeat % 2 == 0 else list(reversed(sides))
        for name in names:
            gc.collect()
            measured[name].append(sides[name]())
    return measured


def ratio(ours: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """The paired ratios of repeats that were run by `interleaved`."""
    paired = [mine / theirs for mine, theirs in zip(ours, baseline, strict=True)]
    low, high = np.quantile(paired, (0.25, 0.75))
    return Ratio(
        statistics.median(paired), float(low), float(high), statistics.median(ours), statistics.median(baseline)
    )


def rows_per_second(
    read: Callable[[np.ndarray], Any], rows: int, *, seconds: float = 0.4, seed: int = 0, most_batches: int = 100_000
) -> float:
    """Reads random batches of 256 out of `rows` until the time is up."""
    order = np.random.default_rng(seed).permutation(rows)
    whole = len(order) // BATCH
    done, begun = 0, time.perf_counter()
    while True:
        at = done % whole * BATCH
        read(order[at : at + BATCH])
        done += 1
        spent = time.perf_counter() - begun
        if spent > seconds or done >= most_batches:
            return done * BATCH / spent


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def anonymous_bytes() -> int:
    """Anonymous memory of this process (heap and private maps, no page cache); Linux."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) * 1024


def machine() -> dict[str, Any]:
    """What the figures were measured on; no names."""
    import h5py
    import torch

    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }
