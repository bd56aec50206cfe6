"""A dump for child processes: a small teacher, and a data set that stretches the run or sends a signal on the way.

In the environment: TASK_ITEM_SECONDS sleeps at each item, TASK_FSYNC_SECONDS at each fsync; TASK_SIGNAL (a name such
as SIGTERM) goes to TASK_TARGET (`main`, the dumping process, or `group`, its process group) when an item from TASK_AT
on is loaded, once for each file TASK_ONCE. TASK_TRACE is the file that `precompute_trace` appends to.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

ROWS, WIDTH, CLASSES = 203, 12, 7
CALLS = ("create", "pwrite_all", "truncate", "fsync", "make_read_only", "link", "rename", "unlink", "make_folder")


def teacher() -> nn.Module:
    """Called once in each process that dumps, however it was launched."""
    if "TASK_TRACE" in os.environ:
        import precompute_trace

        precompute_trace.install(os.environ["TASK_TRACE"])
    if "TASK_FSYNC_SECONDS" in os.environ:
        _slow_the_disk(float(os.environ["TASK_FSYNC_SECONDS"]))
    return network(0)


def other_teacher() -> nn.Module:
    return network(1)


def network(seed: int, *, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, classes))


def inputs_of(index: int) -> Tensor:
    return torch.sin(torch.arange(WIDTH, dtype=torch.float32) * (0.37 * (index + 1)))


def _slow_the_disk(seconds: float) -> None:
    from kdcache.store import posix

    fsync = posix.fsync

    def slow(fd: int) -> None:
        time.sleep(seconds)
        fsync(fd)

    posix.fsync = slow


class Task(Dataset[Any]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        _stretch(index)
        return inputs_of(index), index % CLASSES


class Other(Task):
    """The same rows under another name."""


class Many(Dataset[Any]):
    """TASK_ROWS rows that take no memory."""

    def __len__(self) -> int:
        return int(os.environ["TASK_ROWS"])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4,), float(index)), index % 1000


def wide_teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1000)


def _stretch(index: int) -> None:
    time.sleep(float(os.environ.get("TASK_ITEM_SECONDS", "0")))
    name = os.environ.get("TASK_SIGNAL")
    if name is None or index < int(os.environ["TASK_AT"]):
        return
    try:
        os.close(os.open(os.environ["TASK_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    main = os.getpid() if get_worker_info() is None else os.getppid()
    if os.environ["TASK_TARGET"] == "group":
        os.killpg(os.getpgid(main), getattr(signal, name))
    else:
        os.kill(main, getattr(signal, name))
    if name == "SIGKILL" and get_worker_info() is not None:
        Path(os.environ["TASK_ONCE"]).write_text(str(os.getpid()))
        time.sleep(60)  # an orphan that is busy for a while; the test ends it


def dump(options: dict[str, Any], environment: dict[str, str]) -> None:
    """One process of a dump, in a session of its own; exits as the command would."""
    os.setsid()
    os.environ.update(environment)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # else its DataLoader workers would import torch again, 2 s each
    torch.set_num_threads(1)
    from kdcache.errors import KDCacheError
    from kdcache.stages.precompute import precompute
    from kdcache.stages.precompute_options import PrecomputeOptions

    try:
        precompute(options=PrecomputeOptions(**options))
    except KDCacheError as error:
        print(error, flush=True)
        raise SystemExit(error.exit_code) from None


def dump_and_measure(options: dict[str, Any], environment: dict[str, str], report: Path) -> None:
    """A dump, and the most memory of its own that its process held at a write, in KiB.

    Not the page cache of the shards, which merging maps and the kernel takes back when it likes.
    """
    from kdcache.store import posix

    peak, write = 0, posix.pwrite_all

    def measured(*arguments: Any) -> None:
        nonlocal peak
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]))
        write(*arguments)

    posix.pwrite_all = measured
    dump(options, environment)
    report.write_text(str(peak))


def dump_until_call(options: dict[str, Any], environment: dict[str, str], last: int) -> None:
    """A dump that is killed right before its system call number `last` that changes the disk."""
    from kdcache.store import posix

    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return replacement

    for name in CALLS:
        setattr(posix, name, counted(getattr(posix, name)))
    dump(options, environment)


def worker_that_never_ends() -> None:
    """As a DataLoader worker that its process has forgotten, which gets one SIGTERM."""
    from kdcache.stages import signals

    signals.GRACE_SECONDS = 1
    signals.shield_worker(0)
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        signal.pause()
