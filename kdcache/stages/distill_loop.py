"""The loop of the `distill` stage: epochs, steps, and what is due after a step.

A line of metrics, an evaluation, a checkpoint and a stop happen between two steps only, on all ranks
after the same step, in this order.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import DataError, InterruptedRunError
from kdcache.stages import checkpoint
from kdcache.stages.distill_inputs import Source, build_loader
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.evaluate import batches_of_rank, evaluate, is_better
from kdcache.stages.metrics import MetricsLog
from kdcache.stages.order import StepSampler
from kdcache.stages.progress import Progress
from kdcache.stages.resuming import identity, save_run
from kdcache.stages.signals import StopRequest
from kdcache.stages.training import State, Trainer, fetch_window, take_step


@dataclass(frozen=True, eq=False)
class RunJob:
    """A run's fixed parts: what was asked for and what it works on; `tail` is said about top-k rows at the start."""

    options: DistillOptions
    trainer: Trainer
    source: Source
    held_out: Source | None
    tail: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.trainer.schedule.total_steps

    @property
    def out(self) -> Path | None:
        """The run's folder."""
        return None if self.options.out is None else Path(self.options.out)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed process must agree on."""
        return identity(self.options, self.source, self.held_out, total_steps=self.total_steps)


def train(job: RunJob, state: State, log: MetricsLog, stop: StopRequest, bar: Progress) -> None:
    """The loop: epochs, steps, and what is due after a step."""
    options, trainer, order, ranks = job.options, job.trainer, job.trainer.order, job.trainer.team
    generator = torch.Generator()
    sampler = StepSampler(order)
    loader = build_loader(job.source, sampler, options, generator)
    held_out = _held_out_batches(job)
    saved_at = time.monotonic()
    while state.step < job.total_steps:
        epoch = order.epoch(state.step)
        sampler.start, sampler.stop = state.step, min(job.total_steps, (epoch + 1) * order.steps_per_epoch)
        generator.manual_seed((options.seed + epoch) % 2**63)
        if job.source.items is not None:
            job.source.items.set_epoch(epoch)  # seen by workers that live on, which load none of it before `iter`
        began = time.perf_counter()
        batches = iter(loader)
        while state.step < sampler.stop:
            is_last = state.step + 1 == job.total_steps
            logs = is_last or (state.step + 1) % options.log_steps == 0
            sums, parts = take_step(trainer, batches, state.step, with_parts=logs)
            state.window.append(sums)
            state.window_rows += len(order.rows(state.step))
            state.step += 1
            state.window_seconds += time.perf_counter() - began
            if parts is not None:
                log.write(_training_line(job, state, parts))
                bar.note(f"loss {state.last['loss']:.4f}")
            if held_out is not None and (is_last or _evaluation_is_due(job, state.step)):
                _evaluate(job, state, held_out, log)
            wants_checkpoint = time.monotonic() - saved_at >= options.checkpoint_seconds
            if options.checkpoint_steps is not None:
                wants_checkpoint |= state.step % options.checkpoint_steps == 0
            stops, saves = ranks.any([stop.requested, ranks.is_first and wants_checkpoint])
            if job.out is not None and (stops or saves) and not is_last:
                _save(job, state, log)
                saved_at = time.monotonic()
            if stops and not is_last:
                raise InterruptedRunError(
                    f"stopped by {stop.name or 'a signal to another rank'} after step {state.step} of "
                    f"{job.total_steps}; everything is saved: the same command with --resume goes on"
                )
            bar.advance()
            began = time.perf_counter()


def _training_line(job: RunJob, state: State, parts: Tensor) -> dict[str, Any]:
    """The line for the steps since the last one, which it ends.

    `loss` is the mean over all of them; `ce` and `kd` (temperature**2 * KL) are those of the last step,
    and left out where a masked class makes them infinite.
    """
    window = fetch_window(state)
    numerator, weight = window[:, :2].sum(dim=0).tolist()
    _count_policy_rows(job, state, window[:, 2:])
    state.signal_rows += weight
    if not state.signal_rows and state.step >= job.trainer.order.steps_per_epoch:
        left = "" if job.trainer.policies is None else " that --disagreement and --confidence-below let count"
        raise DataError(f"no row of a whole epoch had a label or a teacher{left}: there is nothing to learn from")
    state.seconds += state.window_seconds
    ce, labelled, kd, taught = parts.tolist()
    line = {
        **_position(job, state),
        "event": "train",
        "loss": numerator / weight if weight else 0.0,
        **({"ce": ce / labelled} if labelled and math.isfinite(ce) else {}),
        **({"kd": kd / taught} if taught and math.isfinite(kd) else {}),
        "lr": job.trainer.schedule.at(state.step - 1),
        "rows_per_second": state.window_rows / max(state.window_seconds, 1e-9),
    }
    state.last = {**state.last, "loss": line["loss"]}
    state.window, state.window_rows, state.window_seconds = [], 0, 0.0
    return line


def _count_policy_rows(job: RunJob, state: State, counts: Tensor) -> None:
    """Adds a window's counts (steps, 0 or 2) to those of the epochs that its steps belong to."""
    if job.trainer.policies is None:
        return
    first = state.step - len(counts)
    for place, found in enumerate(counts.tolist()):
        epoch = job.trainer.order.epoch(first + place)
        state.policy_rows += [[0, 0] for _ in range(epoch + 1 - len(state.policy_rows))]
        state.policy_rows[epoch] = [int(a + b) for a, b in zip(state.policy_rows[epoch], found, strict=True)]


def _position(job: RunJob, state: State) -> dict[str, Any]:
    return {"step": state.step, "epoch": round(state.step / job.trainer.order.steps_per_epoch, 4)}


def _evaluation_is_due(job: RunJob, step: int) -> bool:
    return step % (job.options.eval_steps or job.trainer.order.steps_per_epoch) == 0


def _held_out_batches(job: RunJob) -> Any:
    if job.held_out is None:
        return None
    pieces = job.options.grad_accumulation * job.trainer.team.world_size
    batch_size = -(-job.options.batch_size // pieces)  # what fits the memory of a training pass
    sampler = batches_of_rank(job.held_out.positions, batch_size, job.trainer.team)
    return build_loader(job.held_out, sampler, job.options, torch.Generator())


def _evaluate(job: RunJob, state: State, held_out: Any, log: MetricsLog) -> None:
    """Measures the student, and keeps it if it is the best so far."""
    fetch_window(state)  # a student that diverged is not worth measuring
    assert job.held_out is not None
    trainer, objective = job.trainer, job.trainer.objective.at(state.step - 1)
    trainer.team.copy_from_first(list(trainer.student.buffers()))
    has_teacher = job.held_out.cache is not None
    if not has_teacher:
        objective = dataclasses.replace(objective, hard_targets=False)
    metrics = evaluate(trainer, held_out, objective, has_teacher=has_teacher)
    log.write({**_position(job, state), "event": "eval", **metrics})
    state.last = {**state.last, **metrics}
    if is_better(metrics, state.best):
        state.best = {**metrics, "step": state.step}
        if job.out is not None and trainer.team.is_first:
            checkpoint.save(job.out / checkpoint.BEST_NAME, checkpoint.state_dict(trainer.student))


def _save(job: RunJob, state: State, log: MetricsLog) -> None:
    assert job.out is not None
    fetch_window(state)  # what diverged must not replace what did not
    path = job.out / checkpoint.RESUME_NAME
    save_run(path, job.trainer, state, identity=job.identity, metrics_bytes=log.sync())
