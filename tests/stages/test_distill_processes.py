"""Runs that are killed, resumed, or shared by several processes: real processes, real signals."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.errors import InterruptedRunError, KDCacheError, MismatchError, UsageError
from kdcache.stages.distill import RunResult, distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.store.writer import Writer

HERE = Path(__file__).parent
CHILD = HERE / "distill_task.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the child process, importable here too; one thread, as in the child."""
    monkeypatch.syspath_prepend(str(HERE))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    import distill_task

    yield distill_task
    torch.set_num_threads(before)


@pytest.fixture
def options(tmp_path: Path, task: Any) -> DistillOptions:
    """6 steps an epoch of 17 rows, the last one of 16."""
    cache = tmp_path / "teacher"
    with Writer(cache, classes=4, dtype="float32") as writer:
        writer.write(np.arange(task.ROWS), task.teacher_logits().numpy(), task.labels().numpy())
    return DistillOptions(
        student="distill_task:student",
        data="distill_task:Task",
        val="distill_task:HeldOut",
        cache=str(cache),
        out=str(tmp_path / "run"),
        epochs=4,
        batch_size=17,
        optimizer="adamw",
        log_steps=4,
        eval_steps=5,
        device="cpu",
        quiet=True,
        seed=5,
    )


def run_child(options: DistillOptions, launcher: tuple[str, ...] = (), **environment: str) -> int:
    changed = {key: value for key, value in dataclasses.asdict(options).items() if value != _default(key)}
    path = os.pathsep.join([str(HERE), *sys.path])
    command = [sys.executable, *launcher, str(CHILD), json.dumps(changed)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=120
    )
    if done.returncode not in (0, 75, -9):
        print(done.stderr)
    return done.returncode


def _default(name: str) -> Any:
    return DistillOptions.__dataclass_fields__[name].default


def lines(folder: str | None) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    assert folder is not None
    text = (Path(folder) / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key != "rows_per_second"} for line in found]


def same_run(one: RunResult, other: RunResult) -> None:
    mine, theirs = one.student.state_dict(), other.student.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert lines(str(one.out)) == lines(str(other.out))
    assert one.best == other.best
    for name in ("best.pt", "last.pt"):
        saved, expected = (torch.load(Path(str(run.out)) / name, weights_only=True) for run in (one, other))
        assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_sigterm_in_the_middle_of_an_epoch_resumes_bit_for_bit(options: DistillOptions, tmp_path: Path) -> None:
    code = run_child(options, KILL_AT_ITEM="160", KILL_SIGNAL="SIGTERM")
    assert code == 75
    stopped = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert stopped["step"] == 10  # the step that was under way is finished; 6 make an epoch
    resumed = distill(replace(options, resume=True))
    same_run(resumed, distill(replace(options, out=str(tmp_path / "uninterrupted"))))
    assert not (tmp_path / "run" / "resume.pt").exists()


def test_sigkill_resumes_bit_for_bit_from_the_last_checkpoint(options: DistillOptions, tmp_path: Path) -> None:
    options = replace(options, checkpoint_steps=4)
    code = run_child(options, KILL_AT_ITEM="260", KILL_SIGNAL="SIGKILL")
    assert code == -9
    left = [line["step"] for line in lines(options.out)]
    stopped = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["step"]
    assert max(left) > stopped  # lines beyond the checkpoint are written again, once
    resumed = distill(replace(options, resume=True, workers=1))
    same_run(resumed, distill(replace(options, out=str(tmp_path / "uninterrupted"))))


def test_sigkill_before_the_first_checkpoint_starts_anew(options: DistillOptions, tmp_path: Path) -> None:
    assert run_child(options, KILL_AT_ITEM="40", KILL_SIGNAL="SIGKILL") == -9
    resumed = distill(replace(options, resume=True))
    same_run(resumed, distill(replace(options, out=str(tmp_path / "uninterrupted"))))


