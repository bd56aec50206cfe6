"""One dump by any number of workers, ranks, parts and launches: the bytes are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdcache


@pytest.fixture
def reference(dumps: Any, tmp_path: Path) -> dict[str, bytes]:
    from precompute_runs import contents

    dumps.here(tmp_path / "reference")
    return contents(tmp_path / "reference")


@pytest.fixture
def one_file(dumps: Any, tmp_path: Path) -> dict[str, bytes]:
    from precompute_runs import contents

    dumps.here(tmp_path / "reference" / "teacher.h5")
    return contents(tmp_path / "reference" / "teacher.h5")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_workers_and_ranks_do_not_change_a_byte(
    dumps: Any, reference: dict[str, bytes], tmp_path: Path, workers: int, world_size: int
) -> None:
    from precompute_runs import contents, exit_codes

    ranks = dumps.start_ranks(
        tmp_path / "teacher", world_size, workers=workers, environment={"TASK_ITEM_SECONDS": "0.002"}
    )
    assert exit_codes(ranks) == [0] * world_size
    assert contents(tmp_path / "teacher") == reference


def test_the_parts_of_shard_i_of_n_make_the_same_cache(dumps: Any, reference: dict[str, bytes], tmp_path: Path) -> None:
    from precompute_runs import contents

    first = dumps.here(tmp_path / "teacher", shard="1/2")
    assert not first.finished
    assert first.computed == 2 * 41
    with pytest.raises(kdcache.IncompleteCacheError, match=r"not finished"):
        kdcache.open(tmp_path / "teacher")
    second = dumps.here(tmp_path / "teacher", shard="0/2")
    assert second.finished
    assert second.computed == 203 - 2 * 41
    assert contents(tmp_path / "teacher") == reference


@pytest.mark.parametrize("launch", range(4))
def test_launches_that_end_at_the_same_time_make_one_file(
    dumps: Any, one_file: dict[str, bytes], tmp_path: Path, launch: int
) -> None:
    """Without anything that slows them down they meet in the manifest, the merge and the clearing away."""
    from precompute_runs import contents, exit_codes

    out = tmp_path / "teacher.h5"
    processes = [dumps.start(out) for _ in range(4)]
    assert exit_codes(processes) == [0] * 4
    assert contents(out) == one_file


def test_the_result_names_rows_and_root_and_a_second_call_has_nothing_to_do(dumps: Any, tmp_path: Path) -> None:
    first = dumps.here(tmp_path / "teacher.h5")
    assert (first.samples, first.computed, first.finished) == (203, 203, True)
    again = dumps.here(tmp_path / "teacher.h5", workers=2)
    assert (again.root, again.computed) == (first.root, 0)
    assert kdcache.open(tmp_path / "teacher.h5").root == first.root


@pytest.mark.parametrize("left", [[], ["shards/"], [".lock"], ["shards/", ".lock"]], ids=str)
@pytest.mark.parametrize("shard", [None, "1/2"])
def test_an_empty_folder_that_a_late_rank_left_when_it_was_killed_goes_with_the_next_command(
    dumps: Any, one_file: dict[str, bytes], tmp_path: Path, left: list[str], shard: str | None
) -> None:
    """It came when the file was being finished, made the folder again, and died before it saw that all was done."""
    from precompute_runs import contents

    out = tmp_path / "reference" / "teacher.h5"
    parts = out.with_name("teacher.h5.parts")
    parts.mkdir()
    for name in left:
        (parts / name).mkdir() if name.endswith("/") else (parts / name).touch()
    assert dumps.here(out, shard=shard).computed == 0
    assert not parts.exists()
    assert contents(out) == one_file


def test_torchrun_shares_the_work(dumps: Any, reference: dict[str, bytes], tmp_path: Path) -> None:
    from precompute_runs import DATE, HERE, contents

    out = tmp_path / "teacher"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *dumps.arguments(out), "--json"],
        env={**os.environ, **DATE, "PYTHONPATH": os.pathsep.join([HERE, *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["root"] == kdcache.open(out).root  # rank 0 alone prints
    assert contents(out) == reference


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_that_dies_hangs_nobody(dumps: Any, reference: dict[str, bytes], tmp_path: Path, workers: int) -> None:
    from precompute_runs import contents, exit_codes

    fate = {"TASK_SIGNAL": "SIGKILL", "TASK_TARGET": "main", "TASK_AT": "100", "TASK_ONCE": str(tmp_path / "once")}
    ranks = dumps.start_ranks(
        tmp_path / "teacher", 2, workers=workers, environment={**fate, "TASK_ITEM_SECONDS": "0.002"}
    )
    assert sorted(exit_codes(ranks), key=str) == [-9, 0]
    assert contents(tmp_path / "teacher") == reference


def test_workers_that_outlive_their_killed_process_hold_no_lock(
    dumps: Any, reference: dict[str, bytes], tmp_path: Path
) -> None:
    from precompute_runs import contents, exit_codes

    once = tmp_path / "once"
    fate = {"TASK_SIGNAL": "SIGKILL", "TASK_TARGET": "main", "TASK_AT": "100", "TASK_ONCE": str(once)}
    assert exit_codes([dumps.start(tmp_path / "teacher", workers=2, environment=fate)]) == [-9]
    dumps.here(tmp_path / "teacher")
    os.kill(int(once.read_text()), 0)  # the orphan is there still
    assert contents(tmp_path / "teacher") == reference


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_memory_does_not_grow_with_the_rows(dumps: Any, tmp_path: Path, name: str) -> None:
    """48 MB of payload more (both sizes fill the blocks of a merge); what grows are the ids, some bytes a row."""
    from precompute_runs import exit_codes
    from precompute_task import dump_and_measure

    peaks = []
    for rows in (6_000, 30_000):
        report = tmp_path / f"{rows}"
        process = dumps.start(
            tmp_path / f"{rows}-{name}",
            target=dump_and_measure,
            more=(report,),
            environment={"TASK_ROWS": str(rows)},
            teacher="precompute_task:wide_teacher",
            data="precompute_task:Many",
            shard_rows=10_000,
            batch_size=250,
        )
        assert exit_codes([process]) == [0]
        peaks.append(int(report.read_text()))
    assert peaks[1] - peaks[0] < 24 * 1024  # the queue and the allocator scatter by 10 MB


def test_the_rows_are_those_of_the_teacher(dumps: Any, tmp_path: Path) -> None:
    import precompute_task
    import torch

    dumps.here(tmp_path / "teacher", dtype="float32")
    inputs = torch.stack([precompute_task.inputs_of(index) for index in range(203)])
    with torch.inference_mode():
        expected = precompute_task.teacher()(inputs).numpy()
    with kdcache.open(tmp_path / "teacher") as cache:
        rows = cache.gather(cache.rows(np.arange(203)))
    np.testing.assert_allclose(rows.dense(), expected, rtol=1e-5, atol=1e-6)
    assert (rows.label == np.arange(203) % 7).all()
    assert rows.input_digest is not None
