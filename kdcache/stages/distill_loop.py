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

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import DataError, InterruptedRunError
from kdcache.stages import checkpoint
from kdcache.stages.distill_inputs import Source, build_loader
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.evaluate import batches_of_rank, evaluate, is_better
from kdcache.stages.metrics import MetricsLog
from kdcache.stages.moving_teacher import Refresh
from kdcache.stages.order import StepSampler
from kdcache.stages.progress import Progress
from kdcache.stages.resuming import identity, save_run
from kdcache.stages.signals import StopRequest
from kdcache.stages.student_views import ViewSettings
from kdcache.stages.switching import describe_refresh, is_due, next_version, version_record, with_version
from kdcache.stages.training import State, Trainer, fetch_window, take_step
from kdcache.store.cache import Cache


@dataclass(frozen=True, eq=False)
class RunJob:
    """A run's fixed parts: what was asked for and what it works on; `tail` is said about top-k rows at the start.

    `source` is that of the beginning: a run with `refresh` goes on with other caches; `settings` are of their views.
    """

    options: DistillOptions
    trainer: Trainer
    source: Source
    held_out: Source | None
    tail: tuple[str, ...] = ()
    refresh: Refresh | None = None
    settings: ViewSettings | None = None

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
        facts = identity(self.options, self.source, self.held_out, total_steps=self.total_steps)
        return {**facts, **describe_refresh(self.refresh)}


def train(job: RunJob, state: State, log: MetricsLog, stop: StopRequest, bar: Progress) -> None:
    """The loop: epochs, steps, and what is due after a step."""
    options, order, ranks = job.options, job.trainer.order, job.trainer.team
    generator = torch.Generator()
    sampler = StepSampler(order)
    source, trainer = as_saved(job, state)
    loader = build_loader(source, sampler, options, generator)
    held_out = None if job.held_out is None else batches_in_order(job, job.held_out, job.held_out.positions)
    saved_at = time.monotonic()
    while state.step < job.total_steps:
        epoch = order.epoch(state.step)
        if is_due(job.refresh, state, steps_per_epoch=order.steps_per_epoch):
            cache = _next_version(job, state, log, epoch)
            if cache is not None:
                source, trainer = with_version(source, trainer, cache, options, job.settings)
                loader = build_loader(source, sampler, options, generator)
                state.versions.append(version_record(cache, epoch=epoch, step=state.step))
                if job.out is not None:
                    _save(job, state, log)  # from here on the version before is not needed
        sampler.start, sampler.stop = state.step, min(job.total_steps, (epoch + 1) * order.steps_per_epoch)
        generator.manual_seed((options.seed + epoch) % 2**63)
        if source.items is not None:
            source.items.set_epoch(epoch)  # seen by workers that live on, which load none of it before `iter`
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


def as_saved(job: RunJob, state: State) -> tuple[Source, Trainer]:
    """The parts of the run with the cache that it had when its state was saved."""
    if job.refresh is None or not state.versions:
        return job.source, job.trainer
    cache = job.refresh.open(state.versions[-1]["root"])
    return with_version(job.source, job.trainer, cache, job.options, job.settings)


def _next_version(job: RunJob, state: State, log: MetricsLog, epoch: int) -> Cache | None:
    assert job.refresh is not None
    try:
        return next_version(job.refresh, state, job.trainer.student, job.trainer.team, epoch=epoch)
    except InterruptedRunError as error:
        if job.out is not None:
            _save(job, state, log)
        raise InterruptedRunError(f"{error}, after step {state.step}; the same command with --resume goes on") from None


def _training_line(job: RunJob, state: State, parts: Tensor) -> dict[str, Any]:
    """The line for the steps since the last one, which it ends.

    `loss` is the mean over all of them; `ce` and `kd` (temperature**2 * KL) are those of the last step,
    and left out where a masked class makes them infinite.
    """
    window = fetch_window(state)
    numerator, weight = window[:, :2].sum(dim=0).tolist()
    _count_policy_rows(job, state, window[:, 2:])
    _count_novel_rows(job, state, window)
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
    """Adds a window's counts (steps, 0 to 3), of which two are theirs, to those of the epochs of its steps."""
    if job.trainer.policies is None:
        return
    first = state.step - len(counts)
    for place, found in enumerate(counts[:, :2].tolist()):
        epoch = job.trainer.order.epoch(first + place)
        state.policy_rows += [[0, 0] for _ in range(epoch + 1 - len(state.policy_rows))]
        state.policy_rows[epoch] = [int(a + b) for a, b in zip(state.policy_rows[epoch], found, strict=True)]


def _count_novel_rows(job: RunJob, state: State, window: Tensor) -> None:
    if not job.trainer.counts_novel:
        return
    first = state.step - len(window)
    for place, found in enumerate(window[:, -1].tolist()):
        epoch = job.trainer.order.epoch(first + place)
        state.novel_rows += [0] * (epoch + 1 - len(state.novel_rows))
        state.novel_rows[epoch] += int(found)


def _position(job: RunJob, state: State) -> dict[str, Any]:
    return {"step": state.step, "epoch": round(state.step / job.trainer.order.steps_per_epoch, 4)}


def _evaluation_is_due(job: RunJob, step: int) -> bool:
    return step % (job.options.eval_steps or job.trainer.order.steps_per_epoch) == 0


def batches_in_order(job: RunJob, source: Source, positions: np.ndarray) -> Any:
    """This rank's share of some rows of a source, to measure the student on: batches in the order of the positions."""
    pieces = job.options.grad_accumulation * job.trainer.team.world_size
    batch_size = -(-job.options.batch_size // pieces)  # what fits the memory of a training pass
    sampler = batches_of_rank(positions, batch_size, job.trainer.team)
    return build_loader(source, sampler, job.options, torch.Generator())


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
