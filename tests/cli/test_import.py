"""`kdcache import`."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

import kdcache

LOGITS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "theirs.npz", logits=LOGITS, y=np.arange(40) % 3)
    return tmp_path / "theirs.npz"


def test_the_rows_of_a_file_become_a_cache(run, npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher.h5"
    result = run("import", npz, "--logits", "logits", "--labels", "y", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "Note: no --ids: the sample ids are the row numbers 0 to 39.\n"
    found = json.loads(result.stdout)
    with kdcache.open(out) as cache:
        assert found["root"] == cache.root
        np.testing.assert_allclose(cache.gather(np.arange(40)).dense(), LOGITS, atol=1e-3)
    assert (found["rows"], found["classes"], found["bytes"]) == (40, 3, out.stat().st_size)
    assert (found["source"], found["format"]) == ("theirs.npz", "npz")
    assert len(found["sha256"]) == 64


def test_people_get_lines(run, npz: Path, tmp_path: Path) -> None:
    result = run("import", npz, "--logits", "logits", "--out", tmp_path / "t")
    assert result.exit_code == 0
    assert "rows:    40\n" in result.stdout
    assert "notes" not in result.stdout


def test_without_names_the_arrays_are_listed_with_the_flags_to_use(run, npz: Path) -> None:
    result = run("import", npz)
    assert result.exit_code == 2
    assert "  logits  (40, 3)  float32\n  y       (40,)    int64\n" in result.stderr
    assert "for example: --logits logits --labels y" in result.stderr


def test_without_a_place_the_one_array_of_a_file_is_listed_too(run, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", LOGITS)
    result = run("import", tmp_path / "a.npy")
    assert result.exit_code == 2
    assert "--out is needed" in result.stderr
    assert "a.npy holds\n  array  (40, 3)  float32\n" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--logits", "z", "--out", "t"], 2, "theirs.npz has no array 'z'; it holds"),
        (["--logits", "logits"], 2, "--out is needed"),
        (["--logits", "y", "--out", "t"], 1, "logits y holds int64; expected float16"),
        (["--logits", "logits", "--out", "t", "--kind", "probabilities"], 1, "array logits: row 0: not in [0, 1]"),
        (["--logits", "logits", "--out", "t", "--time-limit", "0"], 2, "--time-limit must be at least 1"),
    ],
)
def test_what_cannot_be_imported_ends_in_a_message_and_its_exit_code(
    run, npz: Path, tmp_path: Path, monkeypatch, options: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("import", npz, *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.npz"]


def test_a_file_that_crashes_what_reads_it_is_an_error_message(run, tmp_path: Path) -> None:
    """A stored chunk of 3 bytes with a checksum of 4: libhdf5 2.0.0 reads beyond it and dies of SIGSEGV."""
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        logits = file.create_dataset("logits", (16, 5), "f4", chunks=(16, 5), fletcher32=True)
        logits.id.write_direct_chunk((0, 0), b"abc")
    result = run("import", tmp_path / "theirs.h5", "--logits", "logits", "--out", tmp_path / "t.h5", "--json")
    assert result.exit_code == 1
    failure = json.loads(result.stdout)
    assert failure["exit_code"] == 1
    assert failure["error"].startswith("theirs.h5: ")
    if h5py.version.hdf5_version == "2.0.0":
        assert "crashed (SIGSEGV)" in failure["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.h5"]
