"""`kdcache calibrate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import kdcache


def test_a_temperature_is_fitted_and_its_file_stands_beside_the_cache(run, folder: Path) -> None:
    result = run("calibrate", folder, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["temperature"] > 0
    assert all({"nll", "ece", "brier"} <= report[name].keys() for name in ("before", "after"))
    assert Path(report["path"]) == folder.with_name("teacher.calibration.json")
    assert "teacher_seen: unknown" in result.stderr
    assert run("verify", folder).exit_code == 0


def test_the_file_may_go_elsewhere_and_people_get_lines(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "other.json"
    result = run("calibrate", folder, "--method", "bias", "--holdout", "0.5", "--seed", "3", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "temperature:" in result.stdout
    assert out.exists()
    again = run("calibrate", folder, "-o", out)
    assert (again.exit_code, "--overwrite" in again.stderr) == (2, True)
    assert run("calibrate", folder, "-o", out, "--overwrite").exit_code == 0


def test_people_read_which_ece_and_that_the_file_is_there(run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 3)).astype(np.float32)
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from the softmax: T = 1 is right
    with kdcache.Writer(tmp_path / "c", classes=3, provenance={"teacher_seen": "no"}) as writer:
        writer.write(np.arange(2000), logits, labels)
    result = run("calibrate", tmp_path / "c", "--seed", "7")
    assert result.exit_code == 0, result.stderr
    assert "the file is written all the same" in result.stdout
    assert result.stdout.count("ece (equal width):") == result.stdout.count("ece (equal mass):") == 2


def test_what_cannot_be_meant_is_a_usage_error(run, folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--holdout", "1.5"), "--holdout"),
        (("--holdout", "0.05"), "5 measured on"),
        (("--method", "matrix"), "matrix"),
        (("--on", tmp_path / "nothing"), "nothing"),
    ):
        result = run("calibrate", folder, *arguments)
        assert result.exit_code in (1, 2, 4), result.stderr
        assert message in result.stderr


def test_the_methods_on_offer_are_those_that_there_are() -> None:
    from kdcache.train.calibration import METHODS
    from kdcache_cli.calibrate import command

    method = next(parameter for parameter in command.params if parameter.name == "method")
    assert tuple(method.type.choices) == METHODS
