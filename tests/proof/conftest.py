"""What the proofs of docs/reliability.md share: helper modules beside them can be imported by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "stages"))  # precompute_runs, precompute_task


@pytest.fixture
def dumps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs of `precompute` in processes of their own (`precompute_runs.Dumps`), all with one date."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    from precompute_runs import Dumps

    runs = Dumps()
    yield runs
    runs.end_sessions()


@pytest.fixture(scope="module")
def fast() -> Iterator[None]:
    """Equal dates, and no waiting for the disk (tests/store/test_posix.py looks at the order of the calls)."""
    from kdcache.store import posix

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patch.setattr(posix, "fsync", lambda fd: None)
        patch.setattr(posix, "fsync_folder", lambda folder: None)
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Any]:
    """A disk of 18 MiB in memory."""
    from full_disk_runs import MIB, tmpfs

    with tmpfs(tmp_path / "disk", size=18 * MIB) as mounted:
        yield mounted


@pytest.fixture
def whole(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """What a dump leaves that never met a full disk, by the suffix of its name."""
    from full_disk_runs import command, contents, precompute_line

    def make(suffix: str, *more: object) -> dict[str, bytes]:
        out = tmp_path / "-".join(["whole", *map(str, more)]) / f"teacher{suffix}"
        assert command(*precompute_line(out, *more)).code == 0
        return contents(out)

    return make
