"""Sweeps in which something fails: runs, processes, values, folders."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdcache
from kdcache.errors import InterruptedRunError, KDCacheError, MismatchError, UsageError
from kdcache.stages import sweep_workers
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.sweep import sweep
from kdcache.stages.sweep_options import SweepOptions

sys.path.insert(0, str(Path(__file__).parent))
from test_sweep import base_of_sweeps, rows_of, teacher  # noqa: F401


def test_a_run_that_diverges_is_a_row_and_the_others_go_on(base: DistillOptions, tmp_path: Path) -> None:
    values = {"lr": (0.05, 1e30), "seed": (0, 1)}
    result = sweep(SweepOptions(base, values, processes=1))
    assert (result.runs, result.failed) == (8, 4)
    rows = rows_of(tmp_path / "sweep")
    assert {row["lr"] for row in rows.values() if "not finite" in row["error"]} == {"1e+30"}
    assert "--lr 0.05" in result.answers[0]["best"]["command"]


def test_the_run_of_a_killed_process_is_repeated_once(
    base: DistillOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILL_ONCE", str(tmp_path / "killed"))
    base = replace(base, data="sweep_task:Deadly", check="ids")
    result = sweep(SweepOptions(base, {"alpha": (0.5, 0.9)}, processes=1))
    assert (tmp_path / "killed").exists()
    assert (result.runs, result.failed) == (3, 0)


def test_a_process_that_dies_twice_is_an_error_of_its_run(
    base: DistillOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILL_ONCE", "/proc/never/there")  # cannot be made: an error of the data set, every time
    base = replace(base, data="sweep_task:Deadly", check="ids")
    with pytest.raises(KDCacheError, match="3 of 3 runs failed"):
        sweep(SweepOptions(base, {"alpha": (0.5, 0.9)}, processes=1))
    assert all("FileNotFoundError" in row["error"] for row in rows_of(tmp_path / "sweep").values())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(KDCacheError, match="the base of the sweep: its process died 2 times"):
        sweep(SweepOptions(replace(base, out=str(tmp_path / "dead")), {"alpha": (0.5, 0.9)}, processes=1))


def test_what_distill_refuses_is_refused_before_the_first_run(base: DistillOptions, tmp_path: Path) -> None:
    with kdcache.Writer(tmp_path / "topk.h5", classes=10, top_k=3, temperatures=(1.0, 4.0)) as writer:
        writer.write(np.arange(700, 1300), np.random.default_rng(0).normal(size=(600, 10)).astype(np.float32))
    cases: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
        ({"cache": (str(tmp_path / "topk.h5"),)}, {"loss": (("kl",), ("dist",))}, UsageError, "setting .*--loss dist"),
        ({"student": "mlp:64-16-7"}, {"alpha": (0.1, 0.5)}, MismatchError, "the base of the sweep: .*classes"),
    ]
    for changed, values, error, message in cases:
        with pytest.raises(error, match=message):
            sweep(SweepOptions(replace(base, **changed), values, processes=1))
        assert [path.name for path in (tmp_path / "sweep").iterdir()] == [".lock"]


def test_folders_of_others_are_refused(base: DistillOptions, tmp_path: Path) -> None:
    options = SweepOptions(base, {"alpha": (0.5, 0.9)}, processes=1)
    out = tmp_path / "sweep"
    out.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        sweep(options)
    out.unlink()
    out.mkdir()
    (out / "cat.png").touch()
    with pytest.raises(UsageError, match=r"holds 'cat.png'"):
        sweep(options)
    (out / "cat.png").unlink()
    (out / "sweep.json").write_text('{"kdcache_sweep": 2}')
    with pytest.raises(KDCacheError, match="no record of a sweep of format 1"):
        sweep(replace(options, base=replace(base, resume=True)))


def test_a_stop_that_is_asked_for_ends_the_processes(base: DistillOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = sweep_workers.StopRequest()
    with sweep_workers.Workers(1, stop) as workers:
        processes = [worker.process for worker in workers._workers]
        stop.note(15)
        with pytest.raises(InterruptedRunError, match="SIGTERM"):
            list(workers.answers([sweep_workers.Task("check", base)]))
    assert all(process.returncode is not None for process in processes)


def test_data_without_labels_have_no_alpha_0(base: DistillOptions, tmp_path: Path) -> None:
    from kdcache.stages.data import load_data

    data = load_data("digits:transfer")
    np.savez(tmp_path / "bare.npz", x=np.stack([data.dataset[at][0].numpy() for at in range(600)]))
    with kdcache.Writer(tmp_path / "bare.h5", classes=10) as writer:
        writer.write(np.arange(600), np.random.default_rng(0).normal(size=(600, 10)).astype(np.float32))
    base = replace(base, data=f"npz:{tmp_path / 'bare.npz'}", cache=(str(tmp_path / "bare.h5"),), alpha=1.0)
    result = sweep(SweepOptions(base, {"temperature": (1.0, 4.0)}, processes=1))
    assert (result.runs, result.failed) == (2, 0)
    assert result.answers[0]["labels_only"] is None
    assert any("no alpha 0 to compare with" in line for line in result.lines)


def test_a_launcher_of_ranks_is_refused(base: DistillOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        sweep(SweepOptions(base, {"alpha": (0.5, 0.9)}))
