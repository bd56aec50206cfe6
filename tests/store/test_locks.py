"""Record locks: one holder at a time, gone with their process, whatever its children do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcache.store.locks import FINISH, OWNER, lock_file

HOLD = """
import os, sys
from pathlib import Path
from kdcache.store.locks import lock_file
locks = lock_file(Path(sys.argv[1]))
assert all(locks.try_lock(int(n)) for n in sys.argv[2:])
child = os.fork() if "FORK" in os.environ else None
if child == 0:
    os.execvp("sleep", ["sleep", "60"])  # an orphan that outlives the holder
print(child, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int | None]]]:
    """Starts a process that holds locks; returns it and the process id of its child."""
    started: list[subprocess.Popen[str]] = []

    def start(*indices: int, fork: bool = False) -> tuple[subprocess.Popen[str], int | None]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), *map(str, indices)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **({"FORK": "1"} if fork else {})},
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        return process, int(line) if line != "None" else None

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_lock_has_one_holder_in_a_process(tmp_path: Path) -> None:
    locks = lock_file(tmp_path)
    assert lock_file(tmp_path) is locks
    assert locks.try_lock(3)
    assert not locks.try_lock(3)
    assert locks.try_lock(4)
    assert locks.holder(3) == os.getpid()
    locks.unlock(3)
    assert locks.holder(3) is None
    assert locks.try_lock(3)


def test_another_process_is_refused_and_named(
    tmp_path: Path, hold: Callable[..., tuple[subprocess.Popen[str], int]]
) -> None:
    process, _ = hold(0, 5, FINISH, OWNER)
    locks = lock_file(tmp_path)
    for index in (0, 5, FINISH, OWNER):
        assert not locks.try_lock(index)
        assert locks.holder(index) == process.pid
    assert locks.holder(0, 0) == process.pid
    assert locks.holder(1, 4) is None
    assert locks.try_lock(1)
    assert not locks.try_lock_all()


@pytest.mark.parametrize("fork", [False, True])
def test_a_lock_vanishes_with_a_killed_process_even_if_its_child_lives_on(
    tmp_path: Path, hold: Callable[..., tuple[subprocess.Popen[str], int | None]], fork: bool
) -> None:
    process, child = hold(7, fork=fork)
    locks = lock_file(tmp_path)
    assert not locks.try_lock(7)
    process.kill()
    process.wait()
    assert locks.try_lock(7)
    if child is not None:
        os.kill(child, 9)


def test_all_locks_are_taken_at_once_or_none(tmp_path: Path) -> None:
    locks = lock_file(tmp_path)
    assert locks.try_lock(2)
    assert not locks.try_lock_all()
    locks.unlock(2)
    assert locks.try_lock_all()
    assert not locks.try_lock_all()
    assert locks.holder(0, 0) == os.getpid()
    locks.unlock_all()
    assert locks.try_lock(2)


def test_all_locks_keep_other_processes_out(
    tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    locks = lock_file(tmp_path)
    assert locks.try_lock_all()
    script = """
import sys
from pathlib import Path
from kdcache.store.locks import FINISH, lock_file
locks = lock_file(Path(sys.argv[1]))
print([locks.try_lock(n) for n in (0, 1 << 30, FINISH)], locks.holder(3))
"""
    assert python(script, tmp_path).stdout.strip() == f"[False, False, False] {os.getpid()}"
    locks.unlock_all()
    assert python(script, tmp_path).stdout.strip() == "[True, True, True] None"


def test_a_folder_that_was_removed_and_made_again_gets_a_new_lock(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    old = lock_file(tmp_path / "a")
    assert old.try_lock(0)
    (tmp_path / "a" / ".lock").unlink()
    new = lock_file(tmp_path / "a")
    assert new is not old
    assert new.try_lock(0)


def test_a_forked_child_does_not_believe_in_its_parents_locks(tmp_path: Path) -> None:
    locks = lock_file(tmp_path)
    assert locks.try_lock(0)
    child = os.fork()
    if child == 0:
        os._exit(1 if lock_file(tmp_path).try_lock(0) else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert locks.holder(0) == os.getpid()
