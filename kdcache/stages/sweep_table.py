"""What a sweep says: the table of settings, heat maps as text, and when distilling beats the labels alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.stages.standard_errors import needed
from kdcache.stages.sweep_choice import Mean, Scored, Verdict, paired, said
from kdcache.stages.sweep_command import distill_command, text_of
from kdcache.stages.sweep_grid import Run

_SHOWN = 20


@dataclass(frozen=True)
class HeatMap:
    """Mean of the metric over alpha (rows) and temperature (columns): the best of all other options.

    Attributes:
        fraction: of the labels, None where the sweep has none.
        alphas: ascending; 0 is the same at every temperature.
        temperatures: ascending.
        cells: (alphas, temperatures), None where no setting finished.
    """

    fraction: float | None
    alphas: tuple[float, ...]
    temperatures: tuple[float, ...]
    cells: tuple[tuple[float | None, ...], ...]


def sides_line(runs: Sequence[Run], *, steps: int) -> str:
    """How many runs there are to come, and of what."""
    settings = {id(run.setting): run.setting for run in runs}.values()
    alone = sum(one.is_labels_only for one in settings)
    seeds = len({run.seed for run in runs})
    return (
        f"{len(runs):,} runs of {steps:,} steps: {len(settings) - alone:,} settings with the teacher, {alone:,} of the "
        f"labels alone, each with {seeds} seed{'s' * (seeds > 1)}"
    )


def heat_maps(found: Sequence[Scored]) -> list[HeatMap]:
    """One for each fraction; none where the losses have no temperature."""
    maps = []
    for fraction in dict.fromkeys(one.setting.fraction for one in found):
        same = [one for one in found if one.setting.fraction == fraction]
        warm = [one for one in same if one.setting.follows_temperature]
        temperatures = tuple(sorted({one.setting.options.temperature for one in warm}))
        shown = warm + [one for one in same if one.setting.is_labels_only]
        alphas = tuple(sorted({one.setting.options.alpha for one in shown}))
        cells = tuple(tuple(_cell(shown, alpha, temperature) for temperature in temperatures) for alpha in alphas)
        if temperatures:
            maps.append(HeatMap(fraction, alphas, temperatures, cells))
    return maps


def _cell(found: Sequence[Scored], alpha: float, temperature: float) -> float | None:
    means = [
        one.mean.mean
        for one in found
        if one.setting.options.alpha == alpha
        and (one.setting.is_labels_only or one.setting.options.temperature == temperature)
    ]
    return max(means, default=None)


def write_heat_map(path: Path, maps: Sequence[HeatMap], *, metric: str) -> bool:
    """Draws the maps side by side; False without matplotlib (extra `report`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(1.6 + 3.2 * len(maps), 3.4), layout="constrained")
    every = [cell for one in maps for line in one.cells for cell in line if cell is not None]
    for at, one in enumerate(maps):
        axes = figure.add_subplot(1, len(maps), at + 1)
        cells = [[float("nan") if cell is None else cell for cell in line] for line in one.cells]
        image = axes.imshow(cells, vmin=min(every), vmax=max(every), aspect="auto", origin="lower", cmap="viridis")
        axes.set_xticks(range(len(one.temperatures)), [f"{value:g}" for value in one.temperatures])
        axes.set_yticks(range(len(one.alphas)), [f"{value:g}" for value in one.alphas])
        axes.set_xlabel("temperature")
        axes.set_ylabel("alpha" if at == 0 else "")
        axes.set_title(metric if one.fraction is None else f"{one.fraction:.3g} of the labels", fontsize=10)
        middle = (min(every) + max(every)) / 2
        for y, line in enumerate(one.cells):
            for x, cell in enumerate(line):
                if cell is not None:
                    color = "white" if cell < middle else "black"
                    axes.text(x, y, f"{cell:.3f}", ha="center", va="center", color=color, fontsize=8)
        if at == len(maps) - 1:
            figure.colorbar(image, ax=axes, label=metric)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return True


def described(verdict: Verdict, tests: Mapping[Scored, Mapping[int, float]], *, out: str) -> dict[str, Any]:
    """A verdict for `--json`."""

    def one(scored: Scored | None) -> dict[str, Any] | None:
        if scored is None:
            return None
        told = {**scored.setting.changed, **scored.mean.describe(), "values": dict(scored.values)}
        told["command"] = _command(verdict, scored, out)
        if scored in tests:
            told["test"] = Scored(scored.setting, tests[scored]).mean.describe()
        return told

    difference = difference_of(verdict.best, verdict.labels, {})
    on_test = difference_of(verdict.best, verdict.labels, tests) if tests else None
    return {
        "label_fraction": verdict.fraction,
        "best": one(verdict.best),
        "labels_only": one(verdict.labels),
        "keep": one(verdict.keep),
        "drop": one(verdict.drop),
        "difference": None if difference is None else difference.describe(),
        "verdict": said(difference),
        "standard_errors_needed": None if difference is None else _needed(difference),
        "test_difference": None if on_test is None else on_test.describe(),
        "test_verdict": None if on_test is None else said(on_test),
    }


def difference_of(
    first: Scored | None, second: Scored | None, tests: Mapping[Scored, Mapping[int, float]]
) -> Mean | None:
    """Paired over the seeds, on the test set where both were measured there."""
    if first is None or second is None:
        return None
    return paired(tests.get(first, first.values), tests.get(second, second.values))


