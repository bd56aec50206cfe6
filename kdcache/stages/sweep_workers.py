"""The processes of a sweep: each imports torch once (1-2 s) and then does task after task. No torch here.

Plain child processes and lines of JSON: a queue that is shared can be left locked by a process that was killed, and
`concurrent.futures` gives up all its processes when one dies. Here each has pipes of its own; one that dies is
replaced and its task repeated once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, final

from kdcache.errors import (
    CorruptCacheError,
    IncompleteCacheError,
    InterruptedRunError,
    KDCacheError,
    MismatchError,
    UsageError,
)
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.signals import GRACE_SECONDS, StopRequest

# Errors of a process by their exit code, which is all that the caller goes by.
_KINDS: dict[int, type[KDCacheError]] = {
    kind.exit_code: kind for kind in (UsageError, CorruptCacheError, IncompleteCacheError, MismatchError)
}
_ATTEMPTS = 2
_POLL_SECONDS = 0.2


@final
@dataclass(eq=False)
class Task:
    """Something for a process to do: `check`, `run` or `test` some options.

    Attributes:
        kind: which.
        options: of the run.
        more: what else the process has to know.
        label: whose task it is, for who asked.
        attempts: how often it was begun.
    """

    kind: str
    options: DistillOptions
    label: Any = None
    more: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0


@final
@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a task: a result, or an error and its exit code."""

    result: dict[str, Any]
    error: str | None = None
    exit_code: int = 0


class _Worker:
    """A child process and the thread that reads its answers."""

    def __init__(self, number: int, inbox: queue.Queue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        self.number = number
        self.task: Task | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kdcache.stages.sweep_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for us to answer
        )
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()

    def give(self, task: Task) -> None:
        """Starts a task; one that a dead process was given is noticed by its reader."""
        self.task = task
        task.attempts += 1
        message = {**task.more, "kind": task.kind, "worker": self.number, "options": dataclasses.asdict(task.options)}
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Lets it end: a run that is going on saves first."""
        assert self.process.stdin is not None
        if self.task is None:
            self.process.terminate()
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def _read(self, inbox: queue.Queue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # half a line of a process that was killed
                    inbox.put((self, json.loads(line)))
        inbox.put((self, None))


@final
class Workers:
    """A number of processes; use as a context manager.

    Args:
        count: of processes.
        stop: whether a signal asked to stop.
    """

    def __init__(self, count: int, stop: StopRequest) -> None:
        self._count = count
        self._stop = stop
        self._inbox: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        self._workers = [_Worker(number, self._inbox) for number in range(self._count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + (0 if kind is not None and issubclass(kind, KeyboardInterrupt) else GRACE_SECONDS)
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def answers(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer]]:
        """Does tasks, in no certain order, and yields what came of each.

        Raises:
            InterruptedRunError: a signal asked to stop; tasks that are going on save what they have at the exit.
        """
        waiting = deque(tasks)
        left = len(waiting)
        while left:
            self._hand_out(waiting)
            if self._stop.requested:
                raise InterruptedRunError(
                    f"stopped by {self._stop.name}; finished runs are kept and the others saved: the same command with "
                    "--resume goes on"
                )
            try:
                worker, message = self._inbox.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            task, worker.task = worker.task, None
            if message is None:
                self._replace(worker)
            if task is None:
                continue
            if message is None or "interrupted" in message:
                if task.attempts < _ATTEMPTS:
                    waiting.appendleft(task)
                    continue
                code = worker.process.returncode
                message = {"error": f"its process died {_ATTEMPTS} times (the last time: {code})", "exit_code": 1}
            left -= 1
            yield task, Answer(message.get("ok", {}), message.get("error"), message.get("exit_code", 0))

    def _hand_out(self, waiting: deque[Task]) -> None:
        for worker in self._workers:
            if waiting and worker.task is None:
                worker.give(waiting.popleft())

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        worker.process.wait()
        self._workers[self._workers.index(worker)] = _Worker(worker.number, self._inbox)


def refuse(answer: Answer, *, what: str) -> None:
    """Raises the error of an answer, if it is one, with its exit code.

    Raises:
        KDCacheError: naming what was asked for.
    """
    if answer.error is not None:
        raise kind_of(answer.exit_code)(f"{what}: {answer.error}")


def kind_of(exit_code: int) -> type[KDCacheError]:
    """The error with this exit code."""
    return _KINDS.get(exit_code, KDCacheError)
