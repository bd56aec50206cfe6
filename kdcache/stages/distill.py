"""The `distill` stage: a student learns from labels and cached teacher logits, top to bottom.

    inputs (data, caches, student)  ->  fresh or resumed  ->  steps, lines, evaluations, checkpoints  ->  record

A run stops between two steps only, and goes on from there with the same weights bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from kdcache.errors import InterruptedRunError, KDCacheError, UsageError
from kdcache.format.identity import as_root
from kdcache.stages import checkpoint
from kdcache.stages.amp import grad_scaler
from kdcache.stages.asked_caches import AskedCache, Caches, asked_caches, check_apart
from kdcache.stages.class_maps import with_classes
from kdcache.stages.devices import torch_threads
from kdcache.stages.distill_inputs import (
    Source,
    check_held_out,
    check_signal,
    open_source,
    open_student,
    with_calibration,
)
from kdcache.stages.distill_loop import RunJob, train
from kdcache.stages.distill_options import DistillOptions, resolve, several
from kdcache.stages.distill_record import announce, new_record, results
from kdcache.stages.ensemble_inputs import at_run_temperature, with_teachers
from kdcache.stages.final_measures import final_measures
from kdcache.stages.label_fraction import with_label_fraction
from kdcache.stages.loaded_data import LoadedData
from kdcache.stages.loss_options import needs_teacher
from kdcache.stages.metrics import MetricsLog
from kdcache.stages.moving_teacher import Refresh
from kdcache.stages.objective import build_objective
from kdcache.stages.optim import Schedule, build_optimizer
from kdcache.stages.order import Order
from kdcache.stages.parallel import Team, team
from kdcache.stages.policy_options import check_policies, row_policies
from kdcache.stages.progress import Progress
from kdcache.stages.resuming import check_same_run, restore_run
from kdcache.stages.run_record import check_folder, now, prepare_folder, read_record, write_record
from kdcache.stages.signals import StopRequest, graceful_signals
from kdcache.stages.specs import one_line
from kdcache.stages.student_views import ViewSettings, view_settings
from kdcache.stages.switching import asked_refresh, check_comes, check_refresh
from kdcache.stages.tail_note import tail_lines
from kdcache.stages.training import State, Trainer
from kdcache.store.posix import exists, translated, unlink
from kdcache.train.cache_views import Augment

RANK_SEED_STEP = 1_000_003  # dropout differs between ranks

Data = str | Dataset[Any] | LoadedData


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
    cache: Caches | None = None,
    val_cache: Caches | None = None,
    augment: Augment | None = None,
    refresh: Refresh | None = None,
) -> RunResult:
    """Trains a student; objects given here take the place of the options of the same name.

    Under torchrun every process calls it, and the run is theirs together. The caller's random generators
    are left as they were.

    Args:
        options: everything else; see `DistillOptions`.
        student: trained in place.
        data: a map-style data set whose items are (x, label), dicts or bare x, a SPEC, or what `load_data` gives.
        val: held-out data of the same kind.
        cache: of the teacher's rows for `data`, open or by its path; a list of them for several teachers.
        val_cache: of the teacher's rows for `val`, likewise.
        augment: of the training inputs: a pipeline by name, a transform, or what `kdcache.views` makes of it. With a
            cache, that of its dump; one that the cache names may be left out.
        refresh: gives another cache every n epochs, such as a `MovingTeacher`; without a first `cache` labels teach
            alone until then.

    Raises:
        UsageError: options that cannot be meant, or an `out` that holds a run.
        MismatchError: student, data, cache or the run to resume do not belong together.
        InterruptedRunError: SIGINT or SIGTERM; the run is saved and resumable.
        KDCacheError: the loss is not finite.
    """
    with prepared_run(
        options,
        student=student,
        data=data,
        val=val,
        cache=cache,
        val_cache=val_cache,
        augment=augment,
        refresh=refresh,
    ) as (job, stop):
        return _run(job, stop)


@contextlib.contextmanager
def prepared_run(
    options: DistillOptions,
    *,
    student: nn.Module | None = None,
    data: Data | None = None,
    val: Data | None = None,
    cache: Caches | None = None,
    val_cache: Caches | None = None,
    augment: Augment | None = None,
    refresh: Refresh | None = None,
) -> Iterator[tuple[RunJob, StopRequest]]:
    """The run that `distill` would make of these arguments, with everything that it can refuse refused.

    Inside the block the generators, the threads and the signals are the run's. Nothing is written.
    """
    options = resolve(options)
    if student is not None:
        options = replace(options, student=None)  # else the record would name another student than the one trained
    # Without a folder nothing could be saved, so a signal then means what it always does.
    signals = contextlib.nullcontext(StopRequest()) if options.out is None else graceful_signals()
    with (
        team(options.device) as ranks,
        torch_threads(options.threads),
        checkpoint.own_generators(options.seed, ranks.device),
        signals as stop,
    ):
        if ranks.is_first and options.out is not None:
            check_folder(Path(options.out), resume=options.resume, overwrite=options.overwrite)
        asked = asked_caches(cache, several(options.cache), option="--cache")
        asked_val = asked_caches(val_cache, several(options.val_cache), option="--val-cache")
        check_apart(options, asked, asked_val)
        settings = view_settings(options, augment)
        source, held_out = _opened(options, data, val, asked, asked_val, settings)
        check_signal(source, held_out, options, refreshed=refresh is not None or options.refresh_every is not None)
        refresh = asked_refresh(refresh, source, options)
        check_refresh(refresh, source, options, caches=len(asked))
        source = with_label_fraction(source, options)
        check_policies(row_policies(options), source)
        source, held_out = with_calibration(source, held_out, options)
        source, held_out = with_classes(source, held_out, options)
        # Of several teachers, soft targets are exact or refused.
        one_teacher = source.cache is not None and source.teachers is None
        tail = tail_lines(source, options) if needs_teacher(options) and one_teacher else []
        net, width = open_student(student, source, options, ranks.device)
        check_held_out(held_out, width)
        ranks.copy_from_first([*net.parameters(), *net.buffers()])
        checkpoint.seed_generators((options.seed + RANK_SEED_STEP * ranks.rank) % 2**63)
        trainer = _build_trainer(net, width, (source, held_out), options, ranks)
        check_comes(refresh, trainer)
        if refresh is not None and refresh.ema is not None:
            refresh.ema.begin(net)
            trainer = replace(trainer, ema=refresh.ema)
        yield RunJob(options, trainer, source, held_out, tuple(tail), refresh, settings), stop


def _opened(
    options: DistillOptions,
    data: Data | None,
    val: Data | None,
    asked: Sequence[AskedCache],
    asked_val: Sequence[AskedCache],
    settings: ViewSettings,
) -> tuple[Source, Source | None]:
    """The training data and the validation data, with all their teachers."""
    train_data = _chosen("data", data, options)
    if options.expect_root is not None and len(asked) != 1:
        if not asked:
            raise UsageError("--expect-root without --cache: there is nothing that could have that root hash")
        raise UsageError(
            f"--expect-root is of one cache, and --cache names {len(asked)}: check each with `kdcache verify`"
        )
    source = open_source(
        train_data,
        asked[0].cache if asked else None,
        missing=options.missing,
        name="training",
        settings=settings,
        expect_root=None if options.expect_root is None else as_root(options.expect_root),
    )
    held_out = None
    if val is not None or options.val is not None:
        val_data, held_out_cache = _chosen("val", val, options), asked_val[0].cache if asked_val else None
        held_out = open_source(val_data, held_out_cache, missing="error", name="validation")
    elif asked_val:
        raise UsageError("--val-cache without --val: give the data that it was dumped from, or leave it out")
    return with_teachers(source, held_out, asked, asked_val, options)


def _build_trainer(
    net: nn.Module, width: int, sources: tuple[Source, Source | None], options: DistillOptions, ranks: Team
) -> Trainer:
    train, held_out = sources
    order = Order(
        train.positions,
        options.batch_size,
        options.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pieces_per_rank=options.grad_accumulation,
        drop_last=options.drop_last,
    )
    assert options.lr is not None  # `resolve` filled them in
    assert options.weight_decay is not None
    total_steps = options.steps or (options.epochs or 0) * order.steps_per_epoch
    optimizer = build_optimizer(
        options.optimizer,
        net.parameters(),
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    objective = build_objective(options, total_steps=total_steps)
    return Trainer(
        student=net,
        num_classes=width,
        parameters=[parameter for group in optimizer.param_groups for parameter in group["params"]],
        optimizer=optimizer,
        scaler=grad_scaler(options.amp, ranks.device),
        schedule=Schedule(options.schedule, options.lr, total_steps, options.warmup),
        objective=objective,
        order=order,
        team=ranks,
        amp=options.amp,
        clip_norm=options.clip_norm,
        has_teacher=train.cache is not None,
        policies=row_policies(options),
        teaching=at_run_temperature(train.teaching, objective),
        held_out_teaching=None if held_out is None else held_out.teaching,
        labels=train.labels,
        counts_novel=train.classes is not None and bool(train.classes.classes.novel),
    )


def _run(job: RunJob, stop: StopRequest) -> RunResult:
    options, ranks, out = job.options, job.trainer.team, job.out
    state, metrics_bytes, record = State(), 0, new_record(job)
    if out is not None:
        if ranks.is_first:
            prepare_folder(out, overwrite=options.overwrite)
        checkpoint_path = out / checkpoint.RESUME_NAME
        has_checkpoint, is_done = ranks.any(
            [
                ranks.is_first and exists(checkpoint_path),
                ranks.is_first and read_record(out).get("status") == "done",
            ]
        )
        if is_done:
            return _finished(job)
        if has_checkpoint:
            state, metrics_bytes = restore_run(checkpoint_path, job.trainer, identity=job.identity)
            record["started"] = read_record(out).get("started", record["started"])
    folder = out if ranks.is_first else None
    log = MetricsLog(folder, keep_bytes=metrics_bytes, tensorboard=options.tensorboard, step=state.step)
    shown = ranks.is_first and not options.quiet
    try:
        with contextlib.closing(log):
            if folder is not None:
                write_record(folder, record)
            announce(job, state)
            with Progress(job.total_steps, what="distill", unit="step", done=state.step, enabled=shown) as bar:
                train(job, state, log, stop, bar)
            log.sync()
    except InterruptedRunError:
        if folder is not None:
            write_record(folder, {**record, "status": "interrupted", **results(job, state)})
        raise
    if folder is not None:
        checkpoint.save(folder / checkpoint.LAST_NAME, checkpoint.state_dict(job.trainer.student))
    measures = {} if out is None else {"measures": final_measures(job, state)}
    record = {**record, "status": "done", "finished": now(), **results(job, state), **measures}
    if folder is not None:
        write_record(folder, record)
        with translated("remove", folder / checkpoint.RESUME_NAME):
            unlink(folder / checkpoint.RESUME_NAME)
    return RunResult(job.trainer.student.eval(), out, state.step, state.last, state.best, record)


def _finished(job: RunJob) -> RunResult:
    """The result of a run that --resume finds finished."""
    assert job.out is not None
    record, weights = read_record(job.out), checkpoint.load(job.out / checkpoint.LAST_NAME)
    try:
        check_same_run(record["identity"], job.identity, out=job.out)
        job.trainer.student.load_state_dict(weights)
        return RunResult(job.trainer.student.eval(), job.out, record["steps"], record["last"], record["best"], record)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise KDCacheError(
            f"the finished run in {job.out} is damaged, or was not written by kdcache ({one_line(error)}); use "
            "--overwrite to start anew"
        ) from error


def _chosen(name: str, value: Data | None, options: DistillOptions) -> Data:
    chosen = getattr(options, name) if value is None else value
    if chosen is None:
        raise UsageError(f"no {name}: give --{name}, for example digits:train or module:factory")
    return chosen
