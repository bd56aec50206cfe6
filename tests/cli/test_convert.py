"""`kdcache convert`."""

from __future__ import annotations

import json
from pathlib import Path

import kdcache


def test_a_cache_is_written_in_another_encoding(run, folder: Path, tmp_path: Path) -> None:
    result = run("convert", folder, tmp_path / "sparse.h5", "--top-k", "2", "--temperatures", "1,4,z2", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    with kdcache.open(tmp_path / "sparse.h5") as cache:
        assert cache.root == report["root"]
        assert cache.encoding.to_json()["temperatures"] == [1.0, 4.0, "z2"]
    assert report["bytes_per_row"]["before"] == 10
    larger = run("convert", folder, tmp_path / "int8", "--dtype", "int8", "--quiet")
    assert larger.exit_code == 0
    assert "the rows are no smaller than they were" in larger.stdout
    assert run("verify", tmp_path / "int8").exit_code == 0


def test_what_cannot_be_meant_is_a_usage_error(run, folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--temperatures", "1,2"), "--top-k"),
        (("--dtype", "float8"), "float8"),
        (("--top-k", "2", "--temperatures", "2,1"), "ascend"),
        ((), "has this encoding already"),
    ):
        result = run("convert", folder, tmp_path / "out", *arguments)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert run("convert", tmp_path / "nothing", tmp_path / "out", "--dtype", "int8").exit_code == 4


def test_corrected_labels_come_from_the_csv_file_of_suspects(run, folder: Path, tmp_path: Path) -> None:
    with kdcache.open(folder) as cache:
        rows = cache.gather(range(len(cache)))
        ids, label = rows.sample_id.tolist(), rows.label.tolist()
    assert run("suspects", folder, "-o", tmp_path / "all.csv").exit_code == 0
    same = run("convert", folder, tmp_path / "out", "--labels", tmp_path / "all.csv")
    assert (same.exit_code, "nothing is to be corrected" in same.stderr) == (2, True)
    (tmp_path / "one.csv").write_text(f"sample_id,label\n{ids[5]},{(label[5] + 1) % 3}\n")
    result = run("convert", folder, tmp_path / "out", "--labels", tmp_path / "one.csv", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["labels_changed"] == 1
    with kdcache.open(tmp_path / "out") as made:
        assert made.gather([5]).label.tolist() == [(label[5] + 1) % 3]
        assert made.encoding == kdcache.open(folder).encoding
