"""R2: whatever system call fails, and however, there is a typed error or a success; the next run makes it right."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disk_calls import CHANGING, Disk
from disk_faults import DATA_CALLS, KINDS, Children, Fault, children
from disk_jobs import JOBS, Job, contents, end_locks, rows_of, start_afresh

from kdcache.errors import KDCacheError
from kdcache.store import posix

BY_JOB = pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)


@dataclass(frozen=True)
class Undisturbed:
    """What a job does when nothing fails.

    Attributes:
        template: a folder with what it starts from.
        calls: the names of its system calls, in order.
        contents: what it leaves.
        rows: those of the cache that it makes, and of the one that was there before.
    """

    template: Path
    calls: list[str]
    contents: dict[str, bytes]
    rows: tuple[bytes | None, bytes | None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    start_afresh(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # nobody cuts the power
    yield
    end_locks()


@pytest.fixture(scope="module")
def forks() -> Iterator[Children]:
    with children() as found:
        yield found


def undisturbed(job: Job, folder: Path) -> Undisturbed:
    template, root = folder / "template", folder / "undisturbed"
    template.mkdir()
    job.prepare(template)
    end_locks()
    shutil.copytree(template, root)
    before = rows_of(root / job.out) if job.is_cache else None
    with Disk(root) as disk:
        job.run(root)
    end_locks()
    assert disk.missed == []
    assert {"create", "pwrite", "fsync"} <= set(disk.calls) or job.name == "read"
    after = rows_of(root / job.out) if job.is_cache else None
    assert (after is not None) == job.is_cache
    return Undisturbed(template, disk.calls, contents(root), (after, before))


def fail(job: Job, root: Path, fault: Fault) -> KDCacheError | None:
    """Runs a job with a fault; returns its error. An error of another type is one of the test."""
    caught: KDCacheError | None = None
    with Disk(root, fault) as disk:
        try:
            job.run(root)
        except KDCacheError as error:
            caught = error.with_traceback(None)
            caught.__context__ = caught.__cause__ = None
        if open_files(disk):
            gc.collect()
        assert open_files(disk) == []
    assert disk.missed == []
    return caught


def open_files(disk: Disk) -> list[str]:
    """Descriptors but those of locks, which live as long as their process."""
    return [path for path in disk.descriptors.values() if not path.endswith("/.lock")]


def check_after(job: Job, root: Path, usual: Undisturbed, error: KDCacheError | None) -> None:
    """What a job that failed, or not, has left is the old or the new; and another run makes it the new."""
    if job.is_cache:
        assert rows_of(root / job.out) in (usual.rows if error is None else (None, *usual.rows))
    elif job.name != "distill":
        found = contents(root).get(job.out, b"")
        assert found == usual.contents[job.out] or (error is not None and found == b"")
    job.again(root)
    end_locks()
    assert contents(root) == usual.contents


@BY_JOB
def test_every_call_may_fail_in_every_way(
    job: Job, tmp_path: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    usual = undisturbed(job, tmp_path)
    every = [(kind, at) for kind in KINDS for at, call in enumerate(usual.calls, 1) if kind.strikes(call)]
    assert len(every) >= 6 * len(usual.calls)
    chosen = random.Random(job.name).sample(every, count(4, len(every)))
    outcomes: Counter[str] = Counter()
    for kind, at in chosen:
        root, fault = tmp_path / "failed", Fault(kind, at)
        shutil.copytree(usual.template, root)
        try:
            error = fail(job, root, fault)
            assert fault.landed
            assert error is not None or not fault.matters
            check_after(job, root, usual, error)
        except Exception as error:
            raise AssertionError(f"{job.name}: {kind.name} at call {at}, {fault.landed}: {error!r}") from error
        shutil.rmtree(root)
        outcomes[type(error).__name__] += 1
    assert outcomes.total() == len(chosen)
    proved("R2", failures=len(chosen), calls=len(usual.calls), errors=outcomes.total() - outcomes["NoneType"])


@BY_JOB
def test_a_process_may_die_before_every_call(
    job: Job, tmp_path: Path, forks: Children, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    usual = undisturbed(job, tmp_path)
    numbers = range(1, len(usual.calls) + 1)
    chosen = random.Random(job.name).sample(numbers, count(2, len(numbers)))
    for at in chosen:
        root = tmp_path / "died"
        shutil.copytree(usual.template, root)
        assert forks.die(job.name, root, at) in (9, -9)
        check_after(job, root, usual, KDCacheError("it died"))
        shutil.rmtree(root)
    proved("R2", deaths=len(chosen))


@pytest.mark.parametrize("name", ["writer", "precompute-file"])
def test_a_storm_of_signals_changes_nothing(
    name: str, tmp_path: Path, forks: Children, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """Real EINTR: Python repeats a call that a handler has interrupted, and waiting for a lock is such a call."""
    job = next(job for job in JOBS if job.name == name)
    usual = undisturbed(job, tmp_path)
    signals = count(50, 1000)
    (tmp_path / "storm").mkdir()
    assert forks.run_in_a_storm(name, tmp_path / "storm", signals) == 0
    assert contents(tmp_path / "storm") == usual.contents
    proved("R2", interruptions=signals)


def test_the_jobs_make_every_kind_of_call(tmp_path: Path) -> None:
    made: set[str] = set()
    for job in JOBS:
        (tmp_path / job.name).mkdir()
        made |= set(undisturbed(job, tmp_path / job.name).calls)
    assert made >= {*CHANGING, *DATA_CALLS, "open", "close", "fstat", "stat", "listdir", "lockf", "fcntl"}


def test_a_call_that_goes_past_is_noticed(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk, contextlib.suppress(OSError):
        (tmp_path / "x").write_bytes(b"")
        os.symlink("x", tmp_path / "y")
    assert [entry.partition(" ")[0] for entry in disk.missed] == ["open", "symlink", "os.symlink"]


@contextlib.contextmanager
def untranslated(action: str, path: Path) -> Iterator[None]:
    yield


def write_once(fd: int, data: Any, offset: int) -> None:
    os.pwrite(fd, data, offset)


@pytest.mark.parametrize(
    ("guard", "broken", "name", "kind", "call"),
    [
        ("drop", lambda temporary: None, "export-npz", "EIO once", "fsync"),
        ("translated", untranslated, "writer", "EIO once", "mkdir"),
        ("pwrite_all", write_once, "writer", "1 byte once", "pwrite"),
    ],
    ids=["a temporary file stays", "an error is not translated", "a short write is not repeated"],
)
def test_a_broken_guard_is_noticed(
    guard: str, broken: Any, name: str, kind: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = next(job for job in JOBS if job.name == name)
    usual = undisturbed(job, tmp_path)
    fault = Fault(next(k for k in KINDS if k.name == kind), usual.calls.index(call) + 1)
    shutil.copytree(usual.template, tmp_path / "failed")
    monkeypatch.setattr(posix, guard, broken)
    with pytest.raises((AssertionError, OSError, KDCacheError)):
        check_after(job, tmp_path / "failed", usual, fail(job, tmp_path / "failed", fault))
