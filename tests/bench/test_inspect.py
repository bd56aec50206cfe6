"""`kdcache inspect` from the shell: how long one waits for an answer."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

import pytest
from bench_data import BenchData
from bench_measure import interleaved, timed

MODULES = """
import sys
from kdcache_cli.main import run
try:
    run()
except SystemExit:
    pass
print(*(name for name in sys.modules if name in ("torch", "h5py", "numpy")), file=sys.stderr)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)


@pytest.mark.bench
def test_inspect(data: BenchData, figures: Any) -> None:
    path = str(data.shards(64))
    loaded = run("-c", MODULES, "inspect", path).stderr.split()
    assert "torch" not in loaded
    found = interleaved(
        {
            "inspect": lambda: timed(lambda: run("-m", "kdcache", "inspect", path)),
            "python": lambda: timed(lambda: run("-c", "import numpy, h5py")),
        },
        repeats=9,
    )
    low, middle, high = statistics.quantiles(found["inspect"], n=4)
    against = f"python -c 'import numpy, h5py': {statistics.median(found['python']):.2f} s; loads {', '.join(loaded)}"
    figures.add("kdcache inspect, folder of 64 shards", middle, "<= 0.3", unit="s", against=against, low=low, high=high)
