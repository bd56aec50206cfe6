"""One optimiser step over a global batch, and what a run carries from step to step.

One step: take this rank's pieces of the batch forward and backward, sum gradients and denominators over
ranks, divide once, update. So the loss is the mean over the whole batch (design, section 7), whatever
the number of ranks and pieces, and a loop written by hand over the same rows gets the same weights bit
for bit. Nothing in a step waits for a GPU: losses stay on the device until a line of metrics is due.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import KDCacheError
from kdcache.stages.amp import autocast
from kdcache.stages.batches import Batch, take_apart
from kdcache.stages.calling import call_model
from kdcache.stages.label_fraction import LabelChoice
from kdcache.stages.moving_teacher import Ema
from kdcache.stages.objective import Objective
from kdcache.stages.optim import Schedule, set_lr
from kdcache.stages.order import Order
from kdcache.stages.parallel import Team
from kdcache.train.policy_names import RowPolicies
from kdcache.train.row_policies import apply_policies
from kdcache.train.teaching import Teaching

# The least that the weights of a step are divided by: a step of less, all of it contradicted, is a small one.
LEAST_WEIGHT = 1e-6


@dataclass(frozen=True, eq=False)
class Trainer:
    """What a step needs and does not replace (the modules' own tensors change in place).

    Attributes:
        student: in training mode, on the team's device.
        num_classes: its width.
        parameters: the trainable ones.
        optimizer: over them.
        scaler: of the loss, for fp16.
        schedule: of the learning rate.
        objective: the loss.
        order: which rows make a step.
        team: the processes that share it.
        amp: none, bf16 or fp16.
        clip_norm: largest L2 norm of a step's gradient, None = any.
        has_teacher: whether batches end in teacher rows.
        policies: what becomes of rows that the teacher contradicts or is not sure of, None = nothing.
        teaching: what is done to the teacher's rows first, None = nothing.
        held_out_teaching: likewise, for rows of the validation cache.
        ema: an average of the student, updated after each step; None = none.
        labels: which labels of the training data are learnt, None = all.
        counts_novel: whether rows are counted whose label is of a class that the teacher does not know.
    """

    student: nn.Module
    num_classes: int
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    objective: Objective
    order: Order
    team: Team
    amp: str
    clip_norm: float | None
    has_teacher: bool
    policies: RowPolicies | None = None
    teaching: Teaching | None = None
    held_out_teaching: Teaching | None = None
    ema: Ema | None = None
    labels: LabelChoice | None = None
    counts_novel: bool = False


@dataclass
class State:
    """What changes from step to step outside of the student and its optimiser.

    `window` holds the loss's numerator and denominator of each step since the last line of metrics, on the device,
    with policies also their two counts, with novel classes theirs: (2,) to (5,); `window_rows` and `window_seconds` go
    with it. `policy_rows` are these counts by epoch: rows that disagree, rows that the teacher is not sure of;
    `novel_rows` are rows of novel classes by epoch. `versions` are the caches that took
    the place of the first one, oldest first (`switching.version_record`).
    """

    step: int = 0
    seconds: float = 0.0
    signal_rows: float = 0.0
    window: list[Tensor] = field(default_factory=list)
    window_rows: int = 0
    window_seconds: float = 0.0
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    policy_rows: list[list[int]] = field(default_factory=list)
    novel_rows: list[int] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)


def take_step(trainer: Trainer, batches: Iterator[Any], step: int, *, with_parts: bool) -> tuple[Tensor, Tensor | None]:
    """One update of the student.

    Args:
        trainer: the run.
        batches: yields this rank's pieces of the step, in order.
        step: its number, from 0.
        with_parts: also compute the loss's terms apart, for a line of metrics.

    Returns:
        (2,) numerator and denominator of the loss over the global batch, with policies (4,) also how many rows disagree
        and of how many the teacher is not sure, and with `counts_novel` at last the rows of novel classes; and (4,)
        what `Objective.parts` gives for all rows alike, or None.
    """
    order, optimizer, device = trainer.order, trainer.optimizer, trainer.team.device
    set_lr(optimizer, trainer.schedule.at(step))
    optimizer.zero_grad(set_to_none=True)
    rows, objective = len(order.rows(step)), trainer.objective.at(step)
    width = (2 if trainer.policies is None else 4) + trainer.counts_novel
    sums, parts = torch.zeros(width, device=device), torch.zeros(4, device=device)
    for positions in order.pieces(step):
        batch = take_apart(next(batches), has_teacher=trainer.has_teacher).to(device, num_classes=trainer.num_classes)
        batch = batch if trainer.labels is None else trainer.labels.hide(batch, positions)
        given, batch = batch, batch.taught(trainer.teaching, step=step)
        with autocast(trainer.amp, device):
            logits = call_model(trainer.student, batch.inputs, what="student")
        learnt, weight, counts = _with_policies(trainer.policies, batch)
        if trainer.counts_novel:
            counts = (*counts, _rows_without(batch, given))
        numerator, denominator = objective.sums(logits, learnt, sample_weight=weight)
        # Dividing by the rows of the step here keeps fp16 gradients in range, and is already the mean
        # where every row counts; what is missing to the true denominator follows below.
        trainer.scaler.scale(numerator / rows).backward()  # type: ignore[no-untyped-call]
        sums += torch.stack([part.to(sums.dtype) for part in (numerator.detach(), denominator, *counts)])
        if with_parts:
            parts += objective.parts(logits.detach(), batch)
    trainer.team.sum(sums)
    trainer.team.sum_gradients(trainer.parameters)
    trainer.scaler.unscale_(optimizer)
    # Every row counted: exactly 1. None did: any finite factor, the gradients are 0. Weights may sum to less than 1.
    factor = rows / sums[1].clamp(min=LEAST_WEIGHT)
    grads = [parameter.grad for parameter in trainer.parameters if parameter.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)
        if trainer.clip_norm is not None:
            nn.utils.clip_grad_norm_(trainer.parameters, trainer.clip_norm)
        trainer.scaler.step(optimizer)
        trainer.scaler.update()
    if trainer.ema is not None:
        trainer.ema.update(trainer.student)
    return sums, trainer.team.sum(parts) if with_parts else None


def _with_policies(policies: RowPolicies | None, batch: Batch) -> tuple[Batch, Tensor | None, tuple[Tensor, ...]]:
    """What of a batch is learnt, the weights of its rows, and the two counts."""
    if policies is None:
        return batch, None, ()
    assert batch.teacher is not None  # `check_policies` wants a cache
    found = apply_policies(policies, batch.teacher, batch.labels)
    learnt = replace(batch, teacher=found.teacher, labels=found.labels)
    return learnt, found.sample_weight, (found.disagree, found.unconfident)


def _rows_without(batch: Batch, given: Batch) -> Tensor:
    """() int64, of how many rows the teacher was taken away."""
    assert batch.teacher is not None
    assert given.teacher is not None
    found: Tensor = (given.teacher.has_teacher & ~batch.teacher.has_teacher).sum()
    return found


def fetch_window(state: State) -> Tensor:
    """The window's sums on the CPU: (steps, 2) float64. The one place where a run waits for a GPU.

    Raises:
        KDCacheError: a loss was NaN or infinite; the message names the step.
    """
    if not state.window:
        return torch.zeros(0, 2, dtype=torch.float64)
    sums = torch.stack(state.window).cpu().double()
    bad = torch.nonzero(~torch.isfinite(sums[:, 0]))
    if len(bad):
        step = state.step - len(sums) + int(bad[0]) + 1
        raise KDCacheError(
            f"the loss is not finite at step {step}: training diverged. Try a lower --lr, a --warmup, "
            "--clip-norm 1, or --amp bf16 instead of fp16; the last checkpoint is from before this step"
        )
    return sums
