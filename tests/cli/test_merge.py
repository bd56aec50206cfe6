"""`kdcache merge`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import kdcache


def test_one_file_holds_the_rows_of_the_folder(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher.h5"
    result = run("merge", folder, out, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "path": str(out),
        "bytes": out.stat().st_size,
        "root": kdcache.open(out).root,
    }
    rows = np.arange(100)
    np.testing.assert_array_equal(
        kdcache.open(out).gather(rows).dense(),
        kdcache.open(folder).gather(rows).dense(),
    )


def test_an_existing_file_is_replaced_only_when_asked_for(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher.h5"
    out.write_text("mine")
    assert run("merge", folder, out).exit_code == 2
    assert out.read_text() == "mine"
    assert run("merge", folder, out, "--overwrite").exit_code == 0


def test_a_damaged_row_leaves_no_file(run, folder: Path, shard: Path, tmp_path: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert run("merge", folder, tmp_path / "teacher.h5").exit_code == 3
    assert not (tmp_path / "teacher.h5").exists()


def test_views_are_taken_out_and_a_view_that_is_not_there_is_a_mismatch(run, folder: Path, tmp_path: Path) -> None:
    result = run("merge", folder, tmp_path / "copy", "--views", "0", "--json")
    assert result.exit_code == 0, result.stderr
    copied = json.loads(result.stdout)
    assert copied["root"] == kdcache.open(tmp_path / "copy").root
    assert copied["bytes"] == sum(shard.stat().st_size for shard in (tmp_path / "copy" / "shards").iterdir())
    result = run("merge", folder, tmp_path / "more.h5", "--views", "0-3")
    assert result.exit_code == 5
    assert "has the views [0]" in result.stderr
    assert run("merge", folder, tmp_path / "more.h5", "--views", "all").exit_code == 2
    assert not (tmp_path / "more.h5").exists()
