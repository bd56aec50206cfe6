"""The options of the `distill` stage: one frozen record, from which the command line is generated.

Each field carries its help text and its choices as metadata, so that the command, its reference page
and this page cannot differ.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.format.schema import MAX_VIEWS
from kdcache.stages.choices import AMP, DEFAULT_LR, DEFAULT_WEIGHT_DECAY, NOVEL, OPTIMIZERS, SCHEDULES, listed
from kdcache.stages.loss_options import DEFAULT_ALPHA, DEFAULT_LOSS, DEFAULT_TEMPERATURE, check_losses, resolve_alpha
from kdcache.stages.option import flag, option
from kdcache.stages.policy_options import row_policies
from kdcache.train.ensemble_rules import parse_rule
from kdcache.train.policy_names import CONFIDENCE_POLICIES, DISAGREEMENT_POLICIES

MISSING = ("error", "ce", "skip")
CHECKS = ("ids", "sample", "full")
UNLABELLED = ("keep", "drop")
VIEW_ORDERS = ("epoch", "random")
DEFAULT_EPOCHS = 10


@dataclass(frozen=True)
class DistillOptions:
    """What `distill` is asked to do; every field has a default and a help text in its metadata.

    Paths are plain text. `batch_size` counts the rows of an optimiser step over all ranks and accumulation
    pieces, so that runs on other machines, and arms of a comparison, take equal steps.
    """

    student: str | None = option(
        None, "Student: mlp:784-128-10, cnn:SMALL, run:FOLDER or module:factory.", group="inputs"
    )
    data: str | None = option(
        None, "Training data: digits:train, npz:FILE, folder:PATH, module:factory ...", group="inputs"
    )
    val: str | None = option(None, "Validation data, as for --data.", group="inputs")
    cache: tuple[str, ...] | str | None = option(
        (),
        "PATH[=WEIGHT] of the teacher's cache; repeated for several teachers; left out with --alpha 0.",
        group="inputs",
    )
    expect_root: str | None = option(
        None, "Root hash that --cache must have, as its sender told it by another way.", group="inputs"
    )
    val_cache: tuple[str, ...] | str | None = option(
        (), "Cache for the validation data, repeated as --cache: measures fidelity to the teacher.", group="inputs"
    )
    init: str | None = option(None, "State dict (.pt or .safetensors) that the student starts from.", group="inputs")
    out: str | None = option(None, "Folder of the run.", group="inputs")

    alpha: float = option(
        DEFAULT_ALPHA, "Weight of the teacher's term, 0 (labels only) to 1 (teacher only).", group="loss"
    )
    alpha_schedule: str = option(
        "constant", "Course of alpha: constant, linear:END or cosine:END over all steps.", group="loss"
    )
    ce_weight: float | None = option(None, "With --kd-weight, instead of --alpha: weight of the labels.", group="loss")
    kd_weight: float | None = option(None, "With --ce-weight: weight of the teacher's term.", group="loss")
    temperature: float = option(
        DEFAULT_TEMPERATURE, "Softmax temperature of teacher and student, above 0.", group="loss"
    )
    temperature_schedule: str = option(
        "constant", "Course of the temperature: constant, linear:END or cosine:END.", group="loss"
    )
    student_temperature: float | None = option(None, "Temperature of the student, where it differs.", group="loss")
    loss: tuple[str, ...] = option(
        (), f"NAME[:key=value,...][*weight], repeated: the teacher's term ({DEFAULT_LOSS}).", group="loss"
    )
    tail_tolerance: float | None = option(
        None, "Mean error of the tail's mass of top-k rows at a temperature not stored (0.01).", group="loss"
    )
    ensemble: str | None = option(
        None,
        "How several teachers become one: logits, soft-targets, accuracy ... (see Several teachers).",
        group="loss",
    )
    calibration: tuple[str, ...] | str | None = option(
        (),
        "File of `kdcache calibrate` for --cache, repeated: the teacher's logits are divided before all else.",
        group="loss",
    )
    refresh_every: int | None = option(
        None,
        "Epochs between two versions of a moving teacher, the average of the student (OUT/teacher).",
        group="loss",
    )
    ema: float | None = option(None, "With --refresh-every: decay of that average (0.99).", group="loss")
    classes: str | None = option(
        None,
        "Which class of the student each of the teacher's is: a JSON file, or names for the same names.",
        group="loss",
    )
    novel: str | None = option(
        None,
        "Classes that the teacher does not know: left out of its term (the default), or of teacher mass 0.",
        group="loss",
        choices=NOVEL,
    )
    hard_targets: bool = option(False, "Cross-entropy on the teacher's argmax for every row instead.", group="loss")
    label_smoothing: float = option(0.0, "Label smoothing of the cross-entropy, 0 to 1.", group="loss")
    disagreement: str = option(
        "keep",
        "Rows whose label the teacher contradicts: keep, weight 0, weight p(label), or learn the teacher alone.",
        group="loss",
        choices=DISAGREEMENT_POLICIES,
    )
    threshold: float | None = option(
        None, "With --disagreement: only where the teacher's p(label) is below (1: any).", group="loss"
    )
    confidence_below: float | None = option(
        None, "Rows whose largest teacher probability is below are dropped, or see --confidence-policy.", group="loss"
    )
    confidence_policy: str | None = option(
        None,
        "Those rows: weight 0 (the default), weight of that probability, or learn the label alone.",
        group="loss",
        choices=CONFIDENCE_POLICIES,
    )
    label_fraction: float | None = option(
        None, "Share of the labels that are learnt, above 0 to 1, the same of each class.", group="loss"
    )
    unlabelled: str | None = option(
        None,
        "With --label-fraction: other rows learn from the teacher alone, or are left out.",
        group="loss",
        choices=UNLABELLED,
    )
    label_seed: int | None = option(None, "With --label-fraction: seed of the choice of labels (0).", group="loss")
    missing: str = option(
        "error", "Rows that the cache lacks: fail, learn the label, skip.", group="loss", choices=MISSING
    )
    check: str = option("sample", "Rows whose input is compared with the cache's.", group="loss", choices=CHECKS)

    augment: str | None = option(
        None,
        "Augmentation of the training inputs: crop4,hflip or module:factory; a cache brings its own.",
        group="views",
    )
    views: int | None = option(
        None, "Views of each sample: all of the cache, without a cache a new one each epoch.", group="views"
    )
    view_order: str = option(
        "epoch", "View in epoch e: number e mod --views, or any at random.", group="views", choices=VIEW_ORDERS
    )
    view_seed: int | None = option(None, "Seed of the views without a cache (0).", group="views")

    epochs: int | None = option(None, f"Passes over the data ({DEFAULT_EPOCHS} without --steps).", group="training")
    steps: int | None = option(None, "Optimiser steps, instead of --epochs.", group="training")
    batch_size: int = option(128, "Rows of an optimiser step, over all ranks.", group="training")
    drop_last: bool = option(False, "Leave out the short batch at an epoch's end.", group="training")
    grad_accumulation: int = option(1, "Forward passes that a rank divides its rows of a step into.", group="training")
    clip_norm: float | None = option(None, "Largest L2 norm of a step's gradient.", group="training")
    optimizer: str = option("sgd", "Optimiser.", group="training", choices=OPTIMIZERS)
    lr: float | None = option(None, f"Learning rate (default: {listed(DEFAULT_LR)}).", group="training")
    momentum: float = option(0.9, "Momentum of SGD.", group="training")
    weight_decay: float | None = option(
        None, f"Weight decay (default: {listed(DEFAULT_WEIGHT_DECAY)}).", group="training"
    )
    schedule: str = option("cosine", "Course of the learning rate.", group="training", choices=SCHEDULES)
    warmup: int = option(0, "Steps of linear warm-up.", group="training")
    amp: str = option("none", "Mixed precision.", group="training", choices=AMP)
    seed: int = option(0, "Seed of initial weights, order and dropout.", group="training")

    device: str = option("auto", "Device: auto, cpu, cuda, cuda:0 ...", group="machine")
    workers: int = option(0, "DataLoader workers of a rank.", group="machine")
    threads: int | None = option(
        None, "Threads of torch on the CPU (results move in the last bit with it).", group="machine"
    )

    resume: bool = option(False, "Go on from the run in --out if there is one.", group="run")
    overwrite: bool = option(False, "Replace the run in --out.", group="run")
    checkpoint_seconds: float = option(300.0, "Seconds between checkpoints to resume from.", group="run")
    checkpoint_steps: int | None = option(None, "Steps between checkpoints, as well.", group="run")
    eval_steps: int | None = option(None, "Steps between evaluations (default: each epoch's end).", group="run")
    log_steps: int = option(50, "Steps between lines of metrics.jsonl.", group="run")
    tensorboard: bool = option(False, "Write TensorBoard events too (extra tensorboard).", group="run")
    quiet: bool = option(False, "No progress on stderr.", group="run")


SEVERAL = ("cache", "val_cache", "calibration")
PATHS = ("cache", "val_cache", "calibration", "classes", "init", "out")
# What may differ when a run is resumed: where it computes, how often it reports, the request itself, and the
# names of caches, of a calibration and of a class map (their hashes may not).
RESUMABLE = frozenset(
    {"out", "cache", "expect_root", "val_cache", "calibration", "classes"}
    | {field.name for field in dataclasses.fields(DistillOptions) if field.metadata["group"] in ("machine", "run")}
)


def several(value: tuple[str, ...] | str | None) -> tuple[str, ...]:
    """What an option that may be repeated was given: a text stands for itself alone."""
    if value is None:
        return ()
    return (os.fspath(value),) if isinstance(value, (str, os.PathLike)) else tuple(value)


def resolve(options: DistillOptions) -> DistillOptions:
    """The options with the defaults that depend on others filled in, checked.

    Raises:
        UsageError: a value out of range, or two that exclude each other; the message names the option.
    """
    options = dataclasses.replace(
        options,
        cache=several(options.cache),
        val_cache=several(options.val_cache),
        calibration=several(options.calibration),
    )
    _check_choices(options)
    _check_numbers(options)
    options = resolve_alpha(options)
    check_losses(options)
    row_policies(options)
    if options.ensemble is not None:
        parse_rule(options.ensemble)
    if options.epochs is not None and options.steps is not None:
        raise UsageError("--epochs and --steps exclude each other; give one of them")
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite exclude each other; give one of them")
    if options.ema is not None and options.refresh_every is None:
        raise UsageError("--ema is the decay of a moving teacher; give --refresh-every too, or leave it out")
    if options.refresh_every is not None and options.out is None:
        raise UsageError("--refresh-every writes the teacher's caches into the folder of the run; give --out")
    if (options.resume or options.tensorboard) and options.out is None:
        raise UsageError("--resume and --tensorboard need the folder of the run; give --out")
    if options.hard_targets and options.label_smoothing:
        raise UsageError("--hard-targets and --label-smoothing exclude each other: the control is the teacher's argmax")
    _check_views(options)
    if options.novel is not None and options.classes is None:
        raise UsageError("--novel is about classes that the teacher does not know; say with --classes which it knows")
    if options.label_fraction is None and (options.unlabelled is not None or options.label_seed is not None):
        raise UsageError("--unlabelled and --label-seed say which labels --label-fraction leaves; give it (1: all)")
    return dataclasses.replace(
        options,
        epochs=DEFAULT_EPOCHS if options.epochs is None and options.steps is None else options.epochs,
        novel=NOVEL[0] if options.novel is None and options.classes is not None else options.novel,
        lr=DEFAULT_LR[options.optimizer] if options.lr is None else options.lr,
        weight_decay=DEFAULT_WEIGHT_DECAY[options.optimizer] if options.weight_decay is None else options.weight_decay,
    )


def _check_choices(options: DistillOptions) -> None:
    for field in dataclasses.fields(options):
        choices, value = field.metadata["choices"], getattr(options, field.name)
        if choices and value is not None and value not in choices:
            raise UsageError(f"{flag(field.name)} {value!r} is not known; choose one of {', '.join(choices)}")


def _check_views(options: DistillOptions) -> None:
    if options.view_seed is not None and options.cache:
        raise UsageError("--view-seed is for runs without a cache: the views of a cache have the seed of its dump")
    if options.view_seed is not None and options.augment is None:
        raise UsageError("--view-seed without --augment: there are no views to draw; give --augment, or leave it out")


def _check_numbers(options: DistillOptions) -> None:
    ranges: dict[str, tuple[bool, str]] = {
        "alpha": (0 <= options.alpha <= 1, "between 0 and 1"),
        "temperature": (0 < options.temperature < math.inf, "above 0"),
        "student_temperature": (
            options.student_temperature is None or 0 < options.student_temperature < math.inf,
            "above 0",
        ),
        "tail_tolerance": (options.tail_tolerance is None or options.tail_tolerance > 0, "above 0"),
        "threshold": (options.threshold is None or 0 < options.threshold <= 1, "above 0, at most 1"),
        "confidence_below": (
            options.confidence_below is None or 0 < options.confidence_below <= 1,
            "above 0, at most 1",
        ),
        "label_fraction": (
            options.label_fraction is None or 0 < options.label_fraction <= 1,
            "above 0, at most 1",
        ),
        "label_seed": (options.label_seed is None or 0 <= options.label_seed < 2**63, "at least 0 and below 2**63"),
        "refresh_every": (options.refresh_every is None or options.refresh_every >= 1, "at least 1"),
        "ema": (options.ema is None or 0 <= options.ema < 1, "at least 0 and below 1"),
        "label_smoothing": (0 <= options.label_smoothing < 1, "at least 0 and below 1"),
        "views": (options.views is None or 1 <= options.views <= MAX_VIEWS, f"1 to {MAX_VIEWS}"),
        "view_seed": (options.view_seed is None or 0 <= options.view_seed < 2**63, "at least 0 and below 2**63"),
        "epochs": (options.epochs is None or options.epochs >= 1, "at least 1"),
        "steps": (options.steps is None or options.steps >= 1, "at least 1"),
        "batch_size": (options.batch_size >= 1, "at least 1"),
        "grad_accumulation": (options.grad_accumulation >= 1, "at least 1"),
        "clip_norm": (options.clip_norm is None or options.clip_norm > 0, "above 0"),
        "lr": (options.lr is None or 0 < options.lr < math.inf, "above 0"),
        "momentum": (0 <= options.momentum < 1, "at least 0 and below 1"),
        "weight_decay": (options.weight_decay is None or 0 <= options.weight_decay < math.inf, "at least 0"),
        "warmup": (options.warmup >= 0, "at least 0"),
        "seed": (0 <= options.seed < 2**63, "at least 0 and below 2**63"),
        "workers": (options.workers >= 0, "at least 0"),
        "threads": (options.threads is None or options.threads >= 1, "at least 1"),
        "checkpoint_seconds": (options.checkpoint_seconds > 0, "above 0"),
        "checkpoint_steps": (options.checkpoint_steps is None or options.checkpoint_steps >= 1, "at least 1"),
        "eval_steps": (options.eval_steps is None or options.eval_steps >= 1, "at least 1"),
        "log_steps": (options.log_steps >= 1, "at least 1"),
    }
    for name, (is_valid, expected) in ranges.items():
        if not is_valid:
            raise UsageError(f"{flag(name)} must be {expected}, found {getattr(options, name)}")


def portable(options: DistillOptions) -> dict[str, Any]:
    """The options as plain values that may travel: of each absolute path only the last name is kept."""
    return {name: _portable_value(name, value) for name, value in dataclasses.asdict(options).items()}


def _portable_value(name: str, value: Any) -> Any:
    if name in SEVERAL:
        return [Path(path).name for path in several(value)]
    if isinstance(value, tuple):
        return list(value)  # as JSON gives it back
    if not isinstance(value, str):
        return value
    if name in PATHS:
        return Path(value).name
    parts = str(value).split(":")  # a spec has its path behind a scheme, and a split's name may follow it
    return ":".join(Path(part).name if Path(part).is_absolute() or part.startswith("~") else part for part in parts)
