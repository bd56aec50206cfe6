"""A small cache, and a way to run a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import kdcache
from kdcache_cli.main import cli

ROWS, CLASSES = 100, 3


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs `kdcache` with arguments, which may be paths."""

    def invoke(*arguments: object, **env: str) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], env=env)

    return invoke


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder cache of three shards."""
    rng = np.random.default_rng(0)
    with kdcache.Writer(tmp_path / "teacher", classes=["cat", "dog", "owl"], shard_rows=40) as writer:
        logits = rng.normal(size=(ROWS, CLASSES)).astype(np.float32)
        writer.write(np.arange(ROWS), logits, rng.integers(0, CLASSES, ROWS))
    return tmp_path / "teacher"


@pytest.fixture
def shard(folder: Path) -> Path:
    """The first shard of the folder cache, made writable so that a test can damage it."""
    path = min((folder / "shards").iterdir())
    path.chmod(0o644)
    return path