def stop_at(item: int, options: DistillOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a run in this process: the signal is real, and Python need not start again."""
    monkeypatch.setenv("KILL_AT_ITEM", str(item))
    monkeypatch.setenv("KILL_SIGNAL", "SIGINT")
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT"):
        distill(options)
    monkeypatch.delenv("KILL_AT_ITEM")


def test_every_step_is_a_place_to_stop_at(
    options: DistillOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = distill(replace(options, out=str(tmp_path / "uninterrupted")))
    for item in range(1, 24 * 16, 60):
        folder = replace(options, out=str(tmp_path / f"run{item}"))
        stop_at(item, folder, monkeypatch)
        same_run(distill(replace(folder, resume=True)), expected)


def test_another_run_is_not_resumed(
    options: DistillOptions, tmp_path: Path, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(60, options, monkeypatch)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    for change, name in [
        ({"alpha": 0.5}, "alpha"),
        ({"lr": 0.5}, "lr"),
        ({"epochs": 9}, "epochs"),
        ({"seed": 1}, "seed"),
    ]:
        with pytest.raises(MismatchError, match=f"has {name} = "):
            distill(replace(options, resume=True, **change))
    with pytest.raises(MismatchError, match="has student = "):
        distill(replace(options, resume=True), student=task.plain_student())
    with monkeypatch.context() as patch:
        patch.setattr(task, "student", task.plain_student)  # the same SPEC, and another network behind it
        with pytest.raises(MismatchError, match="written for another student"):
            distill(replace(options, resume=True))
    with Writer(tmp_path / "other", classes=4) as writer:
        writer.write(np.arange(200), np.zeros((200, 4), np.float32))
    with pytest.raises(MismatchError, match="data cache root"):
        distill(replace(options, resume=True, cache=str(tmp_path / "other")))
    with pytest.raises(UsageError, match="holds a run"):
        distill(options)
    assert distill(replace(options, overwrite=True)).steps == 24


def test_a_finished_run_is_returned_not_repeated(options: DistillOptions) -> None:
    first = distill(options)
    again = distill(replace(options, resume=True))
    same_run(again, first)
    assert again.record == json.loads((Path(str(options.out)) / "run.json").read_text())
    with pytest.raises(MismatchError, match="temperature"):
        distill(replace(options, resume=True, temperature=1.0))


def test_a_damaged_checkpoint_is_refused_by_name(
    options: DistillOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(60, options, monkeypatch)
    (tmp_path / "run" / "resume.pt").chmod(0o644)
    (tmp_path / "run" / "resume.pt").write_bytes(b"damaged")
    with pytest.raises(KDCacheError, match=r"resume\.pt"):
        distill(replace(options, resume=True))


def weights(result: RunResult | Path) -> Tensor:
    state = torch.load(result, weights_only=True) if isinstance(result, Path) else result.student.state_dict()
    return torch.cat([tensor.reshape(-1) for tensor in state.values()])


def close_runs(shared: str | None, alone: RunResult) -> None:
    torch.testing.assert_close(weights(Path(str(shared)) / "last.pt"), weights(alone), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(lines(shared), lines(str(alone.out)), strict=True):
        assert mine.pop("event") == theirs.pop("event")
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_two_processes_give_the_losses_of_one(options: DistillOptions, tmp_path: Path) -> None:
    # 101 rows in batches of 25: the last one has a single row, so that the second rank has none.
    shared = replace(options, student="distill_task:plain_student", batch_size=25, grad_accumulation=2, epochs=2)
    assert run_child(shared, TORCHRUN) == 0
    close_runs(shared.out, distill(replace(shared, out=str(tmp_path / "alone"))))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2


def test_a_signal_to_one_rank_stops_all_of_them_and_they_go_on(options: DistillOptions, tmp_path: Path) -> None:
    shared = replace(options, student="distill_task:plain_student", epochs=2)
    assert run_child(shared, TORCHRUN, KILL_AT_ITEM="60", KILL_SIGNAL="SIGTERM") == 1  # torchrun's code for any
    stopped = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert stopped["step"] == 7
    assert len(stopped["generators"]["torch"]) == 2
    assert run_child(replace(shared, resume=True), TORCHRUN) == 0
    close_runs(shared.out, distill(replace(shared, out=str(tmp_path / "alone"))))


def test_the_random_teacher_of_a_step_is_the_same_on_all_ranks(
    options: DistillOptions, tmp_path: Path, task: Any
) -> None:
    other = tmp_path / "other"
    with Writer(other, classes=4, dtype="float32") as writer:
        writer.write(np.arange(task.ROWS), task.teacher_logits().flip(1).numpy(), task.labels().numpy())
    options = replace(options, student="distill_task:plain_student", cache=(str(options.cache), str(other)))
    options = replace(options, ensemble="random", val=None)
    assert run_child(options, TORCHRUN) == 0
    alone = distill(replace(options, out=str(tmp_path / "alone"))).student.state_dict()
    shared = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-4, atol=1e-5)
