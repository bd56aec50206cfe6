"""`kdcache sweep`."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdcache
from kdcache.stages import sweep as sweep_module
from kdcache.stages.signals import StopRequest
from kdcache.stages.sweep_workers import Workers

BASE = ("--student", "mlp:64-16-10", "--data", "digits:transfer", "--val", "digits:test", "--device", "cpu")
FEW = ("sweep", *BASE, "--threads", "1", "--processes", "1", "--steps", "5", "--cache", "teacher.h5", "--out", "sweep")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One process, in a folder with a cache, for all sweeps that are called here: it takes 2 s to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sweeps"))
        with kdcache.Writer("teacher.h5", classes=10) as writer:
            writer.write(np.arange(700, 1300), np.random.default_rng(0).normal(size=(600, 10)).astype(np.float32))
        with Workers(1, StopRequest()) as workers:
            yield workers


@pytest.fixture(autouse=True)
def _new_folder(pool: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "Workers", lambda count, stop: contextlib.nullcontext(pool))
    shutil.rmtree("sweep", ignore_errors=True)


def test_a_sweep_prints_its_choice_as_a_command_and_as_json(run) -> None:
    lists = ("--alpha", "0.5,0.9", "--loss", "kl", "--loss", "dkd:beta=2", "--test", "digits:test")
    result = run(*FEW, *lists)
    assert result.exit_code == 0, result.stderr
    assert "alpha down, temperature across" in result.stdout
    assert "\n  kdcache distill --student mlp:64-16-10 --data digits:transfer" in result.stdout
    assert "on the test set:" in result.stdout
    again = run(*FEW, *lists, "--resume", "--json")
    assert again.exit_code == 0, again.stderr
    report = json.loads(again.stdout)
    assert (report["runs"], report["failed"], report["steps"]) == (8, 0, 5)
    assert report["labels_only_runs"] == 4
    [answer] = report["answers"]
    assert answer["best"]["command"].startswith("kdcache distill ")
    assert {"mean", "standard_error", "seeds"} <= answer["labels_only"]["test"].keys()
    with open("sweep/sweep.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to sweep over"),
        (("--random", "0"), "--random must be at least 1"),
        (("--seed", "-1,1"), "the setting --seed -1: --seed must be at least 0"),
        (("--alpha", "0.5,x"), "--alpha '0.5,x': expected numbers"),
        (("--alpha", "0.5,2"), "the setting --alpha 2: --alpha must be between 0 and 1"),
        (("--seed", "1,1"), "--seed names 1 twice"),
        (("--alpha", "0.5,0.9", "--processes", "0"), "--processes must be at least 1"),
        (("--alpha", "0.5,0.9", "--out", "."), "which is not part of a sweep"),
        (("--ce-weight", "1"), "--ce-weight"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(run, arguments: tuple[str, ...], message: str) -> None:
    result = run(*FEW, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_ctrl_c_ends_it_with_75_and_resume_goes_on(run) -> None:
    lists = ("--alpha", "0.5,0.9", "--labels-budget", "same-values", "--steps", "500", "--quiet")
    command = [sys.executable, "-m", "kdcache", *FEW, *lists]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    runs = wait_for_runs(process, 2)  # the second has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "--resume goes on" in errors
    assert "Traceback" not in errors
    assert json.loads(Path("sweep/sweep.json").read_text())["status"] == "interrupted"
    states = {path.parent.name: json.loads(path.read_text())["status"] for path in runs}
    assert set(states.values()) <= {"done", "interrupted"}
    kept = {path: path.stat().st_mtime_ns for path in runs if states[path.parent.name] == "done"}
    assert kept
    done = run(*FEW, *lists, "--resume", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["runs"] == 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with open("sweep/sweep.csv", newline="", encoding="utf-8") as file:
        assert {row["steps"] for row in csv.DictReader(file)} == {"500"}


def test_processes_end_when_the_sweep_is_killed() -> None:
    command = [sys.executable, "-m", "kdcache", *FEW, "--alpha", "0.5,0.9", "--steps", "100000", "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    [path] = wait_for_runs(process, 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    process.communicate()
    for child in map(int, children):
        wait_until(lambda child=child: not is_alive(child))
    assert json.loads(path.read_text())["status"] == "interrupted"


def wait_for_runs(process: Any, count: int) -> list[Path]:
    wait_until(lambda: len(list(Path("sweep/runs").glob("*/run.json"))) >= count or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return sorted(Path("sweep/runs").glob("*/run.json"))


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
