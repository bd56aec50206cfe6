"""The views of a dump come out of every student's DataLoader bit for bit, pixels, row and labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import view_jobs

SUITES = [
    "torch",
    pytest.param("torchvision", marks=pytest.mark.interop("torchvision")),
    pytest.param("albumentations", marks=pytest.mark.interop("albumentations")),
    pytest.param("timm", marks=pytest.mark.interop("timm", "torchvision")),
]
HERE = Path(__file__).parent


@pytest.mark.parametrize("suite", SUITES)
def test_views_are_those_of_the_dump_in_one_process_and_in_workers(
    suite: str, tmp_path: Path, proved: Callable[..., None]
) -> None:
    expected = view_jobs.dump(suite, tmp_path)
    assert len(set(expected.values())) > 0.9 * len(expected)  # views differ: a flip of one of two may not
    for cell, world, batch_size in (((0, None), 1, 3), ((2, "fork"), 2, 8)):
        found: dict[str, str] = {}
        for rank in range(world):
            found |= view_jobs.load(suite, tmp_path, cell, rank=rank, world=world, batch_sizes=[batch_size])
        assert found == expected
    proved("V1", pipelines=len(view_jobs.SUITES[suite]), views=len(expected), cells=2)


@pytest.mark.long
@pytest.mark.parametrize("suite", SUITES)
def test_views_are_those_of_the_dump_whatever_workers_start_method_ranks_and_batch_size(
    suite: str, tmp_path: Path, proved: Callable[..., None]
) -> None:
    expected = view_jobs.dump(suite, tmp_path)
    for world in (1, 2):
        parts = [_rank(suite, tmp_path, rank, world) for rank in range(world)]
        for cell in parts[0]:
            found = {key: value for part in parts for key, value in part[cell].items()}
            assert sum(len(part[cell]) for part in parts) == len(expected)
            assert found == expected, f"{cell} of {world}"
        assert len(parts[0]) == len(view_jobs.CELLS) == 7
    proved("V1", pipelines=len(view_jobs.SUITES[suite]), views=len(expected), cells=7 * 2 * 2)


def _rank(suite: str, folder: Path, rank: int, world: int) -> dict[str, dict[str, Any]]:
    """What one rank in a process of its own has loaded, by workers and start method."""
    out = folder / f"rank{rank}of{world}.json"
    command = [sys.executable, "-W", "error", "-c", "import view_jobs; view_jobs.main()"]
    command += [suite, str(folder), str(rank), str(world), str(out), json.dumps(view_jobs.CELLS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    if suite != "torch":
        command[1:3] = []  # foreign packages warn about their own affairs
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found
