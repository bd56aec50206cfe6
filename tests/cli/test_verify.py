"""`kdcache verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kdcache


def test_a_sound_cache_is_reported_with_its_root_hash(run, folder: Path) -> None:
    result = run("verify", folder, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ok"]
    assert report["rows"] == 100
    assert report["root"] == kdcache.open(folder).root


def test_a_flipped_bit_is_corrupt_and_the_report_names_the_shard(run, folder: Path, shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = run("verify", folder, "--json")
    assert result.exit_code == 3
    assert shard.name in result.stderr
    assert not json.loads(result.stdout)["ok"]


def test_a_missing_shard_is_incomplete(run, folder: Path, shard: Path) -> None:
    shard.unlink()
    result = run("verify", folder)
    assert result.exit_code == 4
    assert shard.name in result.stderr


def test_people_read_each_problem_once(run, folder: Path) -> None:
    gone = sorted((folder / "shards").iterdir())
    for path in gone:
        path.unlink()
    result = run("verify", folder)
    assert "ok: " in result.stdout
    for path in gone:
        assert (result.stdout + result.stderr).count(f"{path.name} is missing") == 1
    assert len(json.loads(run("verify", folder, "--json").stdout)["problems"]) == len(gone)


def test_another_root_hash_is_a_mismatch(run, folder: Path) -> None:
    root = kdcache.open(folder).root
    assert run("verify", folder, "--expect-root", root).exit_code == 0
    assert run("verify", folder, "--expect-root", "0" * 64).exit_code == 5


FACTORIES = """
import torch

def first():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

def second():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


@pytest.fixture
def factories(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of teachers, of which `first` is in teacher.h5."""
    name = f"teachers_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    assert (
        run("precompute", "--teacher", f"{name}:first", "--data", "digits:test", "--out", "teacher.h5").exit_code == 0
    )
    return name


def test_the_teacher_of_a_cache_passes_with_its_data(run, factories: str) -> None:
    result = run("verify", "teacher.h5", "--teacher", f"{factories}:first", "--data", "digits:test", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["ok"]
    assert report["teacher"]["rows"] == 64
    assert report["teacher"]["same_weights"]


@pytest.mark.parametrize(
    ("teacher", "data", "message"),
    [
        ("second", "digits:test", "this is another teacher"),
        ("first", "digits:train", "lacks 64 of the 64 samples"),
    ],
)
def test_another_teacher_or_other_data_is_a_mismatch(
    run, factories: str, teacher: str, data: str, message: str
) -> None:
    result = run("verify", "teacher.h5", "--teacher", f"{factories}:{teacher}", "--data", data)
    assert result.exit_code == 5
    assert message in result.stderr


def test_a_teacher_without_data_is_a_usage_error(run, folder: Path) -> None:
    result = run("verify", folder, "--teacher", "networks:wide")
    assert result.exit_code == 2
    assert "--data" in result.stderr


def test_the_data_of_a_cache_pass_without_a_teacher(run, factories: str) -> None:
    result = run("verify", "teacher.h5", "--data", "digits:test", "--sample", "20", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["ok"]
    assert report["data"]["rows"] == 20
    assert (report["data"]["labels_differ"], report["data"]["inputs_differ"]) == (0, 0)


def test_other_data_are_a_mismatch_with_their_counts(run, factories: str, tmp_path: Path) -> None:
    (tmp_path / f"{factories}_data.py").write_text(
        "import torch\n"
        "from kdcache.stages.data import load_data\n"
        "def doubled():\n"
        "    data = load_data('digits:test')\n"
        "    x, y = zip(*data.dataset)\n"
        "    doubled = torch.utils.data.TensorDataset(torch.stack(x) * 2, torch.tensor(y))\n"
        "    doubled.sample_ids = data.sample_ids\n"
        "    return doubled\n"
    )
    result = run("verify", "teacher.h5", "--data", f"{factories}_data:doubled", "--json")
    assert result.exit_code == 5
    assert "Likely cause: transform. 64 of the 64 inputs compared differ, ids and labels agree" in result.stderr
    report = json.loads(result.stdout)
    assert not report["ok"]
    assert (report["data"]["inputs_differ"], report["data"]["cause"]) == (64, "transform")


def test_a_pipeline_without_data_is_a_usage_error_and_another_one_a_mismatch(run, factories: str) -> None:
    result = run("verify", "teacher.h5", "--augment", "shift")
    assert result.exit_code == 2
    assert "--data" in result.stderr
    result = run("verify", "teacher.h5", "--data", "digits:test", "--augment", "shift")
    assert result.exit_code == 5
    assert "was dumped from the items as they are" in result.stderr
