"""Tables and plots of `quality.py`."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

KEYS = ("1", "2", "4")
TOLERANCE = 0.01  # of the tail's mass, the library's default
Line = dict[str, Any]


def value_of(line: Line, key: str, measure: str = "kl") -> float:
    """A figure at a temperature; infinite where a row says that a class is impossible which is not."""
    found = line[measure][key]
    return math.inf if found is None else max(found, 0.0)


def refused(line: Line, key: str) -> bool:
    """Whether the library would not serve the temperature: it was not stored, and the tail's mass is too open."""
    return bool(line.get("open", {}).get(key, 0) > TOLERANCE)


def beats(one: Line, other: Line, key: str, measure: str = "kl") -> bool:
    """Whether `one` is no larger and no worse, and one of both truly; what is refused beats nothing."""
    sizes, losses = (one["bytes"], other["bytes"]), (value_of(one, key, measure), value_of(other, key, measure))
    if refused(one, key):
        return False
    return sizes[0] <= sizes[1] and losses[0] <= losses[1] and (sizes[0] < sizes[1] or losses[0] < losses[1])


def named(line: Line) -> str:
    return line["format"] + ("" if line["k"] is None else f", K={line['k']}")


def table(lines: list[Line]) -> str:
    """All formats of a head by their bytes."""
    text = [
        "| format | bytes | KL T=1 | T=2 | T=4 | gradient off, T=1 / 2 / 4 | KL share | front at T, KL; gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in sorted(lines, key=lambda line: (line["bytes"], not line["ours"])):
        kl = " | ".join(_shown(value_of(line, key)) + (" ~" if refused(line, key) else "") for key in KEYS)
        gradient = " / ".join(_shown(value_of(line, key, "gradient")) for key in KEYS)
        share = " / ".join(f"{line['share'][key]:.2f}" for key in KEYS) if "share" in line else ""
        fronts = "; ".join(" ".join(_front_at(line, lines, measure)) or "-" for measure in ("kl", "gradient"))
        name = f"**{named(line)}**" if line["ours"] else named(line)
        text.append(f"| {name} | {line['bytes']} | {kl} | {gradient} | {share} | {fronts} |")
    return "\n".join(
        [*text, "", "~ not stored, and refused by default, since the tail's mass is open by more than 0.01"]
    )


def summary(lines: list[Line]) -> str:
    """Which of ours no format of others beats, and what the statistics of `topk` cost at T = 1."""
    ours, others = ([line for line in lines if line["ours"] is side] for side in (True, False))
    text = []
    for measure in ("kl", "gradient"):
        for key in KEYS:
            served = [line for line in ours if not refused(line, key)]
            beaten = []
            for line in served:
                better = [other for other in others if beats(other, line, key, measure)]
                if better:
                    best = min(better, key=lambda other: value_of(other, key, measure))
                    worth = value_of(best, key, measure) / value_of(line, key, measure)
                    beaten.append(f"{named(line)} by {named(best)} ({worth:.2f} of its {measure})")
            text.append(
                f"- {measure}, T={key}: {len(served) - len(beaten)} of {len(served)} of ours are beaten by no other's. "
                f"Beaten: {'; '.join(beaten) or 'none'}"
            )
    smoothed = sorted((line["bytes"], value_of(line, "1")) for line in others if line["format"] == "TinyViT-like")
    for line in ours:
        if line["k"] is None or line["format"] != "topk T=1,2,4" or len(smoothed) < 2:
            continue
        alike = _bytes_at(smoothed, value_of(line, "1"))
        sizes = ", ".join(str(line["bytes"] - 4 * fewer) for fewer in (2, 1, 0))
        text.append(
            f"- K={line['k']}: {sizes} bytes with 1, 2, 3 temperatures; "
            f"its KL at T=1, {_shown(value_of(line, '1'))}, takes TinyViT-like {alike} bytes"
        )
    return "\n".join(text)


def _front_at(line: Line, lines: list[Line], measure: str) -> list[str]:
    """The temperatures at which nothing beats a format."""
    return [key for key in KEYS if not refused(line, key) and not any(beats(o, line, key, measure) for o in lines)]


def _shown(kl: float) -> str:
    return "inf" if math.isinf(kl) else "0" if kl == 0 else f"{kl:.2g}"


def _bytes_at(points: list[tuple[int, float]], kl: float) -> str:
    """Bytes at which a curve reaches a KL, on a line through the logarithms."""
    if kl > points[0][1]:
        return f"fewer than {points[0][0]}"
    for (low, worse), (high, better) in itertools.pairwise(points):
        if worse >= kl >= better:
            share = 0.0 if worse == better else math.log(worse / kl) / math.log(worse / better)
            return f"{low + share * (high - low):.0f}"
    return f"more than {points[-1][0]}"


def students_table(runs: list[Line]) -> str:
    """Accuracy of each arm with its standard error, and its difference to dense float32, paired by seed."""
    text = [
        "| head, T | student told by | bytes | accuracy | minus float32, paired | within 2 s.e. |",
        "|---|---|---|---|---|---|",
    ]
    for head, temperature in sorted({(run["head"], run["temperature"]) for run in runs}):
        here = [run for run in runs if (run["head"], run["temperature"]) == (head, temperature)]
        arms = {arm: {r["seed"]: r["accuracy"] for r in here if r["arm"] == arm} for arm in {r["arm"]: 0 for r in here}}
        for arm, found in arms.items():
            size = next(run["bytes"] for run in here if run["arm"] == arm)
            mean, error = _mean_and_error(list(found.values()))
            base = arms.get("float32", {})
            paired = [found[seed] - base[seed] for seed in found if seed in base]
            by, of = _mean_and_error(paired)
            both = math.hypot(error, _mean_and_error(list(base.values()))[1]) if base else math.nan
            fits = f"{'yes' if abs(by) <= 2 * both else 'no'} ({by / both:+.1f})" if both > 0 else ""
            fits = "" if arm == "float32" else fits
            text.append(
                f"| {head}, T={temperature:g} | {arm} | {size} | {100 * mean:.2f} ± {100 * error:.2f} ({len(found)}) | "
                f"{100 * by:+.2f} ± {100 * of:.2f} | {fits} |"
            )
    return "\n".join(
        [*text, "", "± one standard error over seeds; in brackets the difference in standard errors of it"]
    )


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))


