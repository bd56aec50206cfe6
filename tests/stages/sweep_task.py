"""Data for the processes of a sweep, named `sweep_task:...` on their path.

Where the file named by KILL_ONCE does not exist, the process that has loaded 300 items makes it and kills itself.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.stages.data import load_data


class Deadly(Dataset[tuple[Tensor, int]]):
    """Digits that kill the process that reads them, once."""

    def __init__(self) -> None:
        self.data = load_data("digits:transfer").dataset
        self.num_classes = 10
        self.labels = self.data.labels  # type: ignore[attr-defined]
        self.sample_ids = self.data.sample_ids  # type: ignore[attr-defined]
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded += 1
        flag = Path(os.environ["KILL_ONCE"])
        if self.loaded == 300 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        item: tuple[Tensor, int] = self.data[index]
        return item


class Broken(Deadly):
    """Digits of which the 300th that is read is not there."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded += 1
        if self.loaded >= 300:
            raise FileNotFoundError("300.png")
        item: tuple[Tensor, int] = self.data[index]
        return item


def drawn() -> Dataset[tuple[Tensor, int]]:
    """Digits with noise drawn from torch's generator, so that it depends on the seed of the run."""
    data = load_data("digits:transfer").dataset
    noise = torch.randn(len(data), 1, 8, 8)  # type: ignore[arg-type]
    return [(data[at][0] + noise[at], data[at][1]) for at in range(len(noise))]  # type: ignore[return-value]
