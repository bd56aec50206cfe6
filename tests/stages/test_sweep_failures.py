"""Sweeps in which something fails: runs, processes, values, folders."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import kdcache
from kdcache.errors import (
    CorruptCacheError,
    IncompleteCacheError,
    InterruptedRunError,
    KDCacheError,
    MismatchError,
    UsageError,
)
from kdcache.stages import sweep_workers
from kdcache.stages.data import load_data
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.sweep import sweep
from kdcache.stages.sweep_options import SweepOptions

sys.path.insert(0, str(Path(__file__).parent))
from test_sweep import base_of_sweeps, one_process, pool, rows_of, teacher  # noqa: F401


@pytest.mark.usefixtures("one_process")
def test_a_run_that_diverges_is_a_row_and_one_of_a_killed_process_is_repeated(
    base: DistillOptions, tmp_path: Path
) -> None:
    base = replace(base, data="sweep_task:Deadly", check="ids")
    values = {"lr": (0.05, 1e30), "seed": (0, 1)}
    result = sweep(SweepOptions(base, values, processes=1))
    rows = rows_of(tmp_path / "sweep")
    assert Path(os.environ["KILL_ONCE"]).exists()
    errors = {name: row["error"] for name, row in rows.items() if row["error"]}
    assert (result.runs, result.failed, len(errors)) == (8, 4, 4), errors
    assert all("not finite" in error and rows[name]["lr"] == "1e+30" for name, error in errors.items())
    assert "--lr 0.05" in result.answers[0]["best"]["command"]


@pytest.mark.usefixtures("one_process")
def test_a_sweep_of_which_every_run_fails_is_an_error(base: DistillOptions, tmp_path: Path) -> None:
    base = replace(base, data="sweep_task:Broken", check="ids")
    with pytest.raises(KDCacheError, match=r"4 of 4 runs failed.*The first, 00.*FileNotFoundError: 300.png") as found:
        sweep(SweepOptions(base, {"alpha": (0.5, 0.9)}, processes=1))
    assert type(found.value) is KDCacheError
    assert all("FileNotFoundError" in row["error"] for row in rows_of(tmp_path / "sweep").values())


@pytest.mark.usefixtures("one_process")
def test_what_all_runs_fail_with_is_told_and_has_its_exit_code(base: DistillOptions, tmp_path: Path) -> None:
    path = tmp_path / "damaged.h5"
    shutil.copy(base.cache[0], path)
    with h5py.File(path) as file:
        at = file["logits"].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as bare:
        bare.seek(at + 20)
        bare.write(b"damaged")
    with pytest.raises(CorruptCacheError) as alone:
        distill(replace(base, cache=(str(path),), out=None))
    with pytest.raises(CorruptCacheError, match="runs failed") as found:
        sweep(SweepOptions(replace(base, cache=(str(path),)), {"alpha": (0.5, 0.9)}, processes=1))
    assert str(alone.value) in str(found.value)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("changed", "own", "message"),
    [
        ({"seed": (0, -1)}, {}, "the setting --seed -1: --seed must be at least 0"),
        ({}, {}, "nothing to sweep over"),
        ({}, {"alpha": 1.5}, "--alpha must be between 0 and 1"),
        ({}, {"cache": ("nope.h5",)}, "nope.h5"),
        ({}, {"student": None}, "--student"),
        ({}, {"random": 0}, "--random must be at least 1"),
        ({}, {"test": "digits:nope"}, "--test digits:nope: digits has no part 'nope'"),
        ({"alpha": (0.5, 0.9)}, {"test": "digits:nope"}, "--test digits:nope: digits has no part 'nope'"),
        ({"alpha": (0.5, 0.9)}, {"test": "npz:BARE"}, "bare.npz: the data have no labels"),
        ({"alpha": (0.5, 0.9)}, {"val": "npz:BARE"}, "bare.npz: the data have no labels"),
    ],
)
def test_refusals_come_before_the_first_run_and_nothing_to_sweep_over_comes_last(
    changed: dict[str, Any], own: dict[str, Any], message: str, base: DistillOptions, tmp_path: Path
) -> None:
    np.savez(tmp_path / "bare.npz", x=np.zeros((3, 1, 8, 8), np.float32))
    own = {name: f"npz:{tmp_path / 'bare.npz'}" if value == "npz:BARE" else value for name, value in own.items()}
    given = {name: own.pop(name) for name in ("random", "test") if name in own}
    with pytest.raises(KDCacheError) as found:
        sweep(SweepOptions(replace(base, **own), changed, processes=1, **given))
    assert message in str(found.value)
    assert not (tmp_path / "sweep" / "runs").exists()


@pytest.mark.usefixtures("one_process")
def test_alpha_0_leaves_rows_without_a_label_out(base: DistillOptions, tmp_path: Path) -> None:
    data = load_data("digits:transfer").dataset
    labels = np.array([data[at][1] for at in range(600)])
    labels[::2] = -1
    np.savez(tmp_path / "some.npz", x=np.stack([data[at][0].numpy() for at in range(600)]), y=labels)
    with kdcache.Writer(tmp_path / "some.h5", classes=10) as writer:
        writer.write(np.arange(600), np.random.default_rng(0).normal(size=(600, 10)).astype(np.float32))
    base = replace(base, data=f"npz:{tmp_path / 'some.npz'}", cache=(str(tmp_path / "some.h5"),))
    result = sweep(SweepOptions(base, {"seed": (0, 1)}, processes=1))
    rows = rows_of(tmp_path / "sweep").values()
    assert {(float(row["alpha"]) == 0, row["labelled_rows"]) for row in rows} == {(True, "300"), (False, "")}
    assert "--label-fraction 1 --unlabelled drop" in result.answers[0]["labels_only"]["command"]


def test_a_process_that_dies_twice_is_an_error(base: DistillOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(KDCacheError, match="the base of the sweep: its process died 2 times"):
        sweep(SweepOptions(base, {"alpha": (0.5, 0.9)}, processes=1))


@pytest.mark.usefixtures("one_process")
def test_what_distill_refuses_is_refused_before_the_first_run(base: DistillOptions, tmp_path: Path) -> None:
    with kdcache.Writer(tmp_path / "topk.h5", classes=10, top_k=3, temperatures=(1.0, 4.0)) as writer:
        writer.write(np.arange(700, 1300), np.random.default_rng(0).normal(size=(600, 10)).astype(np.float32))
    base = replace(base, cache=(str(tmp_path / "topk.h5"),))
    with pytest.raises(UsageError, match=r"the setting .*--loss dist"):
        sweep(SweepOptions(base, {"loss": (("kl",), ("dist",))}, processes=1))
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", [UsageError, MismatchError, CorruptCacheError, IncompleteCacheError, KDCacheError])
def test_an_error_of_a_process_has_its_kind_here_too(kind: type[KDCacheError]) -> None:
    told = sweep_workers.Answer({}, "10 classes, not 7", kind.exit_code)
    with pytest.raises(kind, match="the base of the sweep: 10 classes, not 7") as found:
        sweep_workers.refuse(told, what="the base of the sweep")
    assert type(found.value) is kind
    sweep_workers.refuse(sweep_workers.Answer({}), what="what went well")


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


@pytest.mark.usefixtures("one_process")
def test_data_without_labels_have_no_alpha_0(base: DistillOptions, tmp_path: Path) -> None:
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
