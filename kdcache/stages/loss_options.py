"""The loss options of `distill`, as asked for on the command line, made into settings. No torch here."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from kdcache.errors import UsageError
from kdcache.format.encoding import Encoding
from kdcache.format.soft_targets import SoftTargets
from kdcache.train.capability import require
from kdcache.train.loss_records import Loss
from kdcache.train.loss_settings import LossSettings
from kdcache.train.loss_text import BY_NAME, parse_loss
from kdcache.train.schedules import Course, parse_course

if TYPE_CHECKING:
    from kdcache.stages.distill_options import DistillOptions

DEFAULT_ALPHA = 0.9
DEFAULT_LOSS = "kl"
DEFAULT_TEMPERATURE = 4.0


def resolve_alpha(options: DistillOptions) -> DistillOptions:
    """The options with the alpha that `--ce-weight` and `--kd-weight` stand for.

    Raises:
        UsageError: one of the two alone, below 0, both 0, or beside another --alpha.
    """
    ce, kd = options.ce_weight, options.kd_weight
    if ce is None and kd is None:
        return options
    if ce is None or kd is None:
        raise UsageError("--ce-weight and --kd-weight go together: give both, or --alpha alone")
    if not (0 <= ce < math.inf and 0 <= kd < math.inf) or ce + kd == 0:
        raise UsageError(f"--ce-weight {ce:g} and --kd-weight {kd:g}: expected two numbers of at least 0, not both 0")
    alpha = kd / (ce + kd)
    if options.alpha not in (DEFAULT_ALPHA, alpha):
        raise UsageError(
            f"--alpha {options.alpha:g} beside --ce-weight {ce:g} and --kd-weight {kd:g}, which stand for alpha "
            f"{alpha:g}: give one or the other"
        )
    return dataclasses.replace(options, alpha=alpha)


def check_losses(options: DistillOptions) -> None:
    """Refuses losses and schedules that cannot be meant, before anything is loaded.

    Raises:
        UsageError: naming the option.
    """
    settings = loss_settings(options)
    alpha, temperature = courses(options)
    if alpha.end is not None and not 0 <= alpha.end <= 1:
        raise UsageError(f"--alpha-schedule ends at {alpha.end:g}, expected a number between 0 and 1")
    if temperature.end is not None and not temperature.end > 0:
        raise UsageError(f"--temperature-schedule ends at {temperature.end:g}, expected a number above 0")
    if options.hard_targets and (options.loss or options.ce_weight is not None or alpha.end or temperature.end):
        raise UsageError(
            "--hard-targets is cross-entropy on the teacher's argmax alone: leave out --loss, --ce-weight, --kd-weight "
            "and schedules"
        )
    if not options.hard_targets and not settings.follows_run:
        idle = [
            flag
            for flag, is_given in (
                ("--temperature-schedule", temperature.end is not None),
                ("--student-temperature", options.student_temperature is not None),
            )
            if is_given
        ]
        if idle:
            names = ", ".join(part.loss.name for part in settings.losses)
            raise UsageError(f"{idle[0]} has no effect on {names}, which have temperatures of their own or none")
    of_batch = [part.loss.name for part in settings.losses if part.loss.is_of_batch]
    if of_batch and options.grad_accumulation > 1:
        raise UsageError(
            f"--loss {of_batch[0]} correlates the rows of a batch, which --grad-accumulation "
            f"{options.grad_accumulation} cuts into pieces: it would be another loss; use --grad-accumulation 1"
        )


def loss_settings(options: DistillOptions) -> LossSettings:
    """The loss of the first step.

    Raises:
        UsageError: a loss that is not known, or numbers that cannot be meant.
    """
    scale = 1.0
    if options.ce_weight is not None and options.kd_weight is not None:
        scale = options.ce_weight + options.kd_weight
    return LossSettings(
        options.alpha,
        options.temperature,
        options.student_temperature,
        options.label_smoothing,
        tuple(parse_loss(text) for text in options.loss or (DEFAULT_LOSS,)),
        scale,
        options.tail_tolerance,
    )


def courses(options: DistillOptions) -> tuple[Course, Course]:
    """The schedules of alpha and of the temperature."""
    return (
        parse_course(options.alpha_schedule, what="--alpha-schedule"),
        parse_course(options.temperature_schedule, what="--temperature-schedule"),
    )


def needs_teacher(options: DistillOptions) -> bool:
    """Whether the teacher weighs anything in some step."""
    return options.alpha > 0 or bool(courses(options)[0].end)


def check_encoding(options: DistillOptions, encoding: Encoding, *, follows: bool = False) -> None:
    """Refuses losses that a cache's encoding cannot serve.

    Args:
        options: of the run.
        encoding: of the rows that the losses see.
        follows: whether soft targets are made anew at the temperature of each step.

    Raises:
        UsageError: naming the encodings that can.
    """
    if options.hard_targets:
        require("hard_target", encoding)
    elif needs_teacher(options):
        for part in loss_settings(options).losses:
            follows_run = part.loss.follows_run
            temperature = options.temperature if follows_run else _own_temperature(part.loss)
            require(part.loss.need, encoding, temperature, among=BY_NAME)
            end = courses(options)[1].end
            if isinstance(encoding, SoftTargets) and follows_run and end is not None and not follows:
                require(part.loss.need, encoding, end)


def _own_temperature(loss: Loss) -> float | None:
    found: float | None = getattr(loss, "temperature", None)
    return found
