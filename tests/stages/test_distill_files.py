"""Signals, checkpoints, metrics and options of the distill stage, each by itself."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.errors import InterruptedRunError, KDCacheError, MissingExtraError, StorageError, UsageError
from kdcache.stages import checkpoint
from kdcache.stages.distill_options import DistillOptions, portable, resolve
from kdcache.stages.metrics import MetricsLog
from kdcache.stages.signals import graceful_signals
from kdcache.store import posix

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_former_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with graceful_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.name == number.name
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_stops_at_once() -> None:
    with graceful_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_gets_a_flag_that_stays_down() -> None:
    seen = []

    def work() -> None:
        with graceful_signals() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_checkpoint_reads_back_without_unpickling_objects(tmp_path: Path) -> None:
    content = {"step": 3, "lr": 0.5, "w": torch.arange(3.0), "best": {"x": [1, None, True]}}
    checkpoint.save(tmp_path / "resume.pt", content)
    found = checkpoint.load(tmp_path / "resume.pt")
    assert found.pop("w").tolist() == [0, 1, 2]
    assert found == {"step": 3, "lr": 0.5, "best": {"x": [1, None, True]}}


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "resume.pt"
    checkpoint.save(path, {"step": 1})

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(posix.os, "pwrite", full)
    with pytest.raises(StorageError, match="full"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["resume.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_checkpoint_is_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "resume.pt").write_bytes(content)
    with pytest.raises(KDCacheError, match=r"resume\.pt"):
        checkpoint.load(tmp_path / "resume.pt")


def test_random_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    with checkpoint.own_generators(5, CPU):
        draw()
        state = checkpoint.rng_state(CPU)
        expected = [draw() for _ in range(3)]
        checkpoint.set_rng_state(state, CPU)
        assert [draw() for _ in range(3)] == expected


def test_the_callers_generators_are_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with checkpoint.own_generators(7, CPU):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


def test_a_metrics_file_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "event": "train", "loss": 0.5})
    kept = log.sync()
    log.write({"step": 2, "event": "train", "loss": 0.4})
    log.close()
    resumed = MetricsLog(tmp_path, keep_bytes=kept)
    resumed.write({"step": 2, "event": "train", "loss": 0.3})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.3)]


def test_a_metrics_file_that_cannot_be_opened_or_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "taken" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"could not open .*metrics\.jsonl"):
        MetricsLog(tmp_path / "taken")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path)
    with pytest.raises(StorageError, match=r"could not write .*metrics\.jsonl: .* the disk is full"):
        log.write({"step": 1, "event": "train", "loss": 0.5})
    with pytest.raises(StorageError, match="the disk is full"):
        log.sync()
    with pytest.raises(StorageError, match="the disk is full"):
        log.close()


def test_a_log_that_cannot_be_made_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(MissingExtraError):
        MetricsLog(tmp_path, tensorboard=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_defaults_follow_the_optimiser() -> None:
    assert resolve(DistillOptions()).lr == 0.1
    assert resolve(DistillOptions(optimizer="adamw")).lr == 0.001
    assert resolve(DistillOptions(optimizer="adamw", lr=0.5)).lr == 0.5
    assert resolve(DistillOptions(steps=7)).epochs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DistillOptions(alpha=1.1), "--alpha must be between 0 and 1, found 1.1"),
        (DistillOptions(alpha=float("nan")), "--alpha"),
        (DistillOptions(temperature=0), "--temperature must be above 0"),
        (DistillOptions(temperature=float("inf")), "--temperature"),
        (DistillOptions(label_smoothing=1.0), "--label-smoothing"),
        (DistillOptions(epochs=0), "--epochs"),
        (DistillOptions(epochs=1, steps=1), "exclude each other"),
        (DistillOptions(batch_size=0), "--batch-size"),
        (DistillOptions(grad_accumulation=0), "--grad-accumulation"),
        (DistillOptions(optimizer="lion"), "choose one of sgd, adamw"),
        (DistillOptions(schedule="linear"), "choose one of cosine, constant, step"),
        (DistillOptions(amp="fp8"), "choose one of none, bf16, fp16"),
        (DistillOptions(missing="zero"), "choose one of error, ce, skip"),
        (DistillOptions(check="none"), "choose one of ids, sample, full"),
        (DistillOptions(seed=-1), "--seed"),
        (DistillOptions(out="x", resume=True, overwrite=True), "exclude each other"),
        (DistillOptions(resume=True), "give --out"),
        (DistillOptions(hard_targets=True, label_smoothing=0.1), "exclude each other"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: DistillOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(options)


def test_every_option_has_a_help_text() -> None:
    fields = DistillOptions.__dataclass_fields__.values()
    assert all(field.metadata["help"].endswith(".") for field in fields if "..." not in field.metadata["help"])
    assert {field.metadata["group"] for field in fields} == {"inputs", "loss", "views", "training", "machine", "run"}


def test_options_that_travel_hold_no_absolute_path() -> None:
    options = DistillOptions(
        data="idx:/home/me/mnist:train", val="npz:~/v.npz", cache="/scratch/teacher.h5", student="mlp:4-3", out="a/b"
    )
    found = portable(options)
    assert found["data"] == "idx:mnist:train"
    assert found["val"] == "npz:v.npz"
    assert found["cache"] == ["teacher.h5"]
    assert found["student"] == "mlp:4-3"
    assert found["out"] == "b"


def test_an_interruption_has_its_exit_code() -> None:
    assert InterruptedRunError.exit_code == 75
