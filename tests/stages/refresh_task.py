"""Refreshes and runs for child processes, killed at a known place; the same calls run in the test's own process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

ROWS, WIDTH, CLASSES = 60, 6, 4
CALLS = ("create", "pwrite_all", "truncate", "fsync", "make_read_only", "link", "rename", "unlink", "make_folder")


class Task(Dataset[tuple[Tensor, int]]):
    """Rows for a run; kills its process when the item number `kill_at` (from 1) is loaded, with SIGKILL or `by`."""

    def __init__(self, kill_at: int = 0, by: signal.Signals = signal.SIGKILL) -> None:
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(ROWS, WIDTH, generator=generator)
        self.labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
        self.left, self.by = kill_at, by

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.by)
        return self.inputs[index], int(self.labels[index])


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES))


def refreshed(folder: Path, seed: int) -> Any:
    """The version of a teacher; three shards."""
    from kdcache.stages.refresh import refresh

    settings: dict[str, Any] = {"shard_rows": 25, "batch_size": 16, "threads": 1, "dtype": "float32"}
    return refresh(network(seed), Task(), folder, step=seed, keep=1, **settings)


def refresh_until_call(folder: Path, seed: int, last: int) -> None:
    """A refresh that is killed right before its system call number `last` that changes the disk."""
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
    torch.set_num_threads(1)
    refreshed(folder, seed)


def run(folder: Path, *, kill_at: int = 0, by: signal.Signals = signal.SIGKILL, resume: bool = False) -> Any:
    """A run of 8 epochs of 5 steps with a moving teacher every 2 epochs, which starts with the labels alone."""
    from kdcache.stages.distill import distill
    from kdcache.stages.distill_options import DistillOptions
    from kdcache.stages.moving_teacher import MovingTeacher

    options = DistillOptions(
        out=str(folder / "run"),
        epochs=8,
        batch_size=12,
        alpha=0.5,
        optimizer="adamw",
        checkpoint_steps=4,
        log_steps=3,
        device="cpu",
        quiet=True,
        seed=5,
        threads=1,
        resume=resume,
    )
    data = Task(kill_at, by)
    moving = MovingTeacher(folder / "teacher", data, every=2, decay=0.8, batch_size=16, shard_rows=25)
    return distill(options, student=network(1), data=data, val=Task(), refresh=moving)


def killed_run(folder: Path, kill_at: int, by: signal.Signals) -> None:
    """The run in a process of its own; exits as the command would."""
    from kdcache.errors import KDCacheError

    torch.set_num_threads(1)
    try:
        run(folder, kill_at=kill_at, by=by)
    except KDCacheError as error:
        raise SystemExit(error.exit_code) from None


def peer(folder: Path, mine: str, other: str, seed: int, kill_at: int = 0, resume: bool = False) -> None:
    """One of two students that teach each other."""
    from kdcache.stages.distill import distill
    from kdcache.stages.distill_options import DistillOptions
    from kdcache.stages.peer import Peer

    torch.set_num_threads(1)
    options = DistillOptions(
        out=str(folder / f"run-{mine}"),
        epochs=6,
        batch_size=12,
        alpha=0.5,
        optimizer="adamw",
        checkpoint_steps=4,
        device="cpu",
        quiet=True,
        seed=seed,
        threads=1,
        resume=resume,
    )
    data = Task(kill_at)
    exchange = Peer(folder / mine, folder / other, data, every=2, wait_seconds=60, batch_size=16)
    distill(options, student=network(seed), data=data, val=Task(), refresh=exchange)


def main() -> None:
    """`torchrun refresh_task.py FOLDER KILL_AT`: the run over several ranks; the first is killed."""
    import sys

    torch.set_num_threads(1)
    kill_at = int(sys.argv[2]) if os.environ["RANK"] == "0" else 0
    run(Path(sys.argv[1]), kill_at=kill_at, resume=not int(sys.argv[2]))


if __name__ == "__main__":
    main()
