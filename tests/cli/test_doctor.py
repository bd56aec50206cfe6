"""The report of `kdcache doctor`."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from kdcache_cli.main import cli


def test_json_lists_every_check_and_leaves_nothing_in_the_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--path", str(tmp_path), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ok"]
    assert {"torch", "h5py", "HDF5", "mmap", "hard links", "record locks", "h5dump"} <= {
        check["name"] for check in report["checks"]
    }
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_broken_with_advice(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--path", str(tmp_path / "absent")])
    assert result.exit_code == 1
    assert "! folder" in result.stdout
    assert "Choose a folder" in result.stdout
