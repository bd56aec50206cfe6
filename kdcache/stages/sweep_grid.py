"""The runs of a sweep: a grid of settings, every one with every seed, and alpha 0 with the same budget. No torch here.

Alpha 0 is the small model fitted to the labels alone, without any part of the teacher: it takes the learning rates,
weight decays and label smoothings of the others, all seeds, and as many optimiser steps. Alphas, temperatures and
losses mean nothing to it, and the best of many settings looks better than the best of few; so in their place it tries
label smoothings and learning rates of its own, until there are as many settings with the teacher as without.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kdcache.errors import KDCacheError, UsageError
from kdcache.stages.choices import DEFAULT_LR
from kdcache.stages.distill_options import DistillOptions, resolve
from kdcache.stages.loss_options import DEFAULT_LOSS
from kdcache.stages.option import flag
from kdcache.stages.sweep_options import OF_LABELS_TOO, OF_THE_TEACHER, SAME_VALUES, SWEPT, SweepOptions
from kdcache.train.loss_text import parse_loss

# What alpha 0 leaves out: whatever the teacher has a say in.
_WITHOUT_TEACHER: dict[str, Any] = {
    "alpha": 0.0,
    "alpha_schedule": "constant",
    "disagreement": "keep",
    "threshold": None,
    "confidence_below": None,
    "confidence_policy": None,
    "refresh_every": None,
    "ema": None,
}
# What alpha 0 tries of its own, in this order: a label smoothing (None: unchanged) and a factor of the learning rate.
_OWN_FIRST = ((0.1, 1.0), (None, 2.0), (None, 0.5), (0.05, 1.0), (0.1, 2.0), (0.1, 0.5), (0.05, 2.0), (0.05, 0.5))
# Then points spread evenly over smoothings of 0 to 0.3 and factors of /4 to x4, by the R2 sequence (M. Roberts, 2018):
# multiples of 1/g and 1/g^2, where g^3 = g + 1.
_OWN_SMOOTHING, _OWN_FACTOR = 0.3, 4.0
_R2 = (0.7548776662466927, 0.5698402909980532)


@dataclass(frozen=True)
class Setting:
    """Options that are chosen together: of several runs, one a seed.

    Attributes:
        changed: the options that are swept or differ from the base's, without the seed.
        options: all of them.
        fraction: of the labels; None where the sweep has no fractions.
    """

    changed: dict[str, Any]
    options: DistillOptions
    fraction: float | None

    @property
    def is_labels_only(self) -> bool:
        """Whether the teacher has no say."""
        return self.options.alpha == 0

    @property
    def follows_temperature(self) -> bool:
        """Whether another temperature would be another setting."""
        return not self.is_labels_only and _follows(self.options.loss)

    @property
    def text(self) -> str:
        """For people."""
        hidden = ("unlabelled", "label_fraction") if self.fraction is None else ()
        told = {"alpha": self.options.alpha, **self.changed}
        return " ".join(f"{flag(name)} {_shown(value)}" for name, value in told.items() if name not in hidden)


@dataclass(frozen=True)
class Run:
    """A setting with a seed, and the name of its folder."""

    name: str
    setting: Setting
    seed: int


def settings_of(asked: SweepOptions) -> list[Setting]:
    """The settings of a sweep, those of alpha 0 among them.

    Raises:
        UsageError: a value that `distill` refuses, with the setting that it stands in.
    """
    values = {name: list(asked.values.get(name, [getattr(asked.base, name)])) for name in OF_THE_TEACHER}
    shared = [dict(zip(OF_LABELS_TOO, one, strict=True)) for one in _product(asked, OF_LABELS_TOO)]
    values["alpha"] = [alpha for alpha in values["alpha"] if alpha != 0]
    teacher = [
        {"alpha": alpha, "temperature": temperature, "loss": loss}
        for loss in values["loss"]
        for temperature in (values["temperature"] if _follows(loss) else values["temperature"][:1])
        for alpha in values["alpha"]
    ]
    grid = [{**one, **other} for one in teacher for other in shared]
    if not grid:
        raise UsageError("--alpha 0 alone: give another value too, alpha 0 is part of every sweep")
    if asked.random is not None and asked.random < len(grid):
        chosen = random.Random(asked.random_seed).sample(range(len(grid)), asked.random)
        grid = [grid[at] for at in sorted(chosen)]
    alone = {"temperature": asked.base.temperature, "loss": asked.base.loss, **_WITHOUT_TEACHER}
    fractions = asked.values.get("label_fraction", (asked.base.label_fraction,))
    found, has_fractions = [], fractions != (None,)
    for fraction in fractions:
        taught = [
            _setting(asked, {**one, "label_fraction": fraction, "unlabelled": mode}, has_fractions=has_fractions)
            for mode in _modes(asked.base, fraction)
            for one in grid
        ]
        share = {} if fraction is None else {"label_fraction": fraction, "unlabelled": "drop"}
        for other in _of_labels_alone(asked, grid, shared, count=len(taught)):
            found.append(_setting(asked, {**alone, **other, **share}, has_fractions=has_fractions))
        found += taught
    for seed in _seeds(asked):
        _check(found[0].options, f"--seed {seed}", seed=seed)
    return found


def with_labelled_rows_alone(settings: list[Setting]) -> list[Setting]:
    """For data of which some rows have no label: alpha 0, which learns nothing from these, leaves them out."""
    return [
        dataclasses.replace(one, options=dataclasses.replace(one.options, label_fraction=1.0, unlabelled="drop"))
        if one.is_labels_only and one.fraction is None
        else one
        for one in settings
    ]


def runs_of(settings: list[Setting], asked: SweepOptions) -> list[Run]:
    """All runs, seed by seed, so that an unfinished sweep has whole settings early on."""
    runs = [(setting, seed) for seed in _seeds(asked) for setting in settings]
    return [Run(f"{at:03d}-{_slug(one, asked)}-seed{seed}", one, seed) for at, (one, seed) in enumerate(runs)]


def _of_labels_alone(
    asked: SweepOptions, grid: list[dict[str, Any]], shared: list[dict[str, Any]], *, count: int
) -> list[dict[str, Any]]:
    """What alpha 0 tries: `count` different ones, those of the grid's settings first; or just what is shared."""
    if asked.labels_budget == SAME_VALUES:
        return shared
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    drawn = [{name: one[name] for name in OF_LABELS_TOO} for one in grid]
    for one in itertools.chain(drawn, shared, _own_values(asked.base, shared)):
        found.setdefault(tuple(one.values()), one)
        if len(found) == count:
            break
    return list(found.values())


