"""What can go wrong with one system call, and child processes that die of it.

A fault strikes at call number `at` of a job, once or from then on. A full disk refuses from then on what takes space,
a broken one refuses everything. Death is that of a real process, which is forked from one that has imported torch.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from disk_calls import CHANGING, TAKING_SPACE, Call, Disk

DATA_CALLS = ("pread", "preadv", "pwrite")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "kdcache.stages.precompute"])


@dataclass(frozen=True)
class Kind:
    """A way to fail: an error of this number, or (`code` 0) at most `most_bytes` of a read or write."""

    name: str
    code: int
    lasts: bool
    most_bytes: int = 0

    def strikes(self, call: str) -> bool:
        """Whether a call can fail like this at all. A quota is like a full disk, so only where one can be."""
        if self.code == errno.EDQUOT:
            return call in TAKING_SPACE
        return self.code != 0 or call in DATA_CALLS


KINDS = (
    *(Kind(f"{errno.errorcode[c]} once", c, False) for c in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR)),
    *(Kind(f"{errno.errorcode[c]} for good", c, True) for c in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR)),
    Kind("1 byte once", 0, False, 1),
    Kind("7 bytes for good", 0, True, 7),
    Kind("0 bytes for good", 0, True, 0),
)


class Fault:
    """The `before` of a `Disk`: lets call number `at` fail, and all later ones where the kind lasts."""

    def __init__(self, kind: Kind, at: int) -> None:
        self.kind, self.at = kind, at
        self.landed = ""
        self.matters = False  # no success without this call; what is only cleared away may stay for the next run

    def __call__(self, call: Call) -> int | None:
        if call.number < self.at or (call.number > self.at and not self.kind.lasts):
            return None
        if call.number == self.at:
            self.landed = f"{call.name} of {os.path.basename(call.path)}"
            writes = call.name in CHANGING and call.name not in ("unlink", "rmdir")
            self.matters = self.kind.code != 0 and writes and ".parts" not in call.path
        elif self.kind.code in (errno.ENOSPC, errno.EDQUOT) and call.name not in TAKING_SPACE:
            return None
        if self.kind.code:
            raise OSError(self.kind.code, os.strerror(self.kind.code))
        return self.kind.most_bytes if call.name in DATA_CALLS else None


class Children:
    """Processes that are forked one after another from one that has imported everything and runs nothing itself."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def die(self, job: str, root: Path, at: int) -> int:
        """Runs a job whose process ends right before its call number `at`; returns the exit code."""
        return self._ask("die", job, str(root), at)

    def run_in_a_storm(self, job: str, root: Path, signals: int) -> int:
        """Runs a job while a timer sends signals, and once a lock is waited for until `signals` have come."""
        return self._ask("storm", job, str(root), signals)

    def _ask(self, *request: object) -> int:
        self._connection.send(request)
        code = self._connection.recv()
        assert isinstance(code, int)
        return code


@contextlib.contextmanager
def children() -> Iterator[Children]:
    """Starts the process that the others are forked from; ends it."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    try:
        yield Children(ours)
    finally:
        ours.close()  # it reads the end of the pipe
        process.join()


def _serve(connection: Connection) -> None:
    import torch

    os.environ |= {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).zero_grad()  # imports 800 modules at the first call
    import disk_jobs

    commands = {"die": _die, "storm": _storm}
    with contextlib.suppress(EOFError):
        while True:
            command, name, root, number = connection.recv()
            job = next(job for job in disk_jobs.JOBS if job.name == name)
            process = os.fork()
            if process == 0:
                code = 1
                try:
                    commands[command](job, Path(root), number)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            connection.send(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


def _die(job: object, root: Path, at: int) -> None:
    def before(call: Call) -> None:
        if call.number == at:
            if at % 2:
                os._exit(9)
            os.kill(os.getpid(), signal.SIGKILL)

    with Disk(root, before):
        job.run(root)  # type: ignore[attr-defined]


def _storm(job: object, root: Path, signals: int) -> None:
    """Signals whose handler returns: every call that waits is interrupted again and again, and must go on waiting."""
    from kdcache.store.locks import PRESENT, LockFile, lock_file

    seen, is_waiting = 0, False
    share = LockFile.share
    ask_reader, ask_writer = os.pipe()
    tell_reader, tell_writer = os.pipe()

    def count(number: int, frame: object) -> None:
        nonlocal seen
        seen += 1
        if is_waiting and seen == signals:
            os.write(ask_writer, b"!")

    def share_late(self: LockFile, index: int) -> None:
        """Another process has the lock alone until enough signals have come while this one waits for it."""
        nonlocal seen, is_waiting
        LockFile.share = share  # type: ignore[method-assign]
        folder = self._path.parent
        if os.fork() == 0:
            os.write(tell_writer, b"!" if lock_file(folder).try_lock(PRESENT) else b"?")
            os.read(ask_reader, 1)
            os._exit(0)
        assert os.read(tell_reader, 1) == b"!"
        seen, is_waiting = 0, True
        share(self, index)
        assert seen >= signals
        is_waiting = False

    LockFile.share = share_late  # type: ignore[method-assign]
    signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    job.run(root)  # type: ignore[attr-defined]
    signal.setitimer(signal.ITIMER_REAL, 0)
