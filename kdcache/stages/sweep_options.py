"""The options of `kdcache sweep`: those of `distill` as the base, and lists of values for some of them. No torch here.

A list is written as text with commas. Losses have commas of their own: --loss is repeated, once for each value, and a
value that is a sum of several losses joins them by `;`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kdcache.errors import UsageError
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.option import flag, option

# In the order of the columns; those of labels alone are tuned for alpha 0 too.
OF_THE_TEACHER = ("alpha", "temperature", "loss")
OF_LABELS_TOO = ("lr", "weight_decay", "label_smoothing")
SWEPT = (*OF_THE_TEACHER, *OF_LABELS_TOO, "label_fraction", "seed")
LABELS_BUDGETS = EQUAL, SAME_VALUES = ("equal", "same-values")
_BUDGET_HELP = (
    "Settings of alpha 0: as many as have the teacher, with label smoothings and learning rates of its own, or those "
    "alone whose values the others have too."
)
# Another way to say alpha, a loss without an alpha, and what is said of the folder of one run.
_NOT_HERE = ("ce_weight", "kd_weight", "hard_targets", "overwrite")


@dataclass(frozen=True)
class SweepOptions:
    """What `sweep` is asked to do.

    Attributes:
        base: of every run; its `out` is the folder of the sweep, its `resume` goes on with one.
        values: by the name of the option: what it takes in turn; an option that is not named keeps the base's value.
        random: so many settings of the grid, drawn without replacement; None = all.
        random_seed: of that draw.
        processes: at once; None = one a CUDA device, or one for each `threads` cores.
        test: SPEC of the data that the chosen settings are measured on in the end.
        labels_budget: settings of alpha 0: `equal`, as many as have a teacher, or `same-values`, what is shared alone.
    """

    base: DistillOptions
    values: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    random: int | None = None
    random_seed: int = 0
    processes: int | None = None
    test: str | None = None
    labels_budget: str = EQUAL


def command_record() -> type[Any]:
    """A record of the command's options: those of `distill`, with lists for what is swept, and the sweep's own."""
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(DistillOptions):
        if field.name in _NOT_HERE:
            continue
        told = dict(field.metadata)
        group, help_text = str(told["group"]), str(told["help"])
        if field.name == "loss":
            help_text = "A value for each time it is given; terms of one sum are joined by ';'. " + help_text
            fields.append((field.name, "tuple[str, ...]", option((), help_text, group="sweep")))
        elif field.name in SWEPT:
            fields.append((field.name, "str | None", option(None, f"LIST. {help_text}", group="sweep")))
        else:
            changed = {"out": "Folder of the sweep.", "resume": "Go on with the sweep in --out if there is one."}
            told_option = option(
                field.default, changed.get(field.name, help_text), group=group, choices=told["choices"]
            )
            fields.append((field.name, str(field.type), told_option))
    own: list[tuple[str, Any, Any]] = [
        ("random", "int | None", option(None, "So many settings of the grid, drawn at random.", group="sweep")),
        ("random_seed", "int", option(0, "Seed of that draw.", group="sweep")),
        ("processes", "int | None", option(None, "Runs at once (default: GPUs, or cores / threads).", group="sweep")),
        ("test", "str | None", option(None, "Data to measure the chosen settings on, in the end.", group="sweep")),
        ("labels_budget", "str", option(EQUAL, _BUDGET_HELP, group="sweep", choices=LABELS_BUDGETS)),
    ]
    fields.sort(key=lambda one: one[2].metadata["group"] != "sweep")  # stable: the sweep's own come first
    return dataclasses.make_dataclass("SweepRecord", own + fields, frozen=True)


def from_command(**given: Any) -> SweepOptions:
    """The options that the command was given, lists taken apart.

    Raises:
        UsageError: a list that is empty, holds what is no number, or names a value twice.
    """
    own = {name: given.pop(name) for name in ("random", "random_seed", "processes", "test", "labels_budget")}
    values = {name: _numbers(name, text) for name in SWEPT if name != "loss" and (text := given.pop(name)) is not None}
    losses = given.pop("loss")
    if losses:
        values["loss"] = tuple(tuple(term.strip() for term in text.split(";")) for text in losses)
    return SweepOptions(DistillOptions(**given), values, **own)


def _numbers(name: str, text: str) -> tuple[Any, ...]:
    kind: Callable[[str], Any] = int if name == "seed" else float
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        example = "0,1,2" if name == "seed" else "0.1,0.5,0.9"
        raise UsageError(f"{flag(name)} {text!r}: expected numbers with commas between them, as in {example}") from None


def check_values(options: SweepOptions) -> None:
    """Refuses what the sweep's own options cannot mean, such as a value that is named twice.

    Raises:
        UsageError: naming the option.
    """
    for name, values in options.values.items():
        if name not in SWEPT:
            raise UsageError(f"{flag(name)} is not swept; lists are taken for {', '.join(map(flag, SWEPT))}")
        twice = next((value for at, value in enumerate(values) if value in values[:at]), None)
        if twice is not None:
            shown = ";".join(twice) if isinstance(twice, tuple) else f"{twice:g}"
            raise UsageError(f"{flag(name)} names {shown} twice: the same runs would count as two")
    if options.base.val is None:
        raise UsageError("no --val: settings are chosen on held-out data, and not on the test set; give --val")
    if options.base.out is None:
        raise UsageError("no --out: give a folder for the runs and their table")
    if options.labels_budget not in LABELS_BUDGETS:
        raise UsageError(f"--labels-budget {options.labels_budget!r}: choose one of {', '.join(LABELS_BUDGETS)}")
    for name, number in (("random", options.random), ("processes", options.processes)):
        if number is not None and number < 1:
            raise UsageError(f"--{name} must be at least 1, found {number}")


def check_lists(options: SweepOptions) -> None:
    """Refuses a sweep over nothing: said after everything else, which several values would not mend.

    Raises:
        UsageError: no option has several values.
    """
    if all(len(values) < 2 for values in options.values.values()):
        raise UsageError(
            f"nothing to sweep over: give at least one of {', '.join(map(flag, SWEPT))} several values, for example "
            "--temperature 1,2,4"
        )
