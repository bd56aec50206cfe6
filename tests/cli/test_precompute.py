"""`kdcache precompute`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kdcache

FACTORIES = """
import torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

def raising():
    raise ValueError("no such file")

def nan():
    class Nan(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), float("nan"))
    return Nan()
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The arguments of a small dump, in a folder with a module of factories."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"  # a module of its own for each test
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)

    def arguments(factory: str = "linear", out: str = "teacher.h5") -> list[str]:
        return ["precompute", "--teacher", f"{name}:{factory}", "--data", "digits:test", "--out", out]

    return arguments


def test_a_dump_ends_in_a_cache_and_prints_what_was_done(run, arguments) -> None:
    result = run(*arguments(), "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    cache = kdcache.open("teacher.h5")
    assert report["root"] == cache.root
    assert report["samples"] == len(cache) == 497
    assert np.isfinite(cache.gather(np.arange(497)).dense()).all()


def test_the_same_command_again_has_nothing_left_to_do(run, arguments) -> None:
    first = json.loads(run(*arguments(), "--json").stdout)
    again = run(*arguments(), "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["root"] == first["root"]
    assert json.loads(again.stdout)["computed"] == 0


def test_a_dry_run_reports_the_cost_and_writes_nothing(run, arguments, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*.h5*"))
    result = run(*arguments(), "--dry-run", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rows"] == 497
    assert sorted(tmp_path.rglob("*.h5*")) == before


@pytest.mark.parametrize(
    ("change", "exit_code", "message"),
    [
        ({"--teacher": "nowhere:factory"}, 2, "nowhere"),
        ({"--data": "digts:train"}, 2, "digits"),
        ({"--out": None}, 2, "--out"),
        ({"--dtype": "float8"}, 2, "float16"),
        ({"--shard": "4/4"}, 2, "--shard"),
        ({"--limit": "0"}, 2, "--limit"),
        ({"--device": "abacus"}, 2, "--device"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error_that_names_it(
    run, arguments, change: dict[str, str | None], exit_code: int, message: str
) -> None:
    given = arguments()
    options = dict(zip(given[1::2], given[2::2], strict=True)) | change
    result = run("precompute", *(part for pair in options.items() if pair[1] is not None for part in pair))
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("factory", "message"), [("raising", "no such file"), ("nan", "NaN")])
def test_a_teacher_that_fails_exits_with_1_and_the_reason(run, arguments, factory: str, message: str) -> None:
    result = run(*arguments(factory))
    assert result.exit_code == 1
    assert message in result.stderr


def test_another_dtype_on_a_path_that_holds_a_cache_is_a_mismatch(run, arguments) -> None:
    assert run(*arguments(out="teacher/")).exit_code == 0
    result = run(*arguments(out="teacher/"), "--dtype", "float32")
    assert result.exit_code == 5
    assert "float32" in result.stderr
