"""Anonymous memory that a reader over a 2 GB cache adds: its rows belong to the page cache, not to the process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_data import without_fsync

import kdcache

ROWS, CLASSES, PIECE = 1_000_000, 1000, 16_384

CHILD = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[2])
import numpy as np
import kdcache
from kdcache.store.cache import Cache
from bench_measure import anonymous_bytes

order = np.random.default_rng(0).permutation(1_000_000)
before = anonymous_bytes()
cache = kdcache.open(sys.argv[1])
rows = cache.rows(order)
buffer = cache.gather(rows[:256])
for start in range(256, 1_000_000 - 256, 256 * 4):
    cache.gather(rows[start : start + 256], out=buffer)
print(json.dumps({"added": anonymous_bytes() - before, "rows": len(cache), "order": order.nbytes}))
"""


@pytest.fixture
def large_cache(bench_folder: Path) -> Any:
    """2 GB in 8 shards: one piece of random logits over and over, since the values do not matter."""
    path = bench_folder / "large"
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((PIECE, CLASSES), dtype=np.float32)
    with without_fsync(), kdcache.Writer(path, classes=CLASSES, overwrite=True) as writer:
        for start in range(0, ROWS, PIECE):
            count = min(PIECE, ROWS - start)
            writer.write(np.arange(start, start + count), logits[:count])
    yield path
    shutil.rmtree(path)


@pytest.mark.bench
def test_a_reader_over_two_gigabytes(large_cache: Path, figures: Any) -> None:
    here = Path(__file__).parent
    child = [sys.executable, "-c", CHILD, str(large_cache), str(here)]
    found = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)
    figures.add(
        "anonymous memory of a reader over 2 GB (a quarter of its rows read, ids looked up)",
        (found["added"] - found["order"]) / 2**20,
        "<= 20",
        unit="MiB",
        against="before it was opened, less the (N,) row numbers that were asked for",
    )
