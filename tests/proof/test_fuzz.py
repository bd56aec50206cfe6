"""Promise S2: mutated shards, headers and manifests whose checksums all fit crash nothing, hang nothing, and mislead
nobody.

Mutants are made of messages, bytes and JSON (`fuzz_changes`, `fuzz_hdf5`, `fuzz_json`), and every checksum and digest
is recomputed (`fuzz_reseal`), so that what refuses them is never a checksum. Each is opened, looked up in, gathered
from, verified and inspected (`fuzz_doors`) in a process that may use 200 MiB more than the sound caches need, and a
second of CPU time a case. What `verify` finds sound although its rows are others is read by plain h5py as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, UsageError
from kdcache.format.sealed import dump_sealed
from kdcache.store.plan import parse_plan
from kdcache.store.writer import Writer

HERE = Path(__file__).parent
CHUNKS = 20
FULL = {
    "one_file": 40_000,
    "file_header": 10_000,
    "shard": 15_000,
    "manifest": 25_000,
    "classes": 2_000,
    "head": 4_000,
    "plan": 4_000,
    "record": 4_000,
}


def child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def fuzz(folder: Path, jobs: list[str]) -> dict[str, Any]:
    """Runs mutants in a process of their own; what it counted of each target."""
    done = child("fuzz_child.py", folder, *jobs)
    if done.returncode:
        at = (folder / "at").read_text().strip() if (folder / "at").exists() else "the start"
        again = f"python tests/proof/fuzz_child.py FOLDER {at}"
        pytest.fail(f"exit code {done.returncode}, at the latest in {at} (again: {again})\n{done.stderr[-8000:]}")
    return dict(json.loads(done.stdout))


def test_the_full_count_is_what_is_promised() -> None:
    assert sum(FULL.values()) >= 100_000


@pytest.mark.parametrize("chunk", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, CHUNKS))])
def test_mutants_are_refused_or_read_as_plain_h5py_reads_them(
    chunk: int, tmp_path: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    sizes = {name: count(full // CHUNKS // 10, full // CHUNKS) for name, full in FULL.items()}
    summary = fuzz(tmp_path, [f"{name}:{chunk * size}:{size}" for name, size in sizes.items()])
    assert {name: part["cases"] for name, part in summary.items()} == sizes
    results: Counter[str] = sum((Counter(part["results"]) for part in summary.values()), Counter())
    assert results.total() == sum(sizes.values())
    assert all(
        results[kind] for kind in ("refused", "damaged", "same", "other", "finished")
    )  # all were put to the test
    compared = child("fuzz_h5py.py", tmp_path)
    assert compared.returncode == 0, f"h5py on {compared.stdout.split()[-1:]}: {compared.stderr[-3000:]}"
    agreed = int(compared.stdout.split()[-1])
    assert agreed == len(list((tmp_path / "kept").iterdir()))
    assert agreed >= results["other"]
    accepted = results["same"] + results["other"] + results["finished"]
    kinds = {"refused": results["refused"], "found_by_verify": results["damaged"], "sound": accepted}
    proved("S2", mutants=results.total(), **kinds, read_by_h5py_as_well=agreed)


def test_mutants_that_once_broke_a_promise_do_so_no_more(tmp_path: Path) -> None:
    assert fuzz(tmp_path, ["regressions:0:8"])["regressions"]["cases"] == 8


def test_a_plan_of_shards_that_libhdf5_would_lay_out_for_minutes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a shard of 1000000000 rows .* is too large"):
        Writer(tmp_path / "a", classes=3, shard_rows=10**9).write([0], np.zeros((1, 3), np.float32))
    writer = Writer(tmp_path / "b", classes=3)
    writer.write([0], np.zeros((1, 3), np.float32))
    writer.abandon()
    value = json.loads((tmp_path / "b" / "plan.json").read_bytes())
    del value["seal"]
    with pytest.raises(CorruptCacheError, match="is too large"):
        parse_plan(dump_sealed({**value, "shard_rows": 2**47}), where="plan.json")
