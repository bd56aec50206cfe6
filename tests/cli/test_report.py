"""`kdcache report`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kdcache


def test_people_read_a_summary_and_what_to_do(run, folder: Path) -> None:
    result = run("report", folder, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "top1:" in result.stdout
    assert "teacher seen: unknown" in result.stdout
    assert "Warning (teacher): " in result.stdout  # random logits
    assert "flattering if the teacher saw these rows" in result.stdout
    assert "    kdcache " in result.stdout


def test_json_has_the_parts_of_a_report(run, folder: Path) -> None:
    result = run("report", folder, "--data", "digits:test", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {"cache", "teacher", "data", "students", "unavailable", "advice"} <= set(found)
    assert found["cache"]["class_names"] == ["cat", "dog", "owl"]
    assert found["data"]["covered"]["data"] == "digits:test"
    assert any("3 classes only" in one["text"] for one in found["advice"])


def test_a_cache_without_labels_and_names_says_what_is_missing(run, tmp_path: Path) -> None:
    with kdcache.Writer(tmp_path / "c", classes=5) as writer:
        writer.write(np.arange(20), np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32))
    result = run("report", tmp_path / "c")
    assert result.exit_code == 0, result.stderr
    assert "not available:" in result.stdout
    assert "the rows have no labels" in result.stdout


def test_names_out_of_files_never_move_a_terminals_cursor(run, tmp_path: Path) -> None:
    names, labels = ["a\x1b[2J", "b", "c", "d", "e"], np.arange(100) % 5
    logits = np.eye(5, dtype=np.float32)[np.where(labels == 0, 1, labels)] * 5
    with kdcache.Writer(tmp_path / "c", classes=names) as writer:
        writer.write(np.arange(100), logits, labels)
    result = run("report", tmp_path / "c", "--quiet")
    assert "poor on 1 of 5 classes: a\\x1b[2J (0)" in result.stdout
    assert "\x1b" not in result.stdout


def test_the_page_is_made_and_never_over_another(run, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    page = tmp_path / "pages" / "report.html"
    result = run("report", folder, "-o", page, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["path"] == str(page)
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    again = run("report", folder, "-o", page)
    assert (again.exit_code, "exists" in again.stderr) == (2, True)
    assert run("report", folder, "-o", page, "--overwrite").exit_code == 0


def test_what_cannot_be_meant_has_its_exit_code(run, folder: Path, shard: Path, tmp_path: Path) -> None:
    for arguments, code, message in (
        ((tmp_path / "nothing",), 4, "does not exist"),
        ((folder, "--data", "nonsense"), 2, "nonsense"),
        ((folder, "--run", tmp_path / "no-run"), 2, "no-run"),
    ):
        result = run("report", *arguments)
        assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    shard.unlink()
    assert run("report", folder).exit_code == 4
