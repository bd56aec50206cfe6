"""A data set of images and pipelines of one's own, for runs with views here and in child processes.

KILL_AT_ITEM and KILL_PID make the data set send SIGINT to that process when so many items have been loaded.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

ROWS, CLASSES = 37, 5


class Pictures(Dataset[tuple[Tensor, int]]):
    """1 x 8 x 8 float32, in [0, 1]."""

    def __init__(self) -> None:
        self.inputs = torch.rand(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        self.labels = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(2)).tolist()
        self.left = int(os.environ.get("KILL_AT_ITEM", "0"))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        worker = get_worker_info()
        if self.left == 0 and (worker is None or worker.id == 0):  # a second signal would end the run at once
            os.kill(int(os.environ["KILL_PID"]), signal.SIGINT)
        return self.inputs[index], self.labels[index]


class HeldOut(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.left = 0


def student() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES))


def plain_student() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def dim(image: Tensor) -> Tensor:
    return image * torch.rand(())


def dimming() -> Any:
    """A factory of a transform, for `--augment views_task:dimming`."""
    return dim


class Counting:
    """A transform with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Tensor) -> Tensor:
        self.calls += 1
        return image + self.calls


def number() -> int:
    return 3
