"""What a sweep is made of, and what of it is refused before anything is loaded."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import UsageError
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.standard_errors import needed
from kdcache.stages.sweep_choice import Mean, Scored, Verdict, mean_of, paired, said
from kdcache.stages.sweep_command import distill_command
from kdcache.stages.sweep_grid import Setting, runs_of, settings_of, with_labelled_rows_alone
from kdcache.stages.sweep_options import SweepOptions, check_lists, check_values, command_record, from_command
from kdcache.stages.sweep_table import described, report_lines
from kdcache_cli.distill import command as distill_cli

BASE = DistillOptions(student="mlp:64-10", data="digits:train", val="digits:test", cache=("t.h5",), out="sweep")


def asked(base: DistillOptions = BASE, **values: Any) -> SweepOptions:
    own = {name: values.pop(name) for name in ("random", "random_seed", "labels_budget") if name in values}
    return SweepOptions(base, values, **own)


def told(**given: Any) -> SweepOptions:
    """As the command line gives it."""
    import dataclasses

    defaults = {field.name: field.default for field in dataclasses.fields(command_record())}
    return from_command(**{**defaults, "val": "digits:test", "out": "sweep", **given})


def test_a_grid_has_every_combination_once_and_alpha_0_with_all_seeds() -> None:
    sweep = asked(alpha=(0.5, 0.9), temperature=(1.0, 4.0), lr=(0.1, 0.2), seed=(0, 1, 2))
    settings = settings_of(sweep)
    taught = [
        (one.options.alpha, one.options.temperature, one.options.lr) for one in settings if not one.is_labels_only
    ]
    assert sorted(taught) == sorted({(a, t, lr) for a in (0.5, 0.9) for t in (1.0, 4.0) for lr in (0.1, 0.2)})
    alone = [(one.options.lr, one.options.label_smoothing) for one in settings if one.is_labels_only]
    assert alone == [(0.1, 0), (0.2, 0), (0.1, 0.1), (0.2, 0.1), (0.4, 0), (0.05, 0), (0.1, 0.05), (0.2, 0.05)]
    runs = runs_of(settings, sweep)
    assert len(runs) == 3 * 16 == len({run.name for run in runs})
    assert set(Counter(id(run.setting) for run in runs).values()) == {3}


def test_alpha_0_is_tuned_once_though_it_is_listed_and_leaves_the_teacher_out() -> None:
    base = DistillOptions(**{**vars(BASE), "disagreement": "drop", "alpha_schedule": "linear:0.1"})
    settings = settings_of(asked(base, alpha=(0.0, 0.5, 0.9), labels_budget="same-values"))
    [alone] = [one for one in settings if one.is_labels_only]
    assert (alone.options.disagreement, alone.options.alpha_schedule) == ("keep", "constant")
    # Where every row has a label, it is the plain run that `distill --alpha 0` is; of a list the user gave it is not.
    assert (alone.options.label_fraction, alone.options.unlabelled) == (None, None)
    assert alone.options.loss == ()
    [alone] = [one for one in with_labelled_rows_alone(settings) if one.is_labels_only]
    assert (alone.options.label_fraction, alone.options.unlabelled) == (1.0, "drop")
    told = settings_of(asked(base, label_fraction=(1.0,), seed=(0, 1), labels_budget="same-values"))
    assert [one.options.unlabelled for one in told if one.is_labels_only] == ["drop"]
    assert with_labelled_rows_alone(told) == told


def test_fractions_come_with_and_without_the_unlabelled_rest() -> None:
    settings = settings_of(asked(alpha=(0.5,), label_fraction=(0.1, 1.0)))
    found = [(one.fraction, one.options.alpha, one.options.unlabelled) for one in settings]
    expected = [(0.1, 0.0, "drop"), (0.1, 0.5, "keep"), (0.1, 0.5, "drop"), (1.0, 0.0, "drop"), (1.0, 0.5, "keep")]
    assert Counter(found) == Counter([*expected, (0.1, 0.0, "drop")])  # as many as with and without the rest
    only = settings_of(asked(DistillOptions(**{**vars(BASE), "unlabelled": "drop"}), label_fraction=(0.1, 0.2)))
    assert {one.options.unlabelled for one in only} == {"drop"}


def labels_of(found: list[Setting]) -> Counter[tuple[Any, ...]]:
    return Counter(
        (one.fraction, one.options.lr, one.options.weight_decay, one.options.label_smoothing)
        for one in found
        if one.is_labels_only
    )


@given(
    alpha=st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), min_size=1, max_size=5, unique=True),
    temperature=st.lists(st.sampled_from([1.0, 2.0, 4.0, 8.0]), min_size=1, max_size=4, unique=True),
    lr=st.lists(st.sampled_from([0.05, 0.1, 0.2]), max_size=3, unique=True),
    label_smoothing=st.lists(st.sampled_from([0.0, 0.05, 0.1]), max_size=2, unique=True),
    label_fraction=st.lists(st.sampled_from([0.1, 1.0]), max_size=2, unique=True),
    random=st.none() | st.integers(1, 9),
)
def test_the_labels_alone_get_as_many_settings_as_the_teacher(random: int | None, **lists: list[float]) -> None:
    sweep = asked(random=random, **{name: tuple(values) for name, values in lists.items() if values})
    settings = settings_of(sweep)
    alone, taught = labels_of(settings), [one for one in settings if not one.is_labels_only]
    assert set(alone.values()) == {1}
    assert Counter(fraction for fraction, *_ in alone) == Counter(one.fraction for one in taught)
    values = {(one.fraction, one.options.lr, one.options.weight_decay, one.options.label_smoothing) for one in taught}
    assert values <= set(alone)
    assert all(0 < one.options.lr < 1 and one.options.label_smoothing <= 0.3 for one in settings if one.options.lr)
    shared = labels_of(settings_of(replace(sweep, labels_budget="same-values")))
    every = [math.prod(len(lists[name]) or 1 for name in ("lr", "label_smoothing", "label_fraction"))]
    assert [len(shared)] == every
    assert random is not None or set(shared) <= set(alone)


def test_a_loss_without_a_temperature_has_one_setting_and_a_random_sweep_part_of_the_grid() -> None:
    losses = asked(temperature=(1.0, 4.0), loss=(("dist",), ("kl",), ("dist", "kl*0.5")))
    found = [(one.options.loss, one.options.temperature) for one in settings_of(losses) if not one.is_labels_only]
    assert sorted(found) == [
        (("dist",), 1.0),
        (("dist", "kl*0.5"), 1.0),
        (("dist", "kl*0.5"), 4.0),
        (("kl",), 1.0),
        (("kl",), 4.0),
    ]
    lists: dict[str, Any] = {"alpha": (0.1, 0.5, 0.9), "temperature": (1.0, 2.0, 4.0)}
    drawn = [settings_of(asked(**lists, random=4, random_seed=seed)) for seed in (0, 0, 1)]
    texts = [[one.text for one in settings if not one.is_labels_only] for settings in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 4
    whole = {one.text for one in settings_of(asked(**lists))}
    assert set(texts[0]) | set(texts[2]) <= whole


def test_the_command_line_takes_lists_and_losses_with_commas() -> None:
    found = told(alpha="0,0.5", seed="0,1", loss=("kl", "dkd:alpha=1,beta=2", "kl; js:beta=0.1*0.5"), temperature="2")
    assert found.values["alpha"] == (0.0, 0.5)
    assert found.values["seed"] == (0, 1)
    assert found.values["loss"] == (("kl",), ("dkd:alpha=1,beta=2",), ("kl", "js:beta=0.1*0.5"))
    assert not settings_of(found)[0].options.resume
    check_values(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": "0.5,0.50"}, "--alpha names 0.5 twice"),
        ({"loss": ("kl", "kl")}, "--loss names kl twice"),
        ({"seed": "0,1.5"}, "--seed '0,1.5': expected numbers"),
        ({"alpha": "0.5,"}, "expected numbers"),
        ({"alpha": "0.5,0.9", "val": None}, "no --val"),
        ({"alpha": "0.5,0.9", "out": None}, "no --out"),
        ({"alpha": "0.5,0.9", "processes": 0}, "--processes must be at least 1"),
        ({"alpha": "0.5,0.9", "labels_budget": "more"}, "choose one of equal, same-values"),
        ({"alpha": "0.5,0.9", "random": 0}, "--random must be at least 1"),
    ],
)
def test_what_cannot_be_swept_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_values(told(**given))


@pytest.mark.parametrize("given", [{}, {"alpha": "0.5"}, {"loss": ("kl",), "seed": "3"}])
def test_a_sweep_over_nothing_is_refused_after_its_options(given: dict[str, Any]) -> None:
    options = told(**given)
    check_values(options)
    settings_of(options)
    with pytest.raises(UsageError, match="nothing to sweep over"):
        check_lists(options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": (0.5, 1.5)}, r"the setting --alpha 1.5: --alpha must be between 0 and 1"),
        ({"temperature": (1.0, 0.0)}, r"the setting --alpha 0.9 --temperature 0: --temperature must be above 0"),
        ({"loss": (("kl",), ("kd",))}, "choose one of kl"),
        ({"label_fraction": (0.1, 0.0)}, r"--label-fraction 0.*must be above 0"),
        ({"seed": (0, -1)}, r"the setting --seed -1: --seed must be at least 0 and below 2\*\*63, found -1"),
        ({"alpha": (0.0,), "seed": (0, 1)}, "--alpha 0 alone"),
    ],
)
def test_a_value_that_distill_refuses_is_refused_with_its_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_of(asked(**values))


@given(
    alpha=st.floats(0, 1),
    lr=st.floats(1e-9, 1e3) | st.none(),
    loss=st.lists(st.sampled_from(["kl", "dkd:beta=2", "js:beta=0.1*0.5"]), max_size=2),
    cache=st.lists(st.text("ab c'\"$=", min_size=1), max_size=2),
    drop_last=st.booleans(),
    clip=st.floats(0.1, 9),
)
def test_a_printed_command_gives_the_same_options(
    alpha: float, lr: float | None, loss: list[str], cache: list[str], drop_last: bool, clip: float
) -> None:
    import shlex

    paths = tuple("./" + path for path in cache)
    options = DistillOptions(
        data="digits:train", alpha=alpha, lr=lr, loss=tuple(loss), cache=paths, drop_last=drop_last, clip_norm=clip
    )
    words = shlex.split(distill_command(options))
    context = distill_cli.make_context("distill", words[2:])
    given = {name: value for name, value in context.params.items() if name not in ("config_file", "print_config")}
    given.pop("as_json")
    assert DistillOptions(**given) == options


def test_differences_are_paired_and_named_by_their_standard_error() -> None:
    assert paired({0: 0.9, 1: 0.7}, {0: 0.8, 1: 0.4}) == Mean(0.2, 0.1, 2)
    assert paired({0: 0.9}, {1: 0.9}) is None
    assert mean_of([0.5]).standard_error is None
    cases = {
        "beats": Mean(0.44, 0.1, 3),
        "loses to": Mean(-0.44, 0.1, 3),
        "cannot be told from": Mean(0.42, 0.1, 3),
        "cannot be compared with": Mean(0.2, None, 1),
    }
    assert {text: said(mean) for text, mean in cases.items()} == {text: text for text in cases}
    assert said(None) == "cannot be compared with"
    assert said(Mean(0.0, 0.0, 3)) == "cannot be told from"
    # Two seeds have one degree of freedom: equal settings are 2 standard errors apart in 30 of 100 sweeps.
    assert (said(Mean(0.9, 0.1, 2)), said(Mean(1.3, 0.1, 2))) == ("cannot be told from", "beats")


@pytest.mark.parametrize("seeds", [*range(2, 16), 31, 101, 10_001])
def test_equal_settings_are_told_apart_once_in_20_times(seeds: int) -> None:
    freedom = seeds - 1
    # With t = sqrt(freedom) * tan(angle), the density of Student's t becomes cos(angle) ** (freedom - 1).
    angles = np.linspace(0, np.pi / 2, 2_000_001)
    density = np.cos(angles) ** (freedom - 1)
    inside = density[angles <= math.atan(needed(seeds) / math.sqrt(freedom))].sum() / density.sum()
    assert inside == pytest.approx(0.95, abs=1e-4)


def verdict_of(settings: list[Setting], **values: tuple[float, ...]) -> Verdict:
    """What was reached by seed: with the teacher, without it, and with the teacher but not the unlabelled rest."""

    def one(name: str, is_alone: bool, unlabelled: str | None) -> Scored | None:
        found = (s for s in settings if s.is_labels_only == is_alone and s.options.unlabelled == unlabelled)
        return Scored(next(found), dict(enumerate(values[name]))) if name in values else None

    fraction = settings[0].fraction
    rest = None if fraction is None else "keep"
    best, labels = one("best", False, rest), one("labels", True, None if fraction is None else "drop")
    return Verdict(fraction, labels, best, best if fraction is not None else None, one("drop", False, "drop"))


def lines_of(*chosen: Verdict) -> str:
    found = [one for verdict in chosen for one in verdict.chosen]
    return "\n".join(report_lines(found, chosen, {}, metric="val_accuracy", out="s/", failures=()))


def test_a_command_names_what_is_swept_and_has_a_folder_of_its_own() -> None:
    default = DistillOptions()
    settings = settings_of(asked(alpha=(default.alpha, 0.9), temperature=(default.temperature, 9.0), seed=(0, 1)))
    answer = described(verdict_of(settings, best=(0.8, 0.9), labels=(0.7, 0.7)), {}, out="s")
    assert f"--alpha {default.alpha:g} --temperature {default.temperature:g}" in answer["best"]["command"]
    assert answer["best"]["command"].split(" --out ")[1].startswith("s/best --")
    assert "--seed 0" in answer["best"]["command"]
    assert answer["labels_only"]["command"].split(" --out ")[1].startswith("s/best-labels --")
    assert "--temperature" not in answer["labels_only"]["command"]
    assert answer["standard_errors_needed"] == 12.706
    few = settings_of(asked(alpha=(0.5,), label_fraction=(0.05, 1.0)))
    parts = [[one for one in few if one.fraction == fraction] for fraction in (0.05, 1.0)]
    first = verdict_of(parts[0], best=(0.8, 0.8), labels=(0.9, 0.9), drop=(0.7, 0.7))
    second = verdict_of(parts[1], best=(0.8, 0.8), labels=(0.9, 0.9))
    folders = [word for word in lines_of(first, second).split() if word.startswith("s/")]
    assert folders == ["s/best-0.05", "s/best-labels-0.05", "s/best-1", "s/best-labels-1"]
    told = described(first, {}, out="s")
    assert told["keep"]["command"] == told["best"]["command"]
    assert told["drop"]["command"].split(" --out ")[1].startswith("s/best-drop-0.05 --")


@pytest.mark.parametrize(
    ("labels", "expected", "last"),
    [
        ((0.7, 0.61), "it beats alpha 0 on --val: +0.1450 (0.0050) over 2 paired seeds", None),
        ((0.9, 0.814), "it loses to alpha 0 on --val: -0.0570 (0.0030) over 2 paired seeds", "alpha 0 is better:"),
        (
            (0.9, 0.8),
            "it cannot be told from alpha 0 on --val: -0.0500 (0.0100) over 2 paired seeds",
            "alpha 0 has the higher mean, and needs no teacher:",
        ),
        (
            (0.9,),
            "whether it beats alpha 0 on --val (-0.0600) cannot be said of one seed",
            "alpha 0 has the higher mean, and needs no teacher:",
        ),
    ],
)
def test_the_verdict_is_a_sentence_that_what_follows_does_not_contradict(
    labels: tuple[float, ...], expected: str, last: str | None
) -> None:
    best = (0.84, 0.76)[: len(labels)]
    settings = settings_of(asked(alpha=(0.5, 0.9)))
    text = lines_of(verdict_of(settings, best=best, labels=labels))
    assert expected in text
    assert "1 paired" not in text
    assert ("alpha 0 is better" in text, "needs no teacher" in text) == (
        last == "alpha 0 is better:",
        last is not None and "needs" in last,
    )
    assert text.count("kdcache distill") == (2 if last else 1)
