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
    page = tmp_path / "report.html"
    result = run("report", folder, "-o", page, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["path"] == str(page)
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    again = run("report", folder, "-o", page)
    assert (again.exit_code, "exists" in again.stderr) == (2, True)
    assert run("report", folder, "-o", page, "--overwrite").exit_code == 0


def test_no_other_file_is_replaced_by_a_page(run, tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    with kdcache.Writer(cache, classes=3) as writer:
        writer.write(np.arange(9), np.eye(3, dtype=np.float32)[np.arange(9) % 3], np.arange(9) % 3)
    before = cache.read_bytes()
    result = run("report", cache, "-o", cache, "--overwrite")
    assert (result.exit_code, "is not a page that `kdcache report` made" in result.stderr) == (2, True)
    assert cache.read_bytes() == before
    missing = tmp_path / "nothing" / "x.html"
    result = run("report", cache, "-o", missing)
    assert (result.exit_code, "is no folder" in result.stderr, missing.parent.exists()) == (2, True, False)


def test_commands_can_be_pasted_and_a_page_names_no_folder(
    run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my caches").mkdir()
    folder.rename(tmp_path / "my caches" / "teacher")
    result = run("report", "my caches/teacher", "--json", "-o", "page.html")
    assert result.exit_code == 0, result.stderr
    commands = [one["command"] for one in json.loads(result.stdout)["advice"] if one["command"]]
    assert [one for one in commands if "suspects" in one] == ["kdcache suspects 'my caches/teacher' -o suspects.csv"]
    page = Path("page.html").read_text()
    assert "kdcache suspects teacher -o" in page
    assert "my caches" not in page


def test_students_are_a_table_and_runs_of_another_cache_are_named(run, folder: Path, tmp_path: Path) -> None:
    for name, alpha in (("kd", 0.9), ("labels", 0.0)):
        arguments = ("--data", "digits:test", "--val", "digits:test", "--student", "mlp:64-10", "--steps", "20")
        cache = ("--cache", tmp_path / "digits") if alpha else ()
        if alpha:
            with kdcache.Writer(tmp_path / "digits", classes=10) as writer:
                writer.write(np.arange(497) + 1300, np.random.default_rng(0).normal(size=(497, 10)).astype(np.float32))
        result = run("distill", *cache, *arguments, "--alpha", alpha, "--out", tmp_path / name, "--quiet")
        assert result.exit_code == 0, result.stderr
    result = run("report", folder, "--run", tmp_path / "kd", "--run", tmp_path / "labels")
    assert result.exit_code == 0, result.stderr
    head = next(line for line in result.stdout.splitlines() if line.startswith("student "))
    assert head.split("  ")[0] == "student"
    assert all(name in head for name in ("accuracy %", "NLL", "ECE (equal width)", "agreement %", "against labels %"))
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith(("kd ", "labels "))}
    assert "labels only" in lines["labels"]
    assert lines["kd"].count("(") == 1  # the standard error of the difference
    assert "kd (" in result.stdout
    assert "learnt from another one" in result.stdout


def test_what_is_no_cache_leads_to_one(run, folder: Path, tmp_path: Path) -> None:
    versions = tmp_path / "versions"
    versions.mkdir()
    result = run("report", versions)
    assert (result.exit_code, "kdcache precompute --out" in result.stderr) == (4, True)
    (versions / "versions.json").write_text("{}")
    folder.rename(versions / "v000002")
    (versions / "v000003").mkdir()
    result = run("report", versions)
    assert (result.exit_code, f"the current one is {versions / 'v000002'}" in result.stderr) == (4, True)


def test_what_cannot_be_meant_has_its_exit_code(run, folder: Path, shard: Path, tmp_path: Path) -> None:
    for arguments, code, message in (
        ((tmp_path / "nothing",), 4, "does not exist"),
        ((folder, "--data", "nonsense"), 2, "nonsense"),
        ((folder, "--run", tmp_path / "no-run"), 2, "no-run"),
        (("",), 2, "the path is empty"),
        ((folder, "--overwrite"), 2, "--overwrite is about the page"),
    ):
        result = run("report", *arguments)
        assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    shard.unlink()
    assert run("report", folder).exit_code == 4
