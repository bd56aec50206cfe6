"""`kdcache inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import kdcache


def test_people_get_lines_and_programs_one_object(run, folder: Path) -> None:
    text = run("inspect", folder)
    summary = json.loads(run("inspect", folder, "--json").stdout)
    assert text.exit_code == 0
    assert summary["rows"] == 100
    assert summary["shards"] == 3
    assert summary["root"] == kdcache.open(folder).root
    assert summary["root"] in text.stdout


def test_a_path_without_a_cache_is_incomplete(run, tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "absent")
    assert result.exit_code == 4
    assert "absent" in result.stderr


def test_a_file_that_is_no_cache_is_corrupt(run, tmp_path: Path) -> None:
    (tmp_path / "notes.h5").write_bytes(b"not HDF5 at all" * 100)
    assert run("inspect", tmp_path / "notes.h5").exit_code == 3


def test_a_manifest_that_was_edited_is_corrupt(run, folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text(manifest.read_text().replace('"stop":40', '"stop":41'))
    assert run("inspect", folder).exit_code == 3
