"""Starts dumps in processes of their own, and compares what they leave on the disk.

Processes come from a fork server that has imported torch once: 30 kills take seconds, not a minute.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import precompute_task as task

from kdcache.stages.precompute import PrecomputeResult, precompute
from kdcache.stages.precompute_options import PrecomputeOptions

HERE = str(Path(__file__).parent)
DATE = {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "kdcache.stages.precompute"])


class Dumps:
    """The dumps of one test: the same teacher and data in several processes, one after another or at once."""

    def __init__(self) -> None:
        self._sessions: list[int] = []

    def options(self, out: Path, **changes: Any) -> dict[str, Any]:
        """41 rows a shard and 13 a batch: neither divides 203, so that borders lie everywhere."""
        given = {"teacher": "precompute_task:teacher", "data": "precompute_task:Task", "out": out, "quiet": True}
        return {**given, "device": "cpu", "threads": 1, "shard_rows": 41, "batch_size": 13, **changes}

    def here(self, out: Path, **changes: Any) -> PrecomputeResult:
        """A dump in this process."""
        result = precompute(options=PrecomputeOptions(**self.options(out, **changes)))
        assert isinstance(result, PrecomputeResult)
        return result

    def start(
        self, out: Path, *, target: Any = task.dump, more: tuple[Any, ...] = (), environment: Any = (), **changes: Any
    ) -> BaseProcess:
        """A dump in a process of its own; `more` arguments for another target in `precompute_task`."""
        arguments = (self.options(out, **changes), {**DATE, **dict(environment)}, *more)
        process: BaseProcess = FORKS.Process(target=target, args=arguments)
        process.start()
        self._sessions.append(process.pid or 0)
        return process

    def start_ranks(self, out: Path, world_size: int, *, environment: Any = (), **changes: Any) -> list[BaseProcess]:
        """As a launcher would, `world_size` processes at once."""
        ranks = [{"RANK": str(n), "WORLD_SIZE": str(world_size), **dict(environment)} for n in range(world_size)]
        return [self.start(out, environment=variables, **changes) for variables in ranks]

    def command(self, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`kdcache precompute` in a session of its own."""
        return subprocess.run(
            [sys.executable, *self.arguments(out), *arguments],
            env={**os.environ, **DATE, "PYTHONPATH": os.pathsep.join([HERE, *sys.path]), **environment},
            capture_output=True,
            text=True,
            timeout=120,
            start_new_session=True,
        )

    def arguments(self, out: Path, **changes: Any) -> list[str]:
        """The command line of the same dump, behind the name of the interpreter."""
        line = ["-m", "kdcache", "precompute"]
        for name, value in self.options(out, **changes).items():
            line += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
        return line

    def end_sessions(self) -> None:
        """Ends DataLoader workers that outlived their process."""
        for session in self._sessions:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)


def contents(path: Path) -> dict[str, bytes]:
    """All files of a cache by name but the lock, which is empty: stray temporaries count as differences."""
    if path.is_file():
        others = [other.name for other in path.parent.iterdir() if path.name in other.name and other != path]
        return {path.suffix: path.read_bytes(), **{name: b"" for name in others}}
    files = [file for file in path.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def uninterrupted(dumps: Dumps, folder: Path, suffixes: Sequence[str]) -> dict[str, dict[str, bytes]]:
    """What dumps leave that nothing interrupts, by the suffix of their names."""
    found = {}
    for suffix in suffixes:
        out = folder / "uninterrupted" / f"teacher{suffix}"
        dumps.here(out)
        found[suffix] = contents(out)
    return found


def exit_codes(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