def _command(verdict: Verdict, scored: Scored, out: str) -> str:
    """Repeats the first seed, with the swept options named, in a folder that no other command of the sweep has."""
    words = ["best"]
    if scored is not verdict.best:
        words.append("labels" if scored is verdict.labels else str(scored.setting.options.unlabelled))
    if verdict.fraction is not None:
        words.append(text_of(verdict.fraction))
    options = replace(scored.setting.options, seed=min(scored.values), out=f"{out.rstrip('/')}/{'-'.join(words)}")
    return distill_command(options, named={*scored.setting.changed, "seed"})


def report_lines(
    found: Sequence[Scored],
    chosen: Sequence[Verdict],
    tests: Mapping[Scored, Mapping[int, float]],
    *,
    metric: str,
    out: str,
    failures: Sequence[str],
) -> list[str]:
    """All of it for people; `failures` are lines about the runs that failed."""
    best_first = sorted(found, key=lambda one: -one.mean.mean)
    lines = [f"{metric} on --val, mean over seeds (standard error):"]
    lines += [f"  {_text(one.mean)}  {one.setting.text}" for one in best_first[:_SHOWN]]
    lines += [f"  ... {len(found) - _SHOWN} more in sweep.csv"] if len(found) > _SHOWN else []
    lines += [f"  {line}" for line in failures]
    for one in heat_maps(found):
        lines += ["", *_map_lines(one, metric)]
    if any(verdict.fraction is not None for verdict in chosen):
        lines += ["", *fraction_lines(chosen, tests, metric=metric)]
    for verdict in chosen:
        lines += ["", *_verdict_lines(verdict, tests, out=out)]
    return lines


def fraction_lines(chosen: Sequence[Verdict], tests: Mapping[Scored, Mapping[int, float]], *, metric: str) -> list[str]:
    """The table that says at which share of the labels distilling pays."""
    where = "the test set" if tests else "--val"
    lines = [
        f"{metric} on {where}, mean over seeds (standard error):",
        "| labels | labels alone | distilled, without the rest | distilled, with the rest | best - labels alone |",
        "|---|---|---|---|---|",
    ]
    for verdict in chosen:
        cells = [
            "-" if one is None else _text(Scored(one.setting, tests.get(one, one.values)).mean)
            for one in (verdict.labels, verdict.drop, verdict.keep)
        ]
        difference = difference_of(verdict.best, verdict.labels, tests)
        cells.append("-" if difference is None else _text(difference, sign="+"))
        lines.append(f"| {verdict.fraction:g} | " + " | ".join(cells) + " |")
    return lines


def _map_lines(one: HeatMap, metric: str) -> list[str]:
    of = "" if one.fraction is None else f", {one.fraction:g} of the labels"
    lines = [f"{metric}{of}; alpha down, temperature across:"]
    lines.append("  " + f"{'':>6}" + "".join(f"{temperature:>8g}" for temperature in one.temperatures))
    for alpha, cells in zip(one.alphas, one.cells, strict=True):
        shown = "".join(f"{'-' if cell is None else f'{cell:.4f}':>8}" for cell in cells)
        lines.append(f"  {alpha:>6g}{shown}")
    return lines


def _verdict_lines(verdict: Verdict, tests: Mapping[Scored, Mapping[int, float]], *, out: str) -> list[str]:
    of = "" if verdict.fraction is None else f" with {verdict.fraction:g} of the labels"
    if verdict.best is None:
        return [f"nothing to choose{of}: runs of every setting failed"]
    if verdict.labels is None:
        return [
            f"best setting{of}: {_text(verdict.best.mean)}; no alpha 0 to compare with: no labels, or its runs failed",
            "  " + _command(verdict, verdict.best, out),
        ]
    difference = difference_of(verdict.best, verdict.labels, {})
    assert difference is not None
    lines = [
        f"best setting{of}: {_text(verdict.best.mean)}, alpha 0: {_text(verdict.labels.mean)}; "
        + _compared(difference, "--val")
    ]
    if verdict.best in tests and verdict.labels in tests:
        difference = difference_of(verdict.best, verdict.labels, tests)
        assert difference is not None
        both = [_text(Scored(one.setting, tests[one]).mean) for one in (verdict.best, verdict.labels)]
        lines.append(f"on the test set: {both[0]}, alpha 0: {both[1]}; {_compared(difference, 'these rows')}")
    lines.append("  " + _command(verdict, verdict.best, out))
    if difference.mean < 0:
        is_told = said(difference) == "loses to"
        lines.append("alpha 0 is better:" if is_told else "alpha 0 has the higher mean, and needs no teacher:")
        lines.append("  " + _command(verdict, verdict.labels, out))
    return lines


def _compared(difference: Mean, where: str) -> str:
    """A paired difference as a sentence."""
    count = _needed(difference)
    if count is None:
        return (
            f"whether it beats alpha 0 on {where} ({difference.mean:+.4f}) cannot be said of one seed: give several, "
            "as in --seed 0,1,2"
        )
    return (
        f"it {said(difference)} alpha 0 on {where}: {_text(difference, sign='+')} over {difference.seeds} paired "
        f"seeds, with which only a difference beyond {count:.1f} standard errors counts"
    )


def _needed(difference: Mean) -> float | None:
    return None if difference.standard_error is None else round(needed(difference.seeds), 3)


def _text(mean: Mean, *, sign: str = "") -> str:
    error = "-" if mean.standard_error is None else f"{mean.standard_error:.4f}"
    return f"{mean.mean:{sign}.4f} ({error})"
