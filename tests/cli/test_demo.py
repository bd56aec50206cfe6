"""`kdcache demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kdcache
from kdcache.stages import demo


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the whole way; what the students learn is measured by the demo itself."""
    monkeypatch.setattr(demo, "TEACHER_STEPS", 10)
    monkeypatch.setattr(demo, "STUDENT_STEPS", 5)


def test_json_is_one_object_with_the_arms_and_their_differences(run, tmp_path: Path) -> None:
    result = run("demo", "--seeds", "2", "--out", tmp_path / "digits.h5", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    arms = ("label_only", "distilled_same_rows", "hard_labels", "distilled", "all_labels")
    assert all(len(report[arm]["runs"]) == 2 and {"mean", "std"} <= set(report[arm]) for arm in arms)
    assert len(report["differences"]) == 2
    assert report["rows"] == len(kdcache.open(tmp_path / "digits.h5"))
    assert {"teacher_accuracy", "cache", "bytes_per_row", "seconds"} <= set(report)


def test_people_get_a_table_and_what_to_run_next(run) -> None:
    result = run("demo", "--seeds", "2")
    assert result.exit_code == 0, result.stderr
    assert "label_only" in result.stdout
    assert "next: kdcache precompute" in result.stdout


def test_fewer_than_two_seeds_have_no_standard_error(run) -> None:
    assert run("demo", "--seeds", "1").exit_code == 2
