"""What it costs to check each row's checksum when a process first touches it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bench_data import ROWS, BenchData
from bench_measure import BATCH, interleaved, timed

import kdcache


def epoch(data: BenchData, *, checked: bool) -> None:
    order = np.random.default_rng(1).permutation(ROWS)
    with kdcache.open(data.one_file) as cache:
        if not checked:
            cache._left_to_check = 0  # there is no option for it, and shall be none
        buffer = cache.gather(order[:BATCH])
        for start in range(BATCH, ROWS - BATCH, BATCH):
            cache.gather(order[start : start + BATCH], out=buffer)


@pytest.mark.bench
def test_the_first_epoch_with_and_without_checks(data: BenchData, figures: Any) -> None:
    found = interleaved(
        {
            "checked": lambda: timed(lambda: epoch(data, checked=True)),
            "unchecked": lambda: timed(lambda: epoch(data, checked=False)),
        },
        repeats=9,
    )
    costs = np.subtract(found["checked"], found["unchecked"]) / ROWS * 1e6
    low, middle, high = np.quantile(costs, (0.25, 0.5, 0.75))
    figures.add(
        "checks on the first touch of a row, 1000 float16",
        float(middle),
        "<= 1",
        unit="us a row",
        against="the same epoch without checks",
        low=float(low),
        high=float(high),
    )
