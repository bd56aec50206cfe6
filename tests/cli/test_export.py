"""`kdcache export`."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

import kdcache


@pytest.mark.parametrize("name", ["plain.npz", "plain.h5"])
def test_the_file_holds_raw_float32_logits(run, folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    result = run("export", folder, out, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"path": str(out), "bytes": out.stat().st_size}
    expected = kdcache.open(folder).gather(np.arange(100))
    with np.load(out) if name.endswith("npz") else h5py.File(out) as file:
        np.testing.assert_array_equal(file["logits"][:], expected.dense())
        np.testing.assert_array_equal(file["sample_id"][:], np.arange(100))
        np.testing.assert_array_equal(file["label"][:], expected.label)


def test_gzip_makes_a_smaller_file_of_the_same_rows(run, folder: Path, tmp_path: Path) -> None:
    run("export", folder, tmp_path / "plain.npz")
    assert run("export", folder, tmp_path / "small.npz", "--compress", "gzip").exit_code == 0
    assert (tmp_path / "small.npz").stat().st_size < (tmp_path / "plain.npz").stat().st_size


def test_an_existing_file_is_replaced_only_when_asked_for(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.npz"
    out.write_text("mine")
    assert run("export", folder, out).exit_code == 2
    assert out.read_text() == "mine"
    assert run("export", folder, out, "--overwrite").exit_code == 0


def test_an_unknown_ending_is_a_usage_error(run, folder: Path, tmp_path: Path) -> None:
    assert run("export", folder, tmp_path / "plain.csv").exit_code == 2
