"""A teacher, a student and data for child processes, and another process that fills the disk under them.

FULL_DISK_FILL=FOLDER:blocks:N or FOLDER:files:N fills the disk of a folder until N blocks of 4,096 bytes or N files
are left, once the dump has passed its checks and computes its first rows. FULL_DISK_LOADED names a file that appears
when the teacher is loaded.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import kdcache
from kdcache.errors import KDCacheError

ROWS, WIDTH, CLASSES = 100, 4, 100
BLOCK_BYTES = 4096
PROBE_CALLS = 1  # the plan takes one batch to learn what the teacher returns


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == PROBE_CALLS + 1 and (wish := os.environ.get("FULL_DISK_FILL")):
            folder, what, left = wish.rsplit(":", 2)
            fill(Path(folder), what, int(left))
        return self.layer(x)


def teacher() -> nn.Module:
    if marker := os.environ.get("FULL_DISK_LOADED"):
        Path(marker).touch()
    torch.manual_seed(0)
    return Teacher()


def student() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class Unnamed(Dataset[Any]):
    """Rows of a data set that does not say how many classes it has."""

    def __len__(self) -> int:
        return int(os.environ.get("FULL_DISK_ROWS", ROWS))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.sin(torch.arange(WIDTH, dtype=torch.float32) * (0.37 * (index + 1))), index % CLASSES


class Named(Unnamed):
    num_classes = CLASSES


def fill(folder: Path, what: str, left: int) -> None:
    """Another process takes all of a disk but about `left` blocks or files: a file system needs some for itself."""
    status = os.statvfs(folder)
    if what == "files":
        script = f"for n in $(seq {status.f_favail - left}); do : > {folder}/filler-$n; done"
    else:
        taken = max(0, status.f_bavail * status.f_frsize - left * BLOCK_BYTES)
        script = f"set -C; head -c {taken} /dev/zero > {folder}/filler"  # -C: only the first of two processes fills
    subprocess.run(["sh", "-c", script], stderr=subprocess.DEVNULL, check=False)


def run_command(arguments: list[str], environment: dict[str, str], file_bytes: int | None, answer: Connection) -> None:
    """`kdcache ARGUMENTS` in this process; sends its exit code and what it wrote to stderr.

    `write OUT` writes the rows of the teacher with `kdcache.Writer`, and ends as a command would.
    """
    from kdcache_cli.main import cli

    os.environ.update(environment)
    torch.set_num_threads(1)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    code: Any = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            if arguments[0] == "write":
                write(Path(arguments[1]))
            else:
                cli.main(arguments, prog_name="kdcache")
        except SystemExit as end:
            code = end.code
        except KDCacheError as error:
            code = error.exit_code
            print(error, file=sys.stderr)
    answer.send((code, errors.getvalue()))


def write(out: Path) -> None:
    """A cache of random rows, or its rest; 3 shards."""
    logits = np.random.default_rng(0).standard_normal((ROWS, CLASSES)).astype(np.float32)
    with kdcache.Writer(out, classes=CLASSES, shard_rows=40, resume=True) as writer:
        for start in range(len(writer.done), ROWS, 10):
            rows = np.arange(start, start + 10)
            writer.write(rows, logits[rows], rows % CLASSES)
