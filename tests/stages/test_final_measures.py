"""What a finished run measures: against its own logits; in one process and in two, killed and not."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.final_measures import summary
from kdcache.stages.order import Order
from kdcache.stages.run_record import read_record
from kdcache.store.writer import Writer
from kdcache.train.calibration_metrics import CalibrationMetrics
from kdcache.train.rows import TeacherRows
from kdcache.train.teacher_statistics import CONFUSIONS

HERE = Path(__file__).parent
OPTIONS = DistillOptions(epochs=12, batch_size=16, device="cpu", quiet=True, seed=11)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(HERE))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_student(classes: int = 4) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, classes))


def kl(teacher: Tensor, student: Tensor) -> float:
    p, q = teacher.log_softmax(1), student.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def test_held_out_rows_are_measured_as_numpy_does(make_toy: Callable[..., Any], tmp_path: Path) -> None:
    toy, held_out = make_toy(), make_toy(rows=60, unlabelled=slice(5, 12))
    options = replace(OPTIONS, out=str(tmp_path / "run"))
    result = distill(
        options, student=make_student(), data=toy.data, cache=toy.cache, val=held_out.data, val_cache=held_out.cache
    )
    found = json.loads((tmp_path / "run" / "run.json").read_text())["measures"]
    assert found == result.record["measures"]
    with torch.no_grad():
        logits = result.student(held_out.inputs)
    known = held_out.labels >= 0
    top, labels = logits.argmax(1)[known].numpy(), held_out.labels[known].numpy()
    metrics = CalibrationMetrics()
    metrics.add(TeacherRows.from_dense(logits[known]), torch.from_numpy(labels))
    expected, val = metrics.result(), found["val"]
    assert (val["rows"], val["labelled"]) == (60, 53)
    assert val["accuracy"] == pytest.approx((top == labels).mean())
    for name, value in (("nll", expected.nll), ("brier", expected.brier), ("confidence", expected.confidence)):
        assert val[name] == pytest.approx(value, abs=1e-6), name
    assert val["ece"]["equal_width"] == pytest.approx(expected.ece, abs=1e-6)
    assert val["ece"]["equal_mass"] == pytest.approx(expected.ece_equal_mass, abs=1e-6)
    assert [one["rows"] for one in val["reliability"]] == list(expected.equal_width.counts)
    assert val["class_rows"] == np.bincount(labels, minlength=4).tolist()
    assert val["class_correct"] == [int(((labels == c) & (top == c)).sum()) for c in range(4)]
    assert val["class_predicted"] == np.bincount(top, minlength=4).tolist()
    wrong = {(one["label"], one["student_class"]): one["rows"] for one in val["confusions"]}
    assert wrong == {
        (a, b): count
        for a in range(4)
        for b in range(4)
        if a != b and (count := int(((labels == a) & (top == b)).sum()))
    }
    agreement = (logits.argmax(1) == held_out.teacher_logits.argmax(1)).double().mean()
    assert val["taught"] == 60
    assert val["agreement"] == pytest.approx(float(agreement))
    assert val["agreement"] == pytest.approx(result.last["agreement"])
    assert val["kl"] == pytest.approx(kl(held_out.teacher_logits, logits), abs=1e-5)


def test_training_rows_are_a_sample_by_the_seed_of_at_most_one_in_50_trained(toy: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    options = replace(OPTIONS, epochs=10, out=str(tmp_path / "run"))
    result = distill(options, student=make_student(), data=Listed(toy.data, seen), cache=toy.cache)
    found = result.record["measures"]
    sample = seen[-20:]
    assert found["val"] is None
    assert "--val" in found["missing"]["val"]
    assert found["train"]["rows"] == found["train"]["taught"] == 20  # 1000 rows were trained on
    assert sorted(set(sample)) == sample
    with torch.no_grad():
        logits = result.student(toy.inputs[sample])
    assert found["train"]["accuracy"] == pytest.approx((logits.argmax(1) == toy.labels[sample]).double().mean().item())
    agreement = (logits.argmax(1) == toy.teacher_logits[sample].argmax(1)).double().mean().item()
    assert found["train"]["agreement"] == pytest.approx(agreement)
    assert found["train"]["kl"] == pytest.approx(kl(toy.teacher_logits[sample], logits), abs=1e-5)


def test_a_run_without_a_teacher_has_no_agreement(toy: Any, tmp_path: Path) -> None:
    options = replace(OPTIONS, alpha=0.0, out=str(tmp_path / "run"))
    found = distill(options, student=make_student(), data=toy.data, val=toy.data).record["measures"]
    assert found["val"]["labelled"] == 100
    for part in ("val", "train"):
        assert not {"agreement", "kl", "taught"} & set(found[part])


def test_rows_without_a_teacher_or_a_label_do_not_count(make_toy: Callable[..., Any], tmp_path: Path) -> None:
    toy = make_toy(covered=70, unlabelled=slice(0, 40))
    options = replace(OPTIONS, epochs=60, missing="ce", out=str(tmp_path / "run"))
    found = distill(options, student=make_student(), data=toy.data, cache=toy.cache).record["measures"]["train"]
    assert (found["rows"], found["labelled"], found["taught"]) == (100, 60, 70)


def test_labels_that_were_not_learnt_do_not_count(toy: Any, tmp_path: Path) -> None:
    options = replace(OPTIONS, epochs=60, label_fraction=0.2, unlabelled="keep", out=str(tmp_path / "run"))
    found = distill(options, student=make_student(), data=toy.data, cache=toy.cache).record["measures"]["train"]
    assert found["rows"] == found["taught"] == 100
    assert 15 <= found["labelled"] <= 25


def test_too_short_a_run_and_one_without_a_folder_say_so(toy: Any, tmp_path: Path) -> None:
    options = replace(OPTIONS, epochs=None, steps=1, alpha=0.0)
    assert "measures" not in distill(options, student=make_student(), data=toy.data).record
    found = distill(replace(options, out=str(tmp_path / "run")), student=make_student(), data=toy.data).record[
        "measures"
    ]
    assert found["train"] is None
    assert "fewer than 50" in found["missing"]["train"]


def test_dense_predictions_are_left_out(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(20, 3, 5, 5), torch.randint(0, 4, (20, 5, 5)))
    options = replace(OPTIONS, alpha=0.0, out=str(tmp_path / "run"))
    found = distill(options, student=nn.Conv2d(3, 4, 1), data=data, val=data).record["measures"]
    assert found["val"] is None
    assert found["train"] is None
    assert "dense" in found["missing"]["val"]


def test_generators_and_the_students_mode_are_left_as_they_were(toy: Any, tmp_path: Path) -> None:
    student = make_student()
    before = torch.get_rng_state()
    distill(replace(OPTIONS, out=str(tmp_path / "run")), student=student, data=toy.data, cache=toy.cache, val=toy.data)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [parameter.detach().clone() for parameter in student.parameters()]
    alone = make_student()
    distill(OPTIONS, student=alone, data=toy.data, cache=toy.cache, val=toy.data)  # without a folder: nothing measured
    assert all(torch.equal(a, b) for a, b in zip(weights, alone.parameters(), strict=True))


@pytest.mark.parametrize("broken", [1, 30])
def test_inputs_that_make_the_student_nan_leave_a_record_that_can_be_read(
    toy: Any, tmp_path: Path, broken: int
) -> None:
    inputs = toy.inputs[:30].clone()
    inputs[:broken] = torch.nan
    val = TensorDataset(inputs, toy.labels[:30])
    distill(
        replace(OPTIONS, out=str(tmp_path / "run")), student=make_student(), data=toy.data, cache=toy.cache, val=val
    )
    found = read_record(tmp_path / "run")["measures"]["val"]
    assert (found["rows"], found["nll"], found["confidence"]) == (30, None, None)
    assert found["ece"] == {"equal_width": None, "equal_mass": None}
    assert sum(one["rows"] for one in found["reliability"]) == 30 - broken
    json.dumps(found, allow_nan=False)


def test_an_infinite_likelihood_is_left_out_of_the_record() -> None:
    found = {
        "label": np.array([0.0, 1.0]),
        "top": np.array([0.0, 0.0]),
        "confidence": np.array([1.0, 1.0]),
        "nll": np.array([0.0, np.inf]),
        "brier": np.array([0.0, 2.0]),
        "agreeing": np.array([0.0, 0.0]),
        "teacher": np.array([0.0, -1.0]),
        "kl": np.array([np.nan, np.nan]),
    }
    measured = summary(found, 3)
    assert measured["nll"] is None
    assert (measured["brier"], measured["accuracy"], measured["agreement"], measured["kl"]) == (1.0, 0.5, 1.0, None)
    assert measured["class_rows"] == [1, 1, 0]
    json.dumps(measured, allow_nan=False)


def test_only_the_most_frequent_confusions_are_kept() -> None:
    rng = np.random.default_rng(0)
    label, top = rng.integers(0, 30, (2, 5000)).astype(np.float64)
    columns = {name: np.zeros(5000) for name in ("confidence", "nll", "brier", "kl")}
    found = summary({**columns, "label": label, "top": top, "agreeing": top, "teacher": top}, 30)["confusions"]
    counts = [one["rows"] for one in found]
    assert len(counts) == CONFUSIONS
    assert counts == sorted(counts, reverse=True)
    assert all(one["label"] != one["student_class"] for one in found)


@pytest.fixture
def options(tmp_path: Path) -> DistillOptions:
    import distill_task

    cache = tmp_path / "teacher"
    with Writer(cache, classes=4, dtype="float32") as writer:
        writer.write(np.arange(distill_task.ROWS), distill_task.teacher_logits().numpy(), distill_task.labels().numpy())
    return DistillOptions(
        student="distill_task:plain_student",
        data="distill_task:Task",
        val="distill_task:HeldOut",
        val_cache=str(cache),
        cache=str(cache),
        out=str(tmp_path / "run"),
        epochs=10,
        batch_size=17,
        checkpoint_steps=7,
        device="cpu",
        quiet=True,
    )


def run_child(options: DistillOptions, launcher: tuple[str, ...] = (), **environment: str) -> int:
    fields = DistillOptions.__dataclass_fields__
    changed = {key: value for key, value in dataclasses.asdict(options).items() if value != fields[key].default}
    path = os.pathsep.join([str(HERE), *sys.path])
    command = [sys.executable, *launcher, str(HERE / "distill_task.py"), json.dumps(changed)]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode


def test_two_processes_measure_what_one_does(options: DistillOptions, tmp_path: Path) -> None:
    assert run_child(options, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")) == 0
    shared = json.loads((tmp_path / "run" / "run.json").read_text())["measures"]
    alone = distill(replace(options, out=str(tmp_path / "alone"))).record["measures"]
    assert shared["train"]["rows"] == alone["train"]["rows"] == 1010 // 50
    for part in ("val", "train"):
        assert set(shared[part]) == set(alone[part])
        for name, value in alone[part].items():
            if isinstance(value, float):  # sums of gradients over two processes differ in the last bits
                assert shared[part][name] == pytest.approx(value, abs=2e-3), (part, name)


def test_a_run_killed_while_it_measures_ends_as_one_that_was_not(options: DistillOptions, tmp_path: Path) -> None:
    item = str(10 * 101 + 5)  # the fifth training row that is measured
    assert run_child(options, KILL_AT_ITEM=item, KILL_SIGNAL="SIGKILL") == -9
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    resumed = distill(replace(options, resume=True))
    expected = distill(replace(options, out=str(tmp_path / "whole")))
    assert resumed.record["measures"] == expected.record["measures"]
    assert resumed.record["status"] == "done"
    again = distill(replace(options, resume=True))
    assert again.record["measures"] == expected.record["measures"]


def test_the_sample_does_not_depend_on_the_number_of_ranks() -> None:
    orders = [Order(np.arange(0, 300, 3), 16, 5, rank=rank, world_size=2) for rank in range(2)]
    assert np.array_equal(orders[0].positions, orders[1].positions)


class Listed(Dataset[tuple[Tensor, Tensor]]):
    """Notes which items are loaded."""

    def __init__(self, data: TensorDataset, seen: list[int]) -> None:
        self.data, self.seen, self.sample_ids = data, seen, np.arange(len(data))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(index)
        x, label = self.data[index]
        return x, label