def _own_values(base: DistillOptions, shared: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Around each of `shared`, without end."""
    spread = (
        (round(_OWN_SMOOTHING * (at * _R2[0] % 1), 3), _OWN_FACTOR ** (2 * (at * _R2[1] % 1) - 1))
        for at in itertools.count(1)
    )
    for smoothing, factor in itertools.chain(_OWN_FIRST, spread):
        for one in shared:
            lr = DEFAULT_LR[base.optimizer] if one["lr"] is None else one["lr"]
            own: dict[str, Any] = {} if factor == 1 else {"lr": float(f"{lr * factor:.3g}")}
            yield {**one, **own, **({} if smoothing is None else {"label_smoothing": smoothing})}


def _product(asked: SweepOptions, names: tuple[str, ...]) -> list[tuple[Any, ...]]:
    return list(itertools.product(*(asked.values.get(name, (getattr(asked.base, name),)) for name in names)))


def _modes(base: DistillOptions, fraction: float | None) -> list[str | None]:
    """With and without the unlabelled rest, unless one was asked for; all labels leave none."""
    if fraction is None or base.unlabelled is not None:
        return [base.unlabelled]
    return ["keep"] if fraction == 1 else ["keep", "drop"]


def _setting(asked: SweepOptions, values: dict[str, Any], *, has_fractions: bool) -> Setting:
    base, told = asked.base, {"alpha", *asked.values}
    if values["alpha"] == 0:
        told -= {"temperature", "loss"}
    elif not _follows(values["loss"]):
        told -= {"temperature"}
    changed = {name: value for name, value in values.items() if value != getattr(base, name) or name in told}
    options = dataclasses.replace(base, **changed)
    setting = Setting(changed, options, options.label_fraction if has_fractions else None)
    _check(options, setting.text)
    return setting


def _check(options: DistillOptions, text: str, **changed: Any) -> None:
    try:
        resolve(dataclasses.replace(options, resume=False, **changed))
    except KDCacheError as error:
        raise type(error)(f"the setting {text}: {error}") from error


def _seeds(asked: SweepOptions) -> tuple[int, ...]:
    return asked.values.get("seed", (asked.base.seed,))


def _follows(loss: tuple[str, ...]) -> bool:
    return any(parse_loss(text).loss.follows_run for text in loss or (DEFAULT_LOSS,))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " + ".join(value) or DEFAULT_LOSS
    return f"{value:g}" if isinstance(value, float) else str(value)


def _slug(setting: Setting, asked: SweepOptions) -> str:
    """The swept values, as part of a folder's name."""
    names = [name for name in SWEPT if name in asked.values or (name in OF_LABELS_TOO and setting.is_labels_only)]
    names = ["alpha", *(name for name in names if name in setting.changed and name not in ("alpha", "seed"))]
    if setting.fraction is not None and not setting.is_labels_only:
        names.append("unlabelled")
    parts = [f"{name.replace('_', '')}{_shown(getattr(setting.options, name))}" for name in names]
    return re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join(parts))[:120]
