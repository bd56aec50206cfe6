"""The figures of a report as SVG in `data:` URIs, legible on a light and on a dark page.

matplotlib draws with placeholder colours; each becomes a CSS variable of the image's own, which has two values. Only
numbers and texts of ours are drawn: names of classes, runs and samples come from others, and matplotlib takes `$` for
mathematics and warns of letters that its font lacks. Letters are paths, so that no font is asked for; nothing in a
figure depends on the day or the machine.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kdcache.errors import MissingExtraError

# Placeholder -> light, dark. Series colours are those of Okabe and Ito, which most colour-blind eyes tell apart.
_COLOURS = {
    "#010101": ("#1f2328", "#e6e8eb"),  # ink
    "#020202": ("#d4d8dd", "#3a4149"),  # grid
    "#030303": ("#0072b2", "#56b4e9"),
    "#040404": ("#d55e00", "#ff9d5c"),
    "#050505": ("#009e73", "#3ccfa4"),
    "#060606": ("#b0508a", "#e08fc0"),
    "#070707": ("#8a6d00", "#f0c84b"),
    "#080808": ("#5b5bd6", "#a5a5ff"),
    "#090909": ("#7a4a2b", "#d9a57f"),
    "#0a0a0a": ("#6b7280", "#a8b0ba"),  # faint ink
}
_INK, _GRID, *SERIES, _FAINT = _COLOURS
MAX_SERIES = len(SERIES)
_NARROW, _WIDE = (3.7, 3.0), (8.4, 3.1)  # inches
_MOST = 1e12  # a number above it is no loss that a picture could show
_STYLE = {
    "svg.fonttype": "path",
    "svg.hashsalt": "kdcache",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
}


def check_matplotlib() -> None:
    """Refuses early.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", extra="report", what="an HTML report") from error


def reliability(series: Sequence[tuple[str, Sequence[Mapping[str, float]]]]) -> str:
    """Accuracy over mean confidence of the bins that have rows; one series as bars with what is missing to it."""
    with _drawing(*_NARROW) as drawing:
        axes = drawing.axes[0]
        axes.plot([0, 1], [0, 1], color=_FAINT, linestyle="--", linewidth=1, label="calibrated")
        for place, (name, bins) in enumerate(series):
            filled, colour = [one for one in bins if one["rows"]], SERIES[place % MAX_SERIES]
            sure, right = [one["confidence"] for one in filled], [one["accuracy"] for one in filled]
            if len(series) == 1:
                widths = [one["high"] - one["low"] for one in filled]
                middles = [(one["high"] + one["low"]) / 2 for one in filled]
                axes.bar(middles, right, width=widths, color=colour, edgecolor=_GRID, linewidth=0.5, alpha=0.75)
                axes.plot(sure, right, "o", color=SERIES[1], markersize=3.5, label="mean confidence of a bin")
            else:
                axes.plot(sure, right, "o-", color=colour, markersize=3.5, label=name)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        axes.figure.legend(loc="outside upper center", ncols=2 if len(series) == 1 else 3)
    return drawing.uri


def histogram(edges: Sequence[float], counts: Sequence[float], *, xlabel: str, ylabel: str = "rows") -> str:
    """Counts between edges."""
    with _drawing(*_NARROW) as drawing:
        axes = drawing.axes[0]
        axes.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.8)
        axes.locator_params(nbins=6)
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None if any(counts) else 1))
    return drawing.uri


def softness(rows: Sequence[Mapping[str, float | None]]) -> str:
    """Entropy, and probability outside the label and the top class, over the temperature."""
    with _drawing(*_WIDE, columns=2) as drawing:
        first, second = drawing.axes
        at = range(len(rows))
        for axes in drawing.axes:
            axes.set_xticks(list(at), [f"{row['temperature']:g}" for row in rows])
            axes.set_xlabel("temperature")
        for axes, key, name, colour in (
            (first, "entropy", None, SERIES[0]),
            (second, "outside_label", "outside the label", SERIES[0]),
            (second, "outside_top", "outside the top class", SERIES[1]),
        ):
            points = [(place, row[key]) for place, row in zip(at, rows, strict=True) if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        first.set(ylabel="mean entropy (nats)", ylim=(0, None))
        second.set(ylabel="mean probability", ylim=(0, 1))
        second.legend()
    return drawing.uri


def curves(series: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], *, score: str) -> str:
    """Learning curves of settings, runs of one setting in one colour: the training loss, and a metric on held-out rows.

    Args:
        series: name and `curves` of an entry of the students.
        score: of the evaluations: `val_accuracy` or `agreement`.
    """
    with _drawing(*_WIDE, columns=2) as drawing:
        first, second = drawing.axes
        for place, (name, runs) in enumerate(series):
            colour = SERIES[place % MAX_SERIES]
            for number, run in enumerate(runs):
                label = name if number == 0 else None
                for axes, lines, key in ((first, run["train"], "loss"), (second, run["evaluations"], score)):
                    points = [(line["step"], line[key]) for line in lines if abs(line.get(key, _MOST)) < _MOST]
                    if points:
                        marker = "o" if len(points) < 3 else ""
                        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, alpha=0.85)
        first.set(xlabel="step", ylabel="training loss (nats)")
        name = {"val_accuracy": "accuracy", "agreement": "agreement with the teacher"}[score]
        second.set(xlabel="step", ylabel=f"{name} on held-out rows")
        handles, names = max((axes.get_legend_handles_labels() for axes in drawing.axes), key=lambda one: len(one[0]))
        if handles:
            first.figure.legend(handles, names, loc="outside upper center", ncols=MAX_SERIES)
    return drawing.uri


class _Drawing:
    """A figure in the making; `uri` when it is done."""

    def __init__(self, figure: Any, axes: list[Any]) -> None:
        self.axes = axes
        self.uri = ""
        self._figure = figure

    def finish(self) -> None:
        buffer = io.BytesIO()
        self._figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        self.uri = svg_uri(buffer.getvalue().decode())


@contextmanager
def _drawing(width: float, height: float, *, columns: int = 1) -> Iterator[_Drawing]:
    """A figure of so many inches."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # its stubs list keys, not texts
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
        drawing = _Drawing(figure, axes)
        yield drawing
        drawing.finish()


def svg_uri(text: str) -> str:
    """An SVG of matplotlib with its placeholder colours as variables, without what names another place, as a URI."""
    text = re.sub(r"<!DOCTYPE[^>]*>|<\?xml[^>]*\?>", "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    names = {colour: f"--c{place}" for place, colour in enumerate(_COLOURS)}
    light, dark = (
        ";".join(f"{names[colour]}:{values[kind]}" for colour, values in _COLOURS.items()) for kind in (0, 1)
    )
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    for colour, name in names.items():
        text = text.replace(f": {colour}", f": var({name})")
    text = re.sub(r"(<svg[^>]*>)", lambda found: found[1] + style, text, count=1)
    return "data:image/svg+xml;base64," + base64.b64encode(text.strip().encode()).decode()
