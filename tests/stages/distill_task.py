"""A distillation run for child processes: `python distill_task.py OPTIONS` runs it and exits as the command would.

KILL_AT_ITEM and KILL_SIGNAL make the data set send a signal to its own process when so many items have
been loaded, so that a run is killed at a known place.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdcache.errors import KDCacheError

ROWS, WIDTH, CLASSES = 101, 6, 4


def teacher_logits() -> Tensor:
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1)) * 3


def labels() -> Tensor:
    found = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(2))
    found[::7] = -1
    return found


class Task(Dataset[tuple[Tensor, int]]):
    def __init__(self) -> None:
        self.inputs = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
        self.labels = labels()
        self.left = int(os.environ.get("KILL_AT_ITEM", "0"))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        if self.left == 0 and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), getattr(signal, os.environ["KILL_SIGNAL"]))
        return self.inputs[index], int(self.labels[index])


class HeldOut(Task):
    def __init__(self) -> None:
        super().__init__()
        self.left = 0


def student() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES))


def plain_student() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def main() -> None:
    from kdcache.stages.distill import distill
    from kdcache.stages.distill_options import DistillOptions

    try:
        distill(DistillOptions(**json.loads(sys.argv[1])))
    except KDCacheError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
