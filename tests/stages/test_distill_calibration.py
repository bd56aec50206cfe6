"""Training with --calibration is training on a cache of calibrated logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kdcache
from kdcache.errors import MismatchError, UsageError
from kdcache.stages.calibration_file import StoredCalibration, save_calibration
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.train.calibrated import Calibration

ROWS, WIDTH, CLASSES = 60, 5, 6
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(ROWS, WIDTH, generator=GENERATOR)
LOGITS = torch.randn(ROWS, CLASSES, generator=GENERATOR) * 4
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=GENERATOR)
DATA = TensorDataset(INPUTS, LABELS)
OPTIONS = DistillOptions(epochs=2, batch_size=16, device="cpu", quiet=True, seed=3, temperature=4.0)
BIASED = Calibration(2.5, scale=(1.0, 1.1, 0.9, 1.0, 1.0, 1.2), bias=(0.0, 0.5, -0.5, 0.0, 0.1, 0.2))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cache_of(path: Path, logits: Tensor = LOGITS, **options: Any) -> Path:
    with kdcache.Writer(path, classes=CLASSES, **options) as writer:
        writer.write(np.arange(ROWS), logits.numpy(), LABELS.numpy())
    return path


def file_of(cache: Path, calibration: Calibration) -> str:
    with kdcache.open(cache) as opened:
        stored = StoredCalibration(calibration, opened.root, "temperature", {}, {}, {})
    path = cache.with_name(f"{cache.name}.{calibration.temperature}.calibration.json")
    save_calibration(path, stored, overwrite=False)
    return str(path)


def ran(cache: Path, **changed: Any) -> Any:
    torch.manual_seed(4)
    student = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return distill(replace(OPTIONS, **changed), student=student, data=DATA, cache=cache, val=DATA, val_cache=cache)


def weights(result: Any) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in result.student.parameters()])


@pytest.mark.parametrize("calibration", [Calibration(2.5), BIASED], ids=["temperature", "vector"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"loss": ("mse", "dkd:beta=2*0.5", "standardized_kd")},
        {"student_temperature": 2.0, "alpha_schedule": "linear:0.2"},
        {"hard_targets": True},
        {"disagreement": "downweight", "confidence_below": 0.5},
    ],
    ids=["kl", "losses", "schedules", "hard", "policies"],
)
def test_the_student_is_that_of_a_cache_of_calibrated_logits(
    tmp_path: Path, calibration: Calibration, changed: dict[str, Any]
) -> None:
    cache = cache_of(tmp_path / "raw", dtype="float32")
    made = cache_of(tmp_path / "made", calibration.logits(LOGITS), dtype="float32")
    found = ran(cache, calibration=file_of(cache, calibration), **changed)
    expected = ran(made, **changed)
    assert torch.equal(weights(found), weights(expected))
    assert found.last == expected.last  # val_loss, agreement and teacher_kl see the same teacher
    if not changed:
        assert not torch.equal(weights(found), weights(ran(cache)))


def test_the_factor_of_the_loss_stays_the_square_of_the_runs_temperature(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "raw", dtype="float32")
    with_file = ran(cache, calibration=file_of(cache, Calibration(2.0)), alpha=1.0)
    # Twice the temperature for the teacher alone: the factor is the student's square.
    student = ran(cache, temperature=8.0, student_temperature=4.0, alpha=1.0)
    assert torch.allclose(weights(with_file), weights(student), rtol=1e-4, atol=1e-6)


def test_topk_rows_are_asked_for_the_product_of_both_temperatures(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "sparse", top_k=2, temperatures=[2.5, 10.0])
    made = cache_of(tmp_path / "made", LOGITS / 2.5, top_k=2, temperatures=[1.0, 4.0])
    found, expected = ran(cache, calibration=file_of(cache, Calibration(2.5))), ran(made)
    # Kept logits are rounded to float16 before the division, or after it.
    assert torch.allclose(weights(found), weights(expected), rtol=1e-2, atol=1e-3)
    assert found.last["teacher_kl"] == pytest.approx(expected.last["teacher_kl"], rel=1e-2)
    with pytest.raises(UsageError, match="was not stored"):
        ran(cache, calibration=file_of(cache, Calibration(0.4)), temperature=1.0)
    with pytest.raises(UsageError, match="logits of all classes"):
        ran(cache, calibration=file_of(cache, replace(BIASED, temperature=3.0)))


def test_the_record_and_the_first_lines_say_so_and_another_file_is_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_of(tmp_path / "raw", dtype="float32")
    first, second = (file_of(cache, Calibration(temperature)) for temperature in (2.5, 3.0))
    out = str(tmp_path / "run")
    result = ran(cache, calibration=first, out=out, quiet=False)
    assert "calibrated first (temperature): divided by 2.5" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["calibration"]["temperature"] == 2.5
    assert record["calibration"]["root"] == record["data"]["cache"]["root"]
    assert record["options"]["calibration"] == [Path(first).name]
    assert str(tmp_path) not in json.dumps(record)
    moved = Path(first).rename(tmp_path / "moved.json")
    assert ran(cache, calibration=str(moved), out=out, resume=True).steps == result.steps
    for changed in ({"calibration": second}, {}):
        with pytest.raises(MismatchError, match="has calibration = "):
            ran(cache, out=out, resume=True, **changed)


def test_a_calibration_of_another_cache_or_of_none_is_refused(tmp_path: Path) -> None:
    cache, other = cache_of(tmp_path / "raw"), cache_of(tmp_path / "other", LOGITS * 2)
    with pytest.raises(MismatchError, match="belongs to other logits"):
        ran(cache, calibration=file_of(other, Calibration(2.0)))
    with pytest.raises(UsageError, match="--calibration divides"):
        distill(replace(OPTIONS, alpha=0.0, student=f"mlp:{WIDTH}-4-{CLASSES}", calibration="nothing.json"), data=DATA)
