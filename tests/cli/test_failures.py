"""What a failing command prints: an object under --json, a warning for variables that set nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_failure_under_json_is_one_object_with_the_message_and_the_exit_code(run, tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "none.h5", "--json")
    assert result.exit_code == 4
    failure = json.loads(result.stdout)
    assert failure["exit_code"] == 4
    assert "none.h5" in failure["error"]


def test_a_report_of_damage_stays_the_only_object(run, tmp_path: Path) -> None:
    (tmp_path / "bad.h5").write_bytes(b"no HDF5")
    result = run("verify", tmp_path / "bad.h5", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["ok"] is False


def test_a_variable_that_sets_no_option_is_warned_of(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_INSPECT_JASON", "1")
    assert "KDCACHE_INSPECT_JASON" in run("inspect", tmp_path / "none.h5").stderr
