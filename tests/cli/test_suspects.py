"""`kdcache suspects`."""

from __future__ import annotations

import csv
import json
import stat
from pathlib import Path

import numpy as np
import pytest

import kdcache
from kdcache.stages.suspects import COLUMNS, NAMES

ROWS = 60


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """A sure teacher of three classes; rows 7 and 40 have another label, row 5 has none."""
    labels = np.arange(ROWS) % 3
    logits = np.zeros((ROWS, 3), np.float32)
    logits[np.arange(ROWS), labels] = np.where(np.arange(ROWS) == 40, 4, 3)
    labels[[7, 40]], labels[5] = (labels[[7, 40]] + 1) % 3, -1
    ids = [f"=row/{n}" if n == 7 else f"row/{n}" for n in range(ROWS)]
    names, provenance = ["cat", "=dog", "owl"], {"teacher_seen": "no"}
    with kdcache.Writer(tmp_path / "noisy", classes=names, provenance=provenance) as writer:
        writer.write(ids, logits, labels)
    return tmp_path / "noisy"


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_most_suspicious_rows_come_first(run, noisy: Path, tmp_path: Path) -> None:
    result = run("suspects", noisy, "-o", tmp_path / "s.csv", "--json")
    assert result.exit_code == 0, result.stderr
    report, lines = json.loads(result.stdout), read(tmp_path / "s.csv")
    assert tuple(lines[0]) == (*COLUMNS, *NAMES)
    assert [line["sample_id"] for line in lines[:2]] == ["row/40", "'=row/7"]
    assert [line["is_issue"] for line in lines[:3]] == ["1", "1", "0"]
    assert (lines[1]["label_name"], lines[1]["teacher_class_name"]) == ("owl", "'=dog")
    scores = [float(line["score"]) for line in lines]
    assert scores == sorted(scores)
    assert len(lines) == report["written"] == report["labelled"] == ROWS - 1
    assert (report["rows"], report["disagree"], report["issues"], report["warnings"]) == (ROWS, 2, 2, [])
    assert sum(one["found_elsewhere"] for one in report["classes"]) == 2
    assert "Warning" not in result.stderr
    assert stat.S_ISREG((tmp_path / "s.csv").stat().st_mode)


def test_people_read_a_summary(run, noisy: Path, tmp_path: Path) -> None:
    result = run("suspects", noisy, "-o", tmp_path / "s.csv", "--score", "margin", "--limit", "2", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "issues:" in result.stdout
    assert "2 owl: 2 of 21" in result.stdout
    assert len(read(tmp_path / "s.csv")) == 2


@pytest.mark.parametrize("seen", ["yes", "unknown"])
def test_a_teacher_that_saw_the_rows_is_warned_of(run, tmp_path: Path, seen: str) -> None:
    with kdcache.Writer(tmp_path / "c", classes=2, provenance={"teacher_seen": seen}) as writer:
        writer.write(np.arange(4), np.eye(2, dtype=np.float32)[[0, 1, 0, 1]], np.array([0, 1, 1, 1]))
    result = run("suspects", tmp_path / "c", "-o", tmp_path / "s.csv", "--json")
    assert result.exit_code == 0, result.stderr
    assert "trained on these rows" in result.stderr
    assert json.loads(result.stdout)["teacher_seen"] == seen


def test_what_cannot_be_meant_is_a_usage_error(run, noisy: Path, folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.csv"
    there.write_text("mine")
    for arguments, code, message in (
        ((noisy, "-o", there), 2, "exists"),
        ((noisy,), 2, "--out"),
        ((noisy, "-o", tmp_path / "s.csv", "--limit", "0"), 2, "--limit must be at least 1"),
        ((noisy, "-o", tmp_path / "s.csv", "--view", "3"), 5, "not 3"),
        ((noisy, "-o", tmp_path / "s.csv", "--temperature", "-1"), 2, "temperature is -1"),
        ((tmp_path / "nothing", "-o", tmp_path / "s.csv"), 4, "does not exist"),
    ):
        result = run("suspects", *arguments)
        assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert there.read_text() == "mine"
    mine = tmp_path / "s.csv"
    assert run("suspects", noisy, "-o", mine).exit_code == 0
    assert run("suspects", folder, "-o", mine, "--overwrite").exit_code == 0
    assert len(read(mine)) == 100


def test_overwrite_replaces_no_file_that_is_no_list(run, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    kdcache.convert(folder, cache, dtype="float32")
    other, record = tmp_path / "other.csv", tmp_path / "run.json"
    other.write_text("sample_id,mine\n")
    record.write_text("{}")
    (tmp_path / "link.csv").symlink_to(cache)
    for path in (cache, other, record, tmp_path / "link.csv"):
        before = path.read_bytes()
        result = run("suspects", cache, "-o", path, "--overwrite")
        assert (result.exit_code, "is not a list that `kdcache suspects` made" in result.stderr) == (2, True)
        assert path.read_bytes() == before
    missing = tmp_path / "nothing" / "s.csv"
    assert run("suspects", cache, "-o", missing).exit_code == 2
    assert not missing.parent.exists()


def test_the_margin_of_one_kept_class_is_refused(run, folder: Path, tmp_path: Path) -> None:
    kdcache.convert(folder, tmp_path / "one", top_k=1)
    result = run("suspects", tmp_path / "one", "-o", tmp_path / "s.csv", "--score", "margin")
    assert (result.exit_code, "two largest" in result.stderr) == (2, True)
    assert run("suspects", tmp_path / "one", "-o", tmp_path / "s.csv").exit_code == 0
    assert "" in {line["margin"] for line in read(tmp_path / "s.csv")}


def test_one_labelled_class_is_said(run, tmp_path: Path) -> None:
    with kdcache.Writer(tmp_path / "c", classes=3, provenance={"teacher_seen": "no"}) as writer:
        writer.write(np.arange(4), np.eye(3, dtype=np.float32)[[0, 1, 0, 1]], np.zeros(4, np.int64))
    result = run("suspects", tmp_path / "c", "-o", tmp_path / "s.csv")
    assert result.exit_code == 0, result.stderr
    assert "of a single class no row can be an issue" in result.stderr
