"""SGD and AdamW, and the learning rate as a pure function of the step.

The schedule has no state: what a resumed run needs of it is the number of the step. The optimisers are
torch's with their own defaults for speed (`foreach` on CUDA), so that a loop written by hand gets the
same weights bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kdcache.errors import UsageError
from kdcache.stages.choices import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True)
class Schedule:
    """The learning rate over `total_steps` steps.

    Warm-up rises linearly over `warmup_steps` steps, the first of them at lr / warmup_steps. Then
    `constant` stays, `cosine` falls to 0 along half a cosine (Loshchilov & Hutter, 1608.03983), and
    `step` is multiplied by `gamma` at each of the `milestones` (fractions of all steps).
    """

    name: str
    lr: float
    total_steps: int
    warmup_steps: int = 0
    milestones: Sequence[float] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UsageError(f"schedule {self.name!r} is not known; choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup_steps < max(self.total_steps, 1):
            raise UsageError(f"a warm-up of {self.warmup_steps} steps does not fit a run of {self.total_steps} steps")

    def at(self, step: int) -> float:
        """The learning rate of the step `step` (from 0).

        >>> [round(Schedule("cosine", 1.0, total_steps=5, warmup_steps=1).at(s), 2) for s in range(5)]
        [1.0, 1.0, 0.85, 0.5, 0.15]
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.name == "cosine":
            progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        if self.name == "step":
            passed = sum(step >= fraction * self.total_steps for fraction in self.milestones)
            return self.lr * self.gamma**passed
        return self.lr


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD (with momentum) or AdamW; weight decay applies to every parameter.

    Raises:
        UsageError: an unknown name, or a module without trainable parameters.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise UsageError("the student has no trainable parameter; check requires_grad")
    if name == "sgd":
        return torch.optim.SGD(trainable, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay)
    raise UsageError(f"optimizer {name!r} is not known; choose one of {', '.join(OPTIMIZERS)}")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
