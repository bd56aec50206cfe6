"""Random batches of 256 rows of 1000 classes out of a warm page cache, into a ready buffer."""

from __future__ import annotations

from typing import Any

import pytest
from bench_data import ARRAYS, ROWS, BenchData
from bench_measure import BATCH, interleaved, ratio, rows_per_second
from bench_readers import cache_reader, memmap_reader

import kdcache


@pytest.mark.bench
@pytest.mark.parametrize(("shards", "target"), [(1, 0.80), (8, 0.5), (64, 0.3)])
def test_gathering_random_batches_against_a_memmap(data: BenchData, figures: Any, shards: int, target: float) -> None:
    cache = kdcache.open(data.one_file if shards == 1 else data.shards(shards))
    readers = {
        "ours": cache_reader(cache),
        "all": memmap_reader(data, ARRAYS),
        "logits": memmap_reader(data, ("logits",)),
    }
    for read in readers.values():
        rows_per_second(read, ROWS, most_batches=ROWS // BATCH, seconds=60)
    found = interleaved({n: lambda read=read: rows_per_second(read, ROWS) for n, read in readers.items()}, repeats=9)
    name = "one file" if shards == 1 else f"{shards} shards"
    for side, against in (("all", "memmap gather of the same four arrays"), ("logits", "memmap gather of the logits")):
        result = ratio(found["ours"], found[side])
        figures.add(f"random batches, {name}", result, f">= {target}", against=against)
