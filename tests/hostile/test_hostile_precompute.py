"""S1: `precompute` goes on with a dump in progress only if every file of it is what a writer left there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_base import CLASSES, SHARD_ROWS
from hostile_cases import all_cases
from hostile_dumps import ATTACKS
from torch import nn
from torch.utils.data import Dataset

from kdcache.errors import CorruptCacheError, KDCacheError
from kdcache.stages.precompute import precompute
from kdcache.store.verify import verify

CASES = {case.name: case for case in all_cases()}
ROWS = 300


class Images(Dataset[tuple[torch.Tensor, int]]):
    """300 items."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((5,), index / ROWS), index % CLASSES


def run(out: Path, **settings: Any) -> None:
    teacher = nn.Linear(5, CLASSES)
    nn.init.constant_(teacher.weight, 0.5)
    nn.init.zeros_(teacher.bias)
    precompute(teacher, Images(), out, device="cpu", quiet=True, batch_size=128, shard_rows=SHARD_ROWS, **settings)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump whose second shard is left to others."""
    root = tmp_path_factory.mktemp("begun") / "teacher"
    run(root, shard="0/2")
    (root / ".lock").unlink()
    assert (root / "shards" / "v000-00000.json").exists()
    return root


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(ATTACKS)[:: 1 if metafunc.config.getoption("--long") else 4])


def test_precompute_does_not_go_on_with_a_hostile_dump(name: str, tmp_path: Path, begun: Path) -> None:
    root = tmp_path / "teacher"
    shutil.copytree(begun, root)
    ATTACKS[name](root)
    if name == "shard_exchanged":  # what is committed is not read again here, but by whoever opens the cache
        run(root)
        with pytest.raises(CorruptCacheError, match=r"v000-00000\.h5"):
            verify(root, raise_on_error=True)
        return
    with pytest.raises(KDCacheError, match=CASES[name].reason) as caught:
        run(root)
    assert caught.value.exit_code == CASES[name].code


def test_precompute_goes_on_with_a_sound_one(tmp_path: Path, begun: Path) -> None:
    root = tmp_path / "teacher"
    shutil.copytree(begun, root)
    run(root)
    assert verify(root).ok
