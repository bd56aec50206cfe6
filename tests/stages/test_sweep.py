"""Sweeps in processes of their own: the same weights as single runs, failures, kills, stops and refusals."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import kdcache
from kdcache.errors import KDCacheError, MismatchError, UsageError
from kdcache.stages import sweep as sweep_module
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.signals import StopRequest
from kdcache.stages.sweep import SweepResult, sweep
from kdcache.stages.sweep_folder import Table, check_same_sweep
from kdcache.stages.sweep_options import SweepOptions
from kdcache.stages.sweep_workers import Workers
from kdcache_cli.main import cli

BASE = DistillOptions(
    student="mlp:64-16-10",
    data="digits:transfer",
    val="digits:test",
    epochs=1,
    device="cpu",
    threads=1,
    quiet=True,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "teacher.h5"
    logits = np.random.default_rng(0).normal(size=(600, 10)).astype(np.float32)
    with kdcache.Writer(path, classes=10, dtype="float32") as writer:
        writer.write(np.arange(700, 1300), logits)
    return path


@pytest.fixture(scope="module")
def swept(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepOptions, SweepResult]:
    """A sweep of 2 losses, 2 seeds and alpha 0, in two processes; those who change its folder copy it."""
    base = replace(BASE, cache=(str(teacher),), out=str(tmp_path_factory.mktemp("swept") / "sweep"), quiet=False)
    values = {"alpha": (0.5,), "loss": (("kl",), ("dkd:beta=2", "js*0.5")), "seed": (0, 1)}
    options = SweepOptions(base, values, processes=2, test="digits:test")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        result = sweep(options)
    assert "8 runs of 5 steps: 2 settings with the teacher, 2 of the labels alone, each with 2 seeds" in said.getvalue()
    return options, result


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One process for all sweeps of a module that use `one_process`: it takes 2 s to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("KILL_ONCE", str(tmp_path_factory.mktemp("killed") / "flag"))
        with Workers(1, StopRequest()) as workers:
            yield workers


@pytest.fixture
def one_process(pool: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "Workers", lambda count, stop: contextlib.nullcontext(pool))


@pytest.fixture(name="base")
def base_of_sweeps(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DistillOptions]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return replace(BASE, cache=(str(teacher),), out=str(tmp_path / "sweep"))


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "sweep.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


def test_runs_are_those_of_the_printed_commands_bit_for_bit(swept: tuple[SweepOptions, SweepResult]) -> None:
    result = swept[1]
    assert (result.runs, result.labels_only_runs, result.failed, result.steps) == (8, 4, 0, 5)
    rows = rows_of(result.out)
    settings = [("0.5", "kl", "0.0"), ("0.5", "dkd:beta=2;js*0.5", "0.0"), ("0.0", "kl", "0.0"), ("0.0", "kl", "0.1")]
    assert sorted((row["alpha"], row["loss"], row["label_smoothing"], row["seed"]) for row in rows.values()) == sorted(
        (*setting, seed) for setting in settings for seed in ("0", "1")
    )
    assert {row["steps"] for row in rows.values()} == {"5"}
    [answer] = result.answers
    for place in ("best", "labels_only"):
        chosen = answer[place]
        words = shlex.split(chosen["command"])
        assert words[:2] == ["kdcache", "distill"]
        done = CliRunner().invoke(cli, [*words[1:], "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["last"]["val_accuracy"] == chosen["values"][0] == float(named(rows, chosen, 0))
        mine = torch.load(Path(json.loads(done.stdout)["out"]) / "last.pt", weights_only=True)
        name = next(name for name, row in rows.items() if row["seed"] == "0" and is_of(row, chosen))
        theirs = torch.load(result.out / "runs" / name / "last.pt", weights_only=True)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        # The test set is the validation set here, so that both must say the same.
        assert chosen["test"]["mean"] == pytest.approx(chosen["mean"], abs=1e-12)
    for path in result.out.glob("runs/*/run.json"):  # all labels are used: plain runs, to compare with any other
        options = json.loads(path.read_text())["options"]
        assert (options["label_fraction"], options["unlabelled"]) == (None, None)
    assert answer["difference"]["mean"] == pytest.approx(answer["best"]["mean"] - answer["labels_only"]["mean"])
    record = json.loads((result.out / "sweep.json").read_text())
    assert record["status"] == "done"
    assert str(result.out.parent) not in json.dumps(record["identity"])


def is_of(row: dict[str, str], chosen: dict[str, Any]) -> bool:
    same_loss = row["loss"] == ";".join(chosen.get("loss", ("kl",)))
    same_smoothing = float(row["label_smoothing"]) == chosen.get("label_smoothing", 0)
    return float(row["alpha"]) == chosen["alpha"] and same_smoothing and (same_loss or chosen["alpha"] == 0)


def named(rows: dict[str, dict[str, str]], chosen: dict[str, Any], seed: int) -> str:
    return next(row["val_accuracy"] for row in rows.values() if row["seed"] == str(seed) and is_of(row, chosen))


@pytest.mark.usefixtures("one_process")
def test_fractions_take_equal_steps_and_data_drawn_at_random_is_drawn_anew(
    base: DistillOptions, tmp_path: Path
) -> None:
    base = replace(base, data="sweep_task:drawn", cache=(str(noisy_cache(tmp_path)),), check="ids")
    values = {"label_fraction": (0.05, 1.0), "seed": (3, 4)}
    result = sweep(SweepOptions(base, values, processes=1))
    rows = rows_of(tmp_path / "sweep")
    assert len(rows) == result.runs == 12
    assert {row["steps"] for row in rows.values()} == {"5"}
    labelled = {(row["label_fraction"], row["labelled_rows"]) for row in rows.values()}
    assert {fraction for fraction, _ in labelled} == {"0.05", "1.0"}
    assert len(labelled) == 2
    assert [one["label_fraction"] for one in result.answers] == [0.05, 1.0]
    assert result.answers[0]["keep"]["unlabelled"] == "keep"
    assert result.answers[0]["drop"]["unlabelled"] == "drop"
    assert any("| 0.05 |" in line for line in result.lines)
    last = shlex.split(result.answers[1]["labels_only"]["command"])
    done = CliRunner().invoke(cli, [*last[1:], "--json"])
    assert json.loads(done.stdout)["last"]["val_accuracy"] == result.answers[1]["labels_only"]["values"][3]


def noisy_cache(folder: Path) -> Path:
    with kdcache.Writer(folder / "positions.h5", classes=10) as writer:
        writer.write(np.arange(600), np.random.default_rng(1).normal(size=(600, 10)).astype(np.float32))
    return folder / "positions.h5"


@pytest.mark.usefixtures("one_process")
def test_a_sweep_that_goes_on_keeps_what_is_finished_and_is_the_same(
    swept: tuple[SweepOptions, SweepResult], tmp_path: Path
) -> None:
    (options, first), out = swept, tmp_path / "sweep"
    shutil.copytree(first.out, out, ignore=shutil.ignore_patterns("best*"))
    options = replace(options, base=replace(options.base, out=str(out), quiet=True), processes=1)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/run.json")}
    with pytest.raises(UsageError, match="holds a sweep"):
        sweep(options)
    lost = out / "runs" / sorted(rows_of(out))[2]
    (lost / "run.json").unlink()
    table = (out / "sweep.csv").read_text().splitlines()
    (out / "sweep.csv").write_text("\n".join([*table[:2], table[2][:20]]))  # as a crash may leave it
    resumed = replace(options, base=replace(options.base, resume=True))
    again = sweep(resumed)
    assert json.dumps(again.to_json(), default=str) == json.dumps(first.to_json(), default=str).replace(
        str(first.out), str(out)
    )
    assert len(rows_of(out)) == 8
    assert {path for path, when in before.items() if path.stat().st_mtime_ns != when} == {lost / "run.json"}
    for changed, values, name in (
        ({"batch_size": 64}, options.values, "batch_size"),
        ({}, {**options.values, "alpha": (0.5, 0.8)}, "alpha"),
        ({}, {**options.values, "lr": (0.1, 0.2)}, "lr"),
    ):
        with pytest.raises(KDCacheError, match=name):
            sweep(replace(resumed, base=replace(resumed.base, **changed), values=values))
    with pytest.raises(KDCacheError, match="labels_budget = 'equal', this call has 'same-values'"):
        sweep(replace(resumed, labels_budget="same-values"))


def test_a_record_names_the_first_thing_that_differs() -> None:
    with pytest.raises(MismatchError, match=r"lr = 0.1, this call has 0.2"):
        check_same_sweep({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0}, out=Path("sweep"))


def test_rows_are_appended_in_one_piece(tmp_path: Path) -> None:
    table = Table(tmp_path, [{"name": "a", "alpha": 0.5}])
    table.append({"name": "b", "error": "=1+1, a\nline"})
    assert [row["error"] for row in rows_of(tmp_path).values()] == ["", "'=1+1, a\nline"]
    table.close()
