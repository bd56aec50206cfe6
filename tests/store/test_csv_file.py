"""CSV files: text that spreadsheets do not run, and nothing half-written."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import StorageError, UsageError
from kdcache.store import posix
from kdcache.store.csv_file import safe_text, write_csv


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "\nx", "'x"])
def test_text_that_could_be_run_gets_an_apostrophe(text: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["id", "number"], [(text, -1)])
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["id", "number"], ["'" + text, "-1"]]


@given(st.text(max_size=20))
def test_taking_one_leading_apostrophe_off_gives_the_text_back(text: str) -> None:
    safe = safe_text(text)
    assert (safe[1:] if safe.startswith("'") else safe) == text
    assert not safe.startswith(("=", "+", "-", "@"))


def test_many_lines_are_streamed(tmp_path: Path) -> None:
    assert write_csv(tmp_path / "new" / "a.csv", ["n"], ((n,) for n in range(20_000))) == 20_000
    found = (tmp_path / "new" / "a.csv").read_bytes()
    assert found == "".join(f"{line}\r\n" for line in ("n", *range(20_000))).encode()


def test_a_file_that_is_there_stays_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists; choose another name"):
        write_csv(path, ["n"], [(1,)])
    assert path.read_text() == "mine"
    write_csv(path, ["n"], [(None,), ("a,b",)], overwrite=True)
    assert path.read_bytes() == b'n\r\n""\r\n"a,b"\r\n'
    with pytest.raises(UsageError, match="is a folder"):
        write_csv(tmp_path, ["n"], [], overwrite=True)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(posix, "pwrite_all", full)
    with pytest.raises(StorageError, match="the disk is full"):
        write_csv(tmp_path / "a.csv", ["n"], [(1,)])
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_who_gives_the_lines_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_csv(tmp_path / "a.csv", ["n"], ((1 // n,) for n in (1, 0)))
    assert list(tmp_path.iterdir()) == []