def plot(name: str, lines: list[Line], path: Path, measure: str = "kl") -> None:
    """Bytes against KL or the gradient's error, one panel a temperature; what is infinite lies on the upper edge."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(1, len(KEYS), figsize=(15, 5), sharey=True)
    finite = [value_of(line, key, measure) for line in lines for key in KEYS]
    finite = [value for value in finite if 0 < value < math.inf]
    low, high = min(finite) / 3, max(finite) * 3
    families = {line["format"]: line["ours"] for line in lines}
    colours = plt.get_cmap("tab20")
    largest = max(line["bytes"] for line in lines)
    ticks = [digit * 10**power for power in range(1, 6) for digit in (1, 2, 5) if digit * 10**power <= largest]
    ticks = ticks if len(ticks) < 7 else ticks[::3]
    for panel, key in zip(axes, KEYS, strict=True):
        for index, (family, ours) in enumerate(families.items()):
            found = sorted(
                (line["bytes"], min(max(value_of(line, key, measure), low), high))
                for line in lines
                if line["format"] == family and not refused(line, key)
            )
            style = ("o-" if ours else "x--") if len(found) > 1 else ("o" if ours else "x")
            sizes, values = [size for size, _ in found], [value for _, value in found]
            panel.plot(sizes, values, style, color=colours(index % 20), label=family, markersize=6)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{name}, T = {key}")
        panel.set_xlabel("payload, bytes a row")
        panel.grid(alpha=0.3)
    what = "mean KL(teacher || row), nats" if measure == "kl" else "gradient's error, half the sum of magnitudes"
    axes[0].set_ylabel(f"{what}\n(upper edge: infinite, lower: 0)")
    axes[-1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left", title="o ours, x others")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
