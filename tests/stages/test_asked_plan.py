"""What options say of a plan is what the dump then writes, so that no dump is refused for what it did not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kdcache.errors import MismatchError, UsageError
from kdcache.stages.asked_plan import asked_plan, check_path
from kdcache.stages.precompute import PrecomputeResult, precompute
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.store.occupant import occupant
from kdcache.store.plan import first_difference

MODULE = """
import torch

def teacher():
    torch.manual_seed(0)
    return torch.nn.Linear(5, 3)

def unseen():
    raise RuntimeError("the teacher was loaded")
"""
DATA = TensorDataset(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of factories in the current folder."""
    name = f"asked_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def asked(out: Path, options: PrecomputeOptions) -> dict[str, Any]:
    found = occupant(out)
    assert found is not None
    return asked_plan(options, found)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shard_rows": 8, "batch_size": 4, "dtype": "float32"},
        {"limit": 20, "threads": 1, "device": "cpu", "amp": "bf16"},
        {"limit": 99, "teacher_saw": "no", "licence": "CC-BY-4.0"},
    ],
)
@pytest.mark.parametrize("name", ["cache", "cache.h5"])
@pytest.mark.parametrize("prefix", ["", "py:"])
def test_options_agree_with_the_plan_of_their_own_dump(
    tmp_path: Path, module: str, settings: dict[str, Any], name: str, prefix: str
) -> None:
    options = PrecomputeOptions(teacher=f"{prefix}{module}:teacher", quiet=True, **settings)
    precompute(None, DATA, tmp_path / name, options=options)
    check_path(tmp_path / name, options)
    known = asked(tmp_path / name, options)
    found = occupant(tmp_path / name)
    assert found is not None
    known.pop("shard_rows" if name.endswith(".h5") else "", None)
    assert first_difference(found.plan, known, is_partial=True) is None


def test_weights_are_known_by_name_and_size_wherever_they_lie(tmp_path: Path, module: str) -> None:
    torch.manual_seed(1)
    network = nn.Linear(5, 3)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    options = PrecomputeOptions(teacher=f"{module}:teacher", weights=Path("w.pt"), quiet=True)
    precompute(None, DATA, tmp_path / "cache", options=options)
    check_path(tmp_path / "cache", options)
    (tmp_path / "runs").mkdir()
    (tmp_path / "w.pt").rename(tmp_path / "runs" / "w.pt")
    check_path(tmp_path / "cache", PrecomputeOptions(teacher=f"{module}:teacher", weights=Path("runs/w.pt")))
    with pytest.raises(MismatchError, match=r"provenance\.teacher\.weights is .*'w\.pt'.* there and None"):
        check_path(tmp_path / "cache", PrecomputeOptions(teacher=f"{module}:teacher"))


def test_the_limit_is_compared_with_the_rows_of_the_data(tmp_path: Path) -> None:
    precompute(nn.Linear(5, 3), DATA, tmp_path / "cache", quiet=True)
    for limit in (None, 30, 31):
        check_path(tmp_path / "cache", PrecomputeOptions(limit=limit))
    with pytest.raises(MismatchError, match=r"provenance\.data\.dumped is 30 there and 29 .*--limit"):
        check_path(tmp_path / "cache", PrecomputeOptions(limit=29))


def test_a_module_is_not_mistaken_for_the_teacher_of_the_options(tmp_path: Path, module: str) -> None:
    torch.manual_seed(0)
    network, options = nn.Linear(5, 3), PrecomputeOptions(teacher=f"{module}:unseen", quiet=True)
    results = [precompute(network, DATA, tmp_path / "cache", options=options) for _ in range(2)]
    assert [result.computed for result in results if isinstance(result, PrecomputeResult)] == [len(DATA), 0]


def test_another_dump_is_refused_before_its_data_are_loaded(tmp_path: Path, module: str) -> None:
    precompute(nn.Linear(5, 3), DATA, tmp_path / "cache", quiet=True)
    options = PrecomputeOptions(teacher=f"{module}:unseen", data=f"{module}:unseen", batch_size=9, quiet=True)
    with pytest.raises(MismatchError, match=r"provenance\.precision\.batch_size is 256 there and 9"):
        precompute(out=tmp_path / "cache", options=options)


def test_overwriting_needs_no_comparison(tmp_path: Path) -> None:
    precompute(nn.Linear(5, 3), DATA, tmp_path / "cache", quiet=True)
    check_path(tmp_path / "cache", PrecomputeOptions(batch_size=9, overwrite=True))
    with pytest.raises(UsageError, match=r"--overwrite goes with one process only"):
        check_path(tmp_path / "cache", PrecomputeOptions(overwrite=True, shard="0/2"))
