"""What a run computes: the same weights as a loop written by hand, whatever the way of computing them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from kdcache.errors import StorageError
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.optim import Schedule
from kdcache.stages.order import Order
from kdcache.store.writer import Writer
from kdcache.train.losses import kd_loss

OPTIONS = DistillOptions(epochs=2, batch_size=16, warmup=3, device="cpu", quiet=True, seed=11)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_student() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4))


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def by_hand(toy: Any, loss_of: Callable[[Tensor, Tensor], Tensor], options: DistillOptions = OPTIONS) -> Tensor:
    """The weights after the same run as a plain loop; `loss_of` takes student logits and row numbers."""
    student = make_student()
    order = Order(torch.arange(len(toy.inputs)).numpy(), options.batch_size, options.seed)
    total = order.steps_per_epoch * (options.epochs or 0)
    schedule = Schedule("cosine", 0.1, total, options.warmup)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    torch.manual_seed(options.seed)
    for step in range(total):
        rows = torch.from_numpy(order.rows(step))
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.zero_grad()
        loss_of(student(toy.inputs[rows]), rows).backward()
        optimizer.step()
    return weights(student)


def test_a_run_equals_a_loop_over_rows_in_memory_bit_for_bit(toy: Any) -> None:
    expected = by_hand(
        toy,
        lambda logits, rows: kd_loss(logits, toy.teacher_logits[rows], toy.labels[rows], alpha=0.7, temperature=3.0),
    )
    options = replace(OPTIONS, alpha=0.7, temperature=3.0)
    result = distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    assert torch.equal(weights(result.student), expected)


def test_alpha_0_without_a_cache_is_plain_cross_entropy(toy: Any) -> None:
    expected = by_hand(toy, lambda logits, rows: functional.cross_entropy(logits, toy.labels[rows]))
    result = distill(replace(OPTIONS, alpha=0.0), student=make_student(), data=toy.data)
    torch.testing.assert_close(weights(result.student), expected)
    assert "cache" not in result.record["data"]


def test_alpha_1_learns_without_labels(toy: Any) -> None:
    expected = by_hand(
        toy, lambda logits, rows: kd_loss(logits, toy.teacher_logits[rows], None, alpha=1.0, temperature=4.0)
    )
    result = distill(replace(OPTIONS, alpha=1.0), student=make_student(), data=Bare(toy.inputs), cache=toy.cache)
    assert torch.equal(weights(result.student), expected)


def test_data_without_labels_learns_from_the_teacher_alone_whatever_alpha(toy: Any) -> None:
    with_alpha = distill(replace(OPTIONS, alpha=0.3), student=make_student(), data=Bare(toy.inputs), cache=toy.cache)
    alone = distill(replace(OPTIONS, alpha=1.0), student=make_student(), data=Bare(toy.inputs), cache=toy.cache)
    assert torch.equal(weights(with_alpha.student), weights(alone.student))


def test_rows_labelled_minus_one_get_the_kd_term_alone(make_toy: Any) -> None:
    toy = make_toy(unlabelled=slice(20, 90))
    expected = by_hand(
        toy,
        lambda logits, rows: kd_loss(logits, toy.teacher_logits[rows], toy.labels[rows], alpha=0.5, temperature=4.0),
    )
    result = distill(replace(OPTIONS, alpha=0.5), student=make_student(), data=toy.data, cache=toy.cache)
    assert torch.equal(weights(result.student), expected)


def test_hard_targets_are_the_teachers_argmax_for_every_row(make_toy: Any) -> None:
    toy = make_toy(unlabelled=slice(0, 50))
    hard = toy.teacher_logits.argmax(dim=1)
    expected = by_hand(toy, lambda logits, rows: functional.cross_entropy(logits, hard[rows]))
    result = distill(replace(OPTIONS, hard_targets=True), student=make_student(), data=toy.data, cache=toy.cache)
    torch.testing.assert_close(weights(result.student), expected)
    assert result.record["formula"] == "CE(argmax of the teacher)"


def test_label_smoothing_is_that_of_torch(toy: Any) -> None:
    expected = by_hand(
        toy, lambda logits, rows: functional.cross_entropy(logits, toy.labels[rows], label_smoothing=0.2)
    )
    options = replace(OPTIONS, alpha=0.0, label_smoothing=0.2)
    result = distill(options, student=make_student(), data=toy.data)
    torch.testing.assert_close(weights(result.student), expected)


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_accumulated_pieces_make_the_step_of_one_big_batch(make_toy: Any, pieces: int) -> None:
    toy = make_toy(unlabelled=slice(10, 40), covered=80)  # rows with both, one and no signal
    options = replace(OPTIONS, missing="ce", clip_norm=0.5, alpha=0.6)
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    whole = weights(distill(options, student=student, data=toy.data, cache=toy.cache).student)
    student.load_state_dict(start)
    options = replace(options, grad_accumulation=pieces)
    parts = weights(distill(options, student=student, data=toy.data, cache=toy.cache).student)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_rows_without_any_signal_neither_move_the_student_nor_dilute_the_mean(make_toy: Any) -> None:
    toy = make_toy(unlabelled=slice(60, 100), covered=60)
    expected = by_hand(
        toy,
        lambda logits, rows: kd_loss(
            logits[rows < 60], toy.teacher_logits[rows[rows < 60]], None, alpha=1, temperature=4
        ),
    )
    toy.labels.fill_(-1)
    options = replace(OPTIONS, missing="ce")
    result = distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    torch.testing.assert_close(weights(result.student), expected)


def test_skipped_rows_are_as_if_they_were_not_there(make_toy: Any) -> None:
    toy = make_toy(covered=70)
    options = replace(OPTIONS, missing="skip")
    skipped = distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    shorter = TensorDataset(toy.inputs[:70], toy.labels[:70])
    without = distill(OPTIONS, student=make_student(), data=shorter, cache=toy.cache)
    assert torch.equal(weights(skipped.student), weights(without.student))
    assert skipped.record["data"]["rows"] == 70


def test_workers_change_nothing(toy: Any) -> None:
    options = replace(OPTIONS, epochs=1)
    alone = distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    helped = distill(replace(options, workers=2), student=make_student(), data=toy.data, cache=toy.cache)
    assert torch.equal(weights(alone.student), weights(helped.student))


def test_dict_items_reach_forward_by_name(toy: Any) -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_student()

        def forward(self, pixels: Tensor) -> Tensor:
            return self.inner(pixels)

    named = distill(OPTIONS, student=ByName(), data=Named(toy), cache=toy.cache)
    plain = distill(OPTIONS, student=make_student(), data=toy.data, cache=toy.cache)
    assert torch.equal(weights(named.student), weights(plain.student))


def test_steps_take_the_place_of_epochs_whatever_the_number_of_rows(toy: Any) -> None:
    few = TensorDataset(toy.inputs[:10], toy.labels[:10])
    options = replace(OPTIONS, epochs=None, steps=9)
    assert distill(options, student=make_student(), data=toy.data, cache=toy.cache).steps == 9
    assert distill(options, student=make_student(), data=few, cache=toy.cache).steps == 9


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_training_draws_the_student_to_its_teacher(toy: Any, tmp_path: Path, optimizer: str, amp: str) -> None:
    options = replace(
        OPTIONS, epochs=30, optimizer=optimizer, lr=0.02, alpha=1.0, temperature=1.0, amp=amp, out=str(tmp_path / "run")
    )
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    distill(options, student=student, data=toy.data, val=toy.data, cache=toy.cache, val_cache=toy.cache)
    (first, *_, last) = [line for line in read_lines(tmp_path / "run") if line["event"] == "eval"]
    assert last["teacher_kl"] < 0.8 * first["teacher_kl"]
    assert last["agreement"] > first["agreement"]


def test_fidelity_of_the_teacher_to_itself_is_perfect(make_toy: Any) -> None:
    toy = make_toy(unlabelled=slice(0, 20))
    teacher = Lookup(toy.inputs, toy.teacher_logits)
    options = replace(OPTIONS, epochs=None, warmup=0, steps=1, lr=1e-9, weight_decay=0.0)
    result = distill(options, student=teacher, data=toy.data, val=toy.data, cache=toy.cache, val_cache=toy.cache)
    labelled = toy.labels >= 0
    right = toy.teacher_logits.argmax(dim=1)[labelled] == toy.labels[labelled]
    assert result.last["agreement"] == 1.0
    assert result.last["teacher_kl"] == pytest.approx(0.0, abs=1e-6)
    assert result.last["val_accuracy"] == pytest.approx(right.float().mean().item())
    expected = functional.cross_entropy(toy.teacher_logits[labelled], toy.labels[labelled]).item()
    assert result.last["val_nll"] == pytest.approx(expected, rel=1e-5)


def test_validation_without_labels_measures_fidelity_alone(toy: Any) -> None:
    result = distill(
        OPTIONS, student=make_student(), data=toy.data, val=Bare(toy.inputs), cache=toy.cache, val_cache=toy.cache
    )
    assert {"agreement", "teacher_kl", "val_loss"} <= set(result.last)
    assert "val_accuracy" not in result.last
    assert result.best["agreement"] >= result.last["agreement"]


def test_metrics_record_and_weights_are_written(toy: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = replace(OPTIONS, out=str(out), log_steps=5, eval_steps=6)
    result = distill(options, student=make_student(), data=toy.data, val=toy.data, cache=toy.cache)
    lines = read_lines(out)
    assert [line["step"] for line in lines if line["event"] == "train"] == [5, 10, 14]
    assert [line["step"] for line in lines if line["event"] == "eval"] == [6, 12, 14]
    assert {"step", "epoch", "loss", "ce", "kd", "lr", "rows_per_second"} <= set(lines[0])
    evaluated = [line for line in lines if line["event"] == "eval"]
    best = max(evaluated, key=lambda line: line["val_accuracy"])
    assert result.best["step"] == best["step"]
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "done"
    assert record["best"] == result.best
    assert record["student"]["parameters"] == 92
    assert len(record["data"]["cache"]["root"]) == 64
    assert str(tmp_path) not in (out / "run.json").read_text()
    last = torch.load(out / "last.pt", weights_only=True)
    assert all(torch.equal(last[name], tensor) for name, tensor in result.student.state_dict().items())
    make_student().load_state_dict(torch.load(out / "best.pt", weights_only=True))
    assert not (out / "resume.pt").exists()


def test_a_masked_class_that_makes_a_term_infinite_leaves_it_out_of_the_metrics(toy: Any, tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_student()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs).masked_fill(torch.arange(4) == 3, -torch.inf)

    logits = toy.teacher_logits.masked_fill(torch.arange(4) == 3, -torch.inf)
    with Writer(tmp_path / "masked", classes=4, dtype="float32") as writer:
        writer.write(range(len(logits)), logits.numpy())
    toy.labels.fill_(3)
    options = replace(OPTIONS, out=str(tmp_path / "run"), alpha=1.0)
    distill(options, student=Masked(), data=toy.data, cache=tmp_path / "masked")
    (line,) = read_lines(tmp_path / "run")
    assert line["loss"] > 0
    assert line["kd"] > 0
    assert "ce" not in line


def test_a_checkpoint_that_cannot_be_removed_is_a_storage_error(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    options = replace(OPTIONS, out=str(tmp_path / "run"))
    with pytest.raises(StorageError, match=r"could not remove .*resume\.pt: Permission denied"):
        distill(options, student=make_student(), data=toy.data, cache=toy.cache)


def test_without_validation_data_there_is_no_best(toy: Any, tmp_path: Path) -> None:
    options = replace(OPTIONS, out=str(tmp_path / "run"))
    result = distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    assert result.best == {}
    assert not (tmp_path / "run" / "best.pt").exists()


def test_the_record_names_the_student_that_was_trained(toy: Any, tmp_path: Path) -> None:
    """A module takes the place of the option, in the record as in the run."""
    options = DistillOptions(student="mlp:6-16-4", epochs=1, device="cpu", quiet=True, out=str(tmp_path / "run"))
    record = distill(options, student=nn.Linear(6, 4), data=toy.data, cache=toy.cache).record
    assert record["student"]["spec"] == "Linear"
    assert record["options"]["student"] is None


def test_a_run_can_be_made_of_specs_alone(tmp_path: Path) -> None:
    options = replace(
        OPTIONS, student="mlp:64-16-10", data="digits:train", val="digits:test", alpha=0.0, epochs=5, batch_size=64
    )
    result = distill(replace(options, out=str(tmp_path / "run")))
    assert result.last["val_accuracy"] > 0.5
    started = distill(replace(options, init=str(tmp_path / "run" / "last.pt"), epochs=None, steps=1, warmup=0, lr=1e-9))
    assert started.last["val_accuracy"] == pytest.approx(result.last["val_accuracy"], abs=0.01)


def test_the_formula_is_printed_with_its_numbers(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = replace(OPTIONS, quiet=False, alpha=0.25, temperature=2.0)
    distill(options, student=make_student(), data=toy.data, cache=toy.cache)
    captured = capsys.readouterr()
    assert "loss = 0.75*CE + 0.25*4*KL(teacher || student) at temperature 2" in captured.err
    assert captured.out == ""


class Bare(Dataset[Tensor]):
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        return self.inputs[index]


class Named(Dataset[dict[str, Any]]):
    def __init__(self, toy: Any) -> None:
        self.toy = toy

    def __len__(self) -> int:
        return len(self.toy.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": self.toy.inputs[index], "labels": int(self.toy.labels[index])}


class Lookup(nn.Module):
    """Gives each known input its row of logits; the scale makes it trainable."""

    def __init__(self, inputs: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.inputs, self.logits = inputs, logits
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits[torch.cdist(inputs, self.inputs).argmin(dim=1)] * self.scale
