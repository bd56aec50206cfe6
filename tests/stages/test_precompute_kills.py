"""A dump that is killed or stopped, and run again: the finished cache is the uninterrupted one, byte for byte.

Kills at random moments, by the hundred, are in tests/proof/test_kills.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdcache

SUFFIXES = ("", ".h5")


@pytest.fixture
def finished(dumps: Any, tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """What an uninterrupted dump leaves, as a folder and as one file."""
    from precompute_runs import uninterrupted

    return uninterrupted(dumps, tmp_path, SUFFIXES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_kill_before_each_call_that_changes_the_disk_changes_no_byte(
    dumps: Any, tmp_path: Path, suffix: str, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """Random moments seldom meet the gap between a link and the unlink behind it; these meet every call, by default
    every third."""
    from precompute_runs import contents, exit_codes
    from precompute_task import dump_until_call

    small = {"limit": 12, "shard_rows": 8, "batch_size": 8}
    dumps.here(tmp_path / f"uninterrupted{suffix}", **small)
    expected = contents(tmp_path / f"uninterrupted{suffix}")
    killed = 0
    for call in range(1, 1000, count(3, 1)):
        out = tmp_path / str(call) / f"teacher{suffix}"
        code = exit_codes([dumps.start(out, target=dump_until_call, more=(call,), **small)])[0]
        if code == 0:
            break
        assert code == -9
        killed += 1
        dumps.here(out, **small)
        assert contents(out) == expected, f"killed before call {call}"
    assert call > 60
    proved("R1", kills_right_before_a_call=killed)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_dump_goes_on_with_another_number_of_ranks_and_workers(
    dumps: Any, finished: dict[str, dict[str, bytes]], tmp_path: Path, suffix: str
) -> None:
    from precompute_runs import contents, exit_codes

    out = tmp_path / f"teacher{suffix}"
    fate = {"TASK_SIGNAL": "SIGKILL", "TASK_TARGET": "main", "TASK_AT": "60", "TASK_ONCE": str(tmp_path / "once")}
    assert exit_codes([dumps.start(out, environment=fate)]) == [-9]
    with pytest.raises(kdcache.IncompleteCacheError, match=r"run the same precompute command again"):
        kdcache.open(out)
    assert exit_codes(dumps.start_ranks(out, 3, workers=1)) == [0, 0, 0]
    assert contents(out) == finished[suffix]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(("target", "workers"), [("main", 0), ("main", 2), ("group", 0), ("group", 2)])
def test_a_stop_signal_ends_with_75_and_the_same_dump_goes_on(
    dumps: Any, finished: dict[str, dict[str, bytes]], tmp_path: Path, name: str, target: str, workers: int
) -> None:
    from precompute_runs import contents, exit_codes

    out = tmp_path / "teacher"
    fate = {"TASK_SIGNAL": name, "TASK_TARGET": target, "TASK_AT": "100", "TASK_ONCE": str(tmp_path / "once")}
    assert exit_codes([dumps.start(out, workers=workers, environment=fate)]) == [75]
    kept = list((out / "shards").glob("*.h5"))
    assert kept
    assert not list(out.rglob(".tmp-*"))
    assert dumps.here(out).computed <= 203 - 41
    assert contents(out) == finished[""]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_exits_with_75_when_its_process_group_is_stopped(
    dumps: Any, finished: dict[str, dict[str, bytes]], tmp_path: Path, number: signal.Signals
) -> None:
    from precompute_runs import contents

    out = tmp_path / "teacher.h5"
    fate = {"TASK_SIGNAL": number.name, "TASK_TARGET": "group", "TASK_AT": "90", "TASK_ONCE": str(tmp_path / "once")}
    stopped = dumps.command(out, "--workers", "1", **fate)
    assert stopped.returncode == 75, stopped.stderr
    assert f"stopped by {number.name}" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    dumps.here(out)
    assert contents(out) == finished[".h5"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's, in its loader's __del__
def test_a_loader_process_that_is_killed_is_an_error_that_keeps_finished_shards(dumps: Any, tmp_path: Path) -> None:
    """As when memory runs out; the message is the library's, not torch's."""
    import precompute_task

    class Dying(precompute_task.Task):
        def __getitem__(self, index: int) -> Any:
            if index == 150:
                signal.raise_signal(signal.SIGKILL)
            return super().__getitem__(index)

    teacher = precompute_task.teacher()
    settings = {"shard_rows": 41, "batch_size": 13, "workers": 2, "device": "cpu", "quiet": True}
    with pytest.raises(kdcache.KDCacheError, match=r"loads data died.*--workers"):
        kdcache.precompute(teacher, Dying(), tmp_path / "teacher", **settings)
    assert list((tmp_path / "teacher" / "shards").glob("*.h5"))
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_loader_process_outlives_a_stop_signal_by_a_grace_and_no_longer(dumps: Any) -> None:
    """An interpreter that exits sends one SIGTERM and then waits for ever."""
    from precompute_runs import FORKS
    from precompute_task import worker_that_never_ends

    process = FORKS.Process(target=worker_that_never_ends)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGALRM
