"""The `distill` stage: a student learns from labels and cached teacher logits, top to bottom.

    inputs (data, caches, student)  ->  fresh or resumed  ->  steps, lines, evaluations, checkpoints  ->  record

A run stops between two steps only, and goes on from there with the same weights bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdcache.errors import DataError, InterruptedRunError, UsageError
from kdcache.stages import checkpoint
from kdcache.stages.amp import grad_scaler
from kdcache.stages.distill_inputs import Source, build_loader, check_signal, open_source, open_student
from kdcache.stages.distill_options import DistillOptions, portable, resolve
from kdcache.stages.evaluate import batches_of_rank, evaluate, is_better
from kdcache.stages.loaded_data import LoadedData
from kdcache.stages.metrics import MetricsLog
from kdcache.stages.objective import Objective
from kdcache.stages.optim import Schedule, build_optimizer
from kdcache.stages.order import Order, StepSampler
from kdcache.stages.parallel import Team, team
from kdcache.stages.progress import Progress
from kdcache.stages.resuming import check_same_run, identity, restore_run, save_run
from kdcache.stages.run_record import describe_source, now, prepare_folder, read_record, versions, write_record
from kdcache.stages.signals import StopRequest, graceful_signals
from kdcache.stages.training import State, Trainer, fetch_window, take_step
from kdcache.store.cache import Cache

Data = str | Dataset[Any] | LoadedData
CachePath = str | os.PathLike[str] | Cache


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run gives.

    Attributes:
        student: trained in place, on the run's device, in eval mode.
        out: the run's folder, None for a run without one.
        steps: optimiser steps, those of earlier processes included.
        last: the last `loss` (mean since the line before) and the metrics of the last evaluation.
        best: metrics of the best evaluation with its `step`; empty without validation data.
        record: the content of run.json.
    """

    student: nn.Module
    out: Path | None
    steps: int
    last: dict[str, float]
    best: dict[str, float]
    record: dict[str, Any]


def distill(
    options: DistillOptions,
    *,
    student: nn.Module | None = None,
    data: Data | None = None,
    val: Data | None = None,
    cache: CachePath | None = None,
    val_cache: CachePath | None = None,
) -> RunResult:
    """Trains a student; objects given here take the place of the options of the same name.

    Under torchrun every process calls it, and the run is theirs together. The caller's random generators
    are left as they were.

    Args:
        options: everything else; see `DistillOptions`.
        student: trained in place.
        data: a map-style data set whose items are (x, label), dicts or bare x, a SPEC, or what `load_data` gives.
        val: held-out data of the same kind.
        cache: of the teacher's rows for `data`.
        val_cache: of the teacher's rows for `val`.

    Raises:
        UsageError: options that cannot be meant, or an `out` that holds a run.
        MismatchError: student, data, cache or the run to resume do not belong together.
        InterruptedRunError: SIGINT or SIGTERM; the run is saved and resumable.
        KDCacheError: the loss is not finite.
    """
    options = resolve(options)
    with team(options.device) as ranks, _threads(options.threads):
        with checkpoint.own_generators(options.seed, ranks.device):
            train = open_source(
                _given("data", data, options), cache or options.cache, missing=options.missing, name="training"
            )
            held_out = None
            if val is not None or options.val is not None:
                val = _given("val", val, options)
                held_out = open_source(val, val_cache or options.val_cache, missing="error", name="validation")
            check_signal(train, options)
            net, width = open_student(student, train, options, ranks.device)
            ranks.copy_from_first([*net.parameters(), *net.buffers()])
            checkpoint.seed_generators((options.seed + 1_000_003 * ranks.rank) % 2**63)  # dropout differs by rank
            trainer = _build_trainer(net, width, train, options, ranks)
            return _run(Job(options, trainer, train, held_out))


@dataclass(frozen=True, eq=False)
class Job:
    """A run's fixed parts: what was asked for and what it works on."""

    options: DistillOptions
    trainer: Trainer
    train: Source
    held_out: Source | None

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
        return identity(self.options, self.train, self.held_out, total_steps=self.total_steps)


def _build_trainer(net: nn.Module, width: int, train: Source, options: DistillOptions, ranks: Team) -> Trainer:
    order = Order(
        train.positions,
        options.batch_size,
        options.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pieces_per_rank=options.grad_accumulation,
        drop_last=options.drop_last,
    )
    assert options.lr is not None and options.weight_decay is not None  # resolved
    total_steps = options.steps or (options.epochs or 0) * order.steps_per_epoch
    optimizer = build_optimizer(
        options.optimizer,
        net.parameters(),
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    return Trainer(
        student=net,
        num_classes=width,
        parameters=[parameter for group in optimizer.param_groups for parameter in group["params"]],
        optimizer=optimizer,
        scaler=grad_scaler(options.amp, ranks.device),
        schedule=Schedule(options.schedule, options.lr, total_steps, options.warmup),
        objective=Objective(options.alpha, options.temperature, options.label_smoothing, options.hard_targets),
        order=order,
        team=ranks,
        amp=options.amp,
        clip_norm=options.clip_norm,
        has_teacher=train.cache is not None,
    )


def _run(job: Job) -> RunResult:
    options, ranks, out = job.options, job.trainer.team, job.out
    state, metrics_bytes, record = State(), 0, _new_record(job)
    if out is not None:
        if ranks.is_first:
            prepare_folder(out, resume=options.resume, overwrite=options.overwrite)
        checkpoint_path = out / checkpoint.RESUME_NAME
        has_checkpoint, is_done = ranks.any(
            [
                ranks.is_first and checkpoint_path.exists(),
                ranks.is_first and read_record(out).get("status") == "done",
            ]
        )
        if is_done:
            return _finished(job)
        if has_checkpoint:
            state, metrics_bytes = restore_run(checkpoint_path, job.trainer, identity=job.identity)
            record["started"] = read_record(out).get("started", record["started"])
        if ranks.is_first:
            write_record(out, record)
    _announce(job, state)
    folder = out if ranks.is_first else None
    log = MetricsLog(folder, keep_bytes=metrics_bytes, tensorboard=options.tensorboard, step=state.step)
    # Without a folder nothing could be saved, so a signal then means what it always does.
    signals = graceful_signals() if out is not None else contextlib.nullcontext(StopRequest())
    shown = ranks.is_first and not options.quiet
    with signals as stop, contextlib.closing(log):
        with Progress(job.total_steps, what="distill", unit="step", done=state.step, enabled=shown) as bar:
            _train(job, state, log, stop, bar)
    record = {**record, "status": "done", "finished": now(), **_results(state)}
    if out is not None and ranks.is_first:
        checkpoint.save(out / checkpoint.LAST_NAME, checkpoint.state_dict(job.trainer.student))
        write_record(out, record)
        checkpoint_path.unlink(missing_ok=True)
    return RunResult(job.trainer.student.eval(), out, state.step, state.last, state.best, record)


def _train(job: Job, state: State, log: MetricsLog, stop: StopRequest, bar: Progress) -> None:
    """The loop: epochs, steps, and what is due after a step."""
    options, trainer, order, ranks = job.options, job.trainer, job.trainer.order, job.trainer.team
    generator = torch.Generator()
    sampler = StepSampler(order)
    loader = build_loader(job.train, sampler, options, generator)
    held_out = _held_out_batches(job)
    saved_at = time.monotonic()
    while state.step < job.total_steps:
        epoch = order.epoch(state.step)
        sampler.start, sampler.stop = state.step, min(job.total_steps, (epoch + 1) * order.steps_per_epoch)
        generator.manual_seed((options.seed + epoch) % 2**63)
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
                    f"stopped by {stop.name or 'a signal to another rank'} after step {state.step} of {job.total_steps}; "
                    "everything is saved: the same command with --resume goes on"
                )
            bar.advance()
            began = time.perf_counter()


def _training_line(job: Job, state: State, parts: Tensor) -> dict[str, Any]:
    """The line for the steps since the last one, which it ends.

    `loss` is the mean over all of them; `ce` and `kd` (temperature**2 * KL) are those of the last step.
    """
    numerator, weight = fetch_window(state).sum(dim=0).tolist()
    state.signal_rows += weight
    if not state.signal_rows and state.step >= job.trainer.order.steps_per_epoch:
        raise DataError("no row of a whole epoch had a label or a teacher: there is nothing to learn from")
    state.seconds += state.window_seconds
    ce, labelled, kd, taught = parts.tolist()
    line = {
        **_position(job, state),
        "event": "train",
        "loss": numerator / weight if weight else 0.0,
        **({"ce": ce / labelled} if labelled else {}),
        **({"kd": kd / taught} if taught else {}),
        "lr": job.trainer.schedule.at(state.step - 1),
        "images_per_second": state.window_rows / max(state.window_seconds, 1e-9),
    }
    state.last = {**state.last, "loss": line["loss"]}
    state.window, state.window_rows, state.window_seconds = [], 0, 0.0
    return line


def _position(job: Job, state: State) -> dict[str, Any]:
    return {"step": state.step, "epoch": round(state.step / job.trainer.order.steps_per_epoch, 4)}


def _evaluation_is_due(job: Job, step: int) -> bool:
    return step % (job.options.eval_steps or job.trainer.order.steps_per_epoch) == 0


def _held_out_batches(job: Job) -> Any:
    if job.held_out is None:
        return None
    pieces = job.options.grad_accumulation * job.trainer.team.world_size
    batch_size = -(-job.options.batch_size // pieces)  # what fits the memory of a training pass
    sampler = batches_of_rank(job.held_out.positions, batch_size, job.trainer.team)
    return build_loader(job.held_out, sampler, job.options, torch.Generator())


def _evaluate(job: Job, state: State, held_out: Any, log: MetricsLog) -> None:
    """Measures the student, and keeps it if it is the best so far."""
    fetch_window(state)  # a student that diverged is not worth measuring
    assert job.held_out is not None
    trainer, objective = job.trainer, job.trainer.objective
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


def _save(job: Job, state: State, log: MetricsLog) -> None:
    assert job.out is not None
    fetch_window(state)  # what diverged must not replace what did not
    path = job.out / checkpoint.RESUME_NAME
    save_run(path, job.trainer, state, identity=job.identity, metrics_bytes=log.sync())


def _finished(job: Job) -> RunResult:
    """The result of a run that --resume finds finished."""
    assert job.out is not None
    record = read_record(job.out)
    check_same_run(record["identity"], job.identity, out=job.out)
    job.trainer.student.load_state_dict(checkpoint.load(job.out / checkpoint.LAST_NAME))
    return RunResult(job.trainer.student.eval(), job.out, record["steps"], record["last"], record["best"], record)


def _new_record(job: Job) -> dict[str, Any]:
    trainer = job.trainer
    return {
        "status": "running",
        "started": now(),
        "options": portable(job.options),
        "formula": trainer.objective.formula,
        "student": {
            "spec": portable(job.options)["student"] or type(trainer.student).__name__,
            "classes": trainer.num_classes,
            "parameters": sum(parameter.numel() for parameter in trainer.student.parameters()),
        },
        "data": describe_source(job.train),
        "val": None if job.held_out is None else describe_source(job.held_out),
        "total_steps": job.total_steps,
        "steps_per_epoch": trainer.order.steps_per_epoch,
        "world_size": trainer.team.world_size,
        "device": trainer.team.device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "identity": job.identity,
    }


def _results(state: State) -> dict[str, Any]:
    return {"steps": state.step, "train_seconds": round(state.seconds, 3), "last": state.last, "best": state.best}


def _announce(job: Job, state: State) -> None:
    if not job.trainer.team.is_first or job.options.quiet:
        return
    order, lines = job.trainer.order, [f"loss = {job.trainer.objective.formula}"]
    if job.options.alpha == 0 and job.train.cache is not None and not job.options.hard_targets:
        lines.append("rows without a label learn from the teacher all the same; leave out --cache for labels only")
    lines.append(
        f"{len(order.positions):,} rows, {order.steps_per_epoch:,} steps an epoch, {job.total_steps:,} steps in all"
        + (f"; going on after step {state.step:,}" if state.step else "")
    )
    print("\n".join(lines), file=sys.stderr, flush=True)


def _given(name: str, value: Data | None, options: DistillOptions) -> Data:
    chosen = getattr(options, name) if value is None else value
    if chosen is None:
        raise UsageError(f"no {name}: give --{name}, for example digits:train or module:factory")
    return chosen


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch's threads for the block; the caller's number comes back afterwards."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
