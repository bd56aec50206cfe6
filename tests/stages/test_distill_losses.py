"""Losses by name, weights, and schedules in a run: the same weights as a loop written by hand, also when resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions, resolve
from kdcache.stages.optim import Schedule
from kdcache.stages.order import Order
from kdcache.store.writer import Writer
from kdcache.train.losses import dkd_loss, js_loss, kd_loss

sys.path.insert(0, str(Path(__file__).parent))
from test_distill_processes import TORCHRUN, close_runs, run_child, same_run

OPTIONS = DistillOptions(epochs=2, batch_size=16, device="cpu", quiet=True, seed=11)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_student() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def by_hand(toy: Any, loss_of: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """The weights after the same run as a plain loop; `loss_of` takes student logits, row numbers and the progress."""
    student = make_student()
    order = Order(torch.arange(len(toy.inputs)).numpy(), OPTIONS.batch_size, OPTIONS.seed)
    total = order.steps_per_epoch * 2
    schedule = Schedule("cosine", 0.1, total)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(total):
        rows = torch.from_numpy(order.rows(step))
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.zero_grad()
        loss_of(student(toy.inputs[rows]), rows, step / (total - 1)).backward()
        optimizer.step()
    return flat(student)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def ran(toy: Any, **changed: Any) -> Tensor:
    return flat(distill(replace(OPTIONS, **changed), student=make_student(), data=toy.data, cache=toy.cache).student)


def test_losses_by_name_are_those_of_a_loop(toy: Any) -> None:
    def loss(v: Tensor, rows: Tensor, _: float) -> Tensor:
        z, labels = toy.teacher_logits[rows], toy.labels[rows]
        ce = kd_loss(v, None, labels, alpha=0.0, temperature=1.0)
        soft = dkd_loss(v, z, labels, temperature=3.0, beta=2.0) + 0.5 * js_loss(v, z, temperature=2.0)
        return 0.4 * ce + 0.6 * soft

    found = ran(toy, alpha=0.6, temperature=3.0, loss=("dkd:beta=2", "js:temperature=2*0.5"))
    assert torch.allclose(found, by_hand(toy, loss), rtol=1e-4, atol=1e-6)


def test_schedules_of_alpha_and_the_temperature_are_those_of_a_loop(toy: Any) -> None:
    def loss(v: Tensor, rows: Tensor, done: float) -> Tensor:
        half = (1 - np.cos(np.pi * done)) / 2
        alpha, temperature = 0.9 - 0.7 * done, 4.0 - 3.0 * half
        return kd_loss(v, toy.teacher_logits[rows], toy.labels[rows], alpha=alpha, temperature=float(temperature))

    found = ran(toy, alpha_schedule="linear:0.2", temperature_schedule="cosine:1")
    assert torch.allclose(found, by_hand(toy, loss), rtol=1e-4, atol=1e-6)


def test_two_weights_are_an_alpha_times_their_sum(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def loss(v: Tensor, rows: Tensor, _: float) -> Tensor:
        z, labels = toy.teacher_logits[rows], toy.labels[rows]
        ce, kd = (kd_loss(v, z, labels, alpha=alpha, temperature=4.0) for alpha in (0.0, 1.0))
        return 0.5 * ce + 1.5 * kd

    found = ran(toy, ce_weight=0.5, kd_weight=1.5, quiet=False)
    assert torch.allclose(found, by_hand(toy, loss), rtol=1e-4, atol=1e-6)
    shown = capsys.readouterr().err
    assert "loss = 2*[0.25*CE + 0.75*16*KL(teacher || student)] at temperature 4" in shown
    assert "--ce-weight 0.5 and --kd-weight 1.5 are alpha 0.75, all times 2" in shown


def test_the_record_and_the_first_line_say_what_was_asked_for(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(
        OPTIONS, loss=("kl", "dist*2"), alpha_schedule="cosine:0.1", out=str(tmp_path / "run"), quiet=False
    )
    distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    formula = (
        "0.1*CE + 0.9*(16*KL(teacher || student) + 2*1*DIST(1*inter + 1*intra) at temperature 1) at temperature 4; "
        "from the first step to the last: alpha 0.9 to 0.1 (cosine)"
    )
    assert f"loss = {formula}" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["formula"] == formula
    assert record["options"]["loss"] == ["kl", "dist*2"]
    # A finished run is found again: its identity is compared with what JSON gave back.
    again = distill(replace(options, resume=True), student=make_student(), data=toy.data, cache=toy.cache)
    assert again.steps == record["steps"]


def child_options(tmp_path: Path) -> DistillOptions:
    import distill_task as task

    cache = tmp_path / "teacher"
    with Writer(cache, classes=4, dtype="float32") as writer:
        writer.write(np.arange(task.ROWS), task.teacher_logits().numpy(), task.labels().numpy())
    return DistillOptions(
        student="distill_task:plain_student",
        data="distill_task:Task",
        val="distill_task:HeldOut",
        cache=str(cache),
        out=str(tmp_path / "run"),
        epochs=3,
        batch_size=25,
        log_steps=4,
        eval_steps=5,
        device="cpu",
        quiet=True,
        loss=("kl", "dkd:beta=2*0.5", "standardized_kd"),
        alpha_schedule="linear:0.3",
        temperature_schedule="cosine:1",
    )


def test_a_run_with_schedules_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = child_options(tmp_path)
    assert run_child(options, KILL_AT_ITEM="160", KILL_SIGNAL="SIGTERM") == 75
    resumed = distill(replace(options, resume=True))
    same_run(resumed, distill(replace(options, out=str(tmp_path / "uninterrupted"))))


def test_two_ranks_and_two_pieces_with_unequal_labels_give_the_losses_of_one(tmp_path: Path) -> None:
    options = replace(child_options(tmp_path), grad_accumulation=2)
    assert run_child(options, TORCHRUN) == 0
    close_runs(options.out, distill(replace(options, out=str(tmp_path / "alone"), grad_accumulation=1)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": ("kd",)}, "'kd' is not known; choose one of kl"),
        ({"loss": ("dkd:beta=x",)}, "beta is 'x', expected a number"),
        ({"ce_weight": 1.0}, "go together"),
        ({"kd_weight": 1.0}, "go together"),
        ({"ce_weight": 0.0, "kd_weight": 0.0}, "not both 0"),
        ({"ce_weight": -1.0, "kd_weight": 2.0}, "at least 0"),
        ({"ce_weight": 1.0, "kd_weight": 1.0, "alpha": 0.3}, "which stand for alpha 0.5"),
        ({"alpha_schedule": "linear"}, "expected constant, linear:END or cosine:END"),
        ({"alpha_schedule": "linear:1.5"}, "ends at 1.5, expected a number between 0 and 1"),
        ({"temperature_schedule": "cosine:0"}, "ends at 0, expected a number above 0"),
        ({"student_temperature": 0.0}, "--student-temperature must be above 0"),
        ({"tail_tolerance": 0.0}, "--tail-tolerance must be above 0"),
        ({"loss": ("dist",), "grad_accumulation": 2}, "--loss dist correlates the rows of a batch"),
        ({"loss": ("kl",), "hard_targets": True}, "leave out --loss"),
        ({"alpha_schedule": "linear:0.5", "hard_targets": True}, "leave out --loss"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(replace(OPTIONS, **changed))


def test_resolving_twice_changes_nothing() -> None:
    once = resolve(replace(OPTIONS, ce_weight=1.0, kd_weight=3.0))
    assert once.alpha == 0.75
    assert resolve(once) == once


def test_a_schedule_that_ends_with_the_teacher_needs_its_cache(toy: Any) -> None:
    options = replace(OPTIONS, student="mlp:6-8-4", alpha=0.0, alpha_schedule="linear:0.5")
    with pytest.raises(UsageError, match="needs the teacher's logits; give --cache"):
        distill(options, data=toy.data)


@pytest.fixture
def topk_cache(toy: Any, tmp_path: Path) -> Path:
    path = tmp_path / "topk"
    with Writer(path, classes=4, top_k=2, temperatures=(1.0, 4.0)) as writer:
        writer.write(np.arange(len(toy.inputs)), toy.teacher_logits.numpy(), toy.labels.numpy())
    return path


def test_a_loss_that_the_cache_cannot_serve_is_refused_with_what_can(toy: Any, topk_cache: Path) -> None:
    for loss in ("dist", "mse", "dkd"):
        with pytest.raises(UsageError, match=rf"{loss} needs .* dense"):
            distill(replace(OPTIONS, loss=(loss,)), student=make_student(), data=toy.data, cache=str(topk_cache))


@pytest.mark.parametrize("losses", [(), ("js", "reverse_kl*0.1"), ("standardized_kd",)])
def test_topk_rows_train_and_are_measured(toy: Any, topk_cache: Path, losses: tuple[str, ...]) -> None:
    options = replace(OPTIONS, loss=losses, tail_tolerance=1.0)
    result = distill(
        options,
        student=make_student(),
        data=toy.data,
        cache=str(topk_cache),
        val=toy.data,
        val_cache=str(topk_cache),
    )
    assert {"agreement", "teacher_kl", "val_accuracy"} <= result.last.keys()
    assert 0 <= result.last["teacher_kl"] < 10
