"""What the page of a report shows, made from the report's JSON: tables of classes, bars, figures with captions.

Of up to 40 classes all are listed; of more, the 20 worst, the 20 best and a histogram.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdcache.errors import printable
from kdcache.stages import report_html_figures as figures

SHOWN_CLASSES = 40
LONGEST = 80
SHOWN_STUDENTS = figures.MAX_SERIES
SHOWN_GAINS = 6
_GAIN_BINS, _ACCURACY_BINS = 30, 20


def shown(value: Any, longest: int = LONGEST) -> str:
    """Text of others as a page may show it: one line, control characters as escapes, long ones cut in the middle.

    >>> shown("a" + chr(27) + "[2J" + "b" * 100, 20)
    'a\\\\x1b[2Jb...bbbbbbbb'
    """
    text = printable(str(value)[: 4 * longest + 4])
    if len(str(value)) > 4 * longest + 4 or len(text) > longest:
        kept = longest - 3
        return f"{text[: (kept + 1) // 2]}...{text[-(kept // 2) :]}"
    return text


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; a dash for none.

    >>> number(0.123456), number(1234567.0), number(None)
    ('0.123', '1,230,000', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}e}"
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent; a dash for none.

    >>> percent(0.98765), percent(None)
    ('98.8 %', '–')
    """
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def mean(value: Mapping[str, Any] | None, *, as_percent: bool = False) -> str:
    """A mean over seeds with its standard error."""
    if value is None:
        return "–"
    if as_percent:
        text = percent(value["mean"], 2)
        return text if value["standard_error"] is None else f"{text[:-2]} ± {100 * value['standard_error']:.2f} %"
    text = number(value["mean"])
    return text if value["standard_error"] is None else f"{text} ± {number(value['standard_error'], 2)}"


def class_name(place: Any, names: Sequence[str] | None) -> str:
    """The class's number, with its name where there is one."""
    if type(place) is not int or names is None or not 0 <= place < len(names):
        return str(place)
    return f"{place} {shown(names[place], 40)}" if names[place] != str(place) else str(place)


def encoding_text(encoding: Mapping[str, Any]) -> str:
    """An encoding as its name and its settings.

    >>> encoding_text({"name": "dense", "dtype": "float16", "shape": [10]})
    'dense, dtype float16'
    """
    settings = [f"{key} {value}" for key, value in encoding.items() if key not in ("name", "shape")]
    return ", ".join([str(encoding.get("name")), *settings])


def class_table(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Titled lists of classes that have a number under `key`: all, or the worst and the best."""
    known = [row for row in rows if row.get(key) is not None]
    if len(known) <= SHOWN_CLASSES:
        return [("", known)] if known else []
    ordered = sorted(known, key=lambda row: row[key])
    half = SHOWN_CLASSES // 2
    return [(f"The {half} lowest of {len(known)}", ordered[:half]), (f"The {half} highest", ordered[-half:][::-1])]


class Figures:
    """Numbers the figures of a page in the order in which they are asked for."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, uri: str, caption: str, *, wide: bool = False) -> dict[str, Any]:
        """A figure for the template."""
        self._count += 1
        return {"uri": uri, "number": self._count, "caption": caption, "wide": wide}


def teacher_figures(teacher: Mapping[str, Any], numbered: Figures) -> list[dict[str, Any]]:
    """Those of the teacher's section, as far as there are numbers."""
    found = []
    if teacher.get("reliability"):
        caption = (
            "Reliability of the teacher: share of rows that are right over its confidence, in bins of equal width. "
            "Below the dashed line it is over-confident."
        )
        found.append(numbered(figures.reliability([("teacher", teacher["reliability"])]), caption))
    for key, xlabel, caption in (
        ("confidence_histogram", "confidence", "The teacher's confidence: its largest probability, rows in each bin."),
        ("entropy_histogram", "entropy (nats)", "Entropy of the teacher's probabilities at temperature 1, in nats."),
    ):
        if teacher.get(key):
            uri = figures.histogram(teacher[key]["edges"], teacher[key]["counts"], xlabel=xlabel)
            found.append(numbered(uri, caption))
    if teacher.get("softness"):
        caption = (
            "How soft the targets are: mean entropy in nats, and mean probability that is not on the label or on the "
            "top class, at each temperature. What lies outside is what a student learns beyond labels."
        )
        found.append(numbered(figures.softness(teacher["softness"]), caption, wide=True))
    classes = [row["accuracy"] for row in teacher.get("classes") or [] if row.get("accuracy") is not None]
    if len(classes) > SHOWN_CLASSES:
        counts, edges = np.histogram(classes, bins=_ACCURACY_BINS, range=(0, 1))
        uri = figures.histogram(edges.tolist(), counts.tolist(), xlabel="accuracy of a class", ylabel="classes")
        found.append(numbered(uri, f"Accuracy of the teacher by class: {len(classes)} classes."))
    return found


def data_figures(data: Mapping[str, Any], numbered: Figures) -> list[dict[str, Any]]:
    """Those of the data's section."""
    energy = (data.get("domain") or {}).get("energy_histogram")
    if not energy:
        return []
    uri = figures.histogram(energy["edges"], energy["counts"], xlabel="energy (-log sum exp of the logits, nats)")
    caption = "Energy of the rows: those far from the others are unlike them, and may be unlike all that it knows."
    return [numbered(uri, caption)]


def student_figures(students: Sequence[Mapping[str, Any]], numbered: Figures) -> list[dict[str, Any]]:
    """Learning curves and reliability of the first settings."""
    first = list(students[:SHOWN_STUDENTS])
    named = [(f"student {place}", entry) for place, entry in enumerate(first, start=1)]
    found = []
    lines = [line for entry in first for run in entry["curves"] for line in run["evaluations"]]
    if any(run["train"] for entry in first for run in entry["curves"]) or lines:
        score = "val_accuracy" if any("val_accuracy" in line for line in lines) else "agreement"
        uri = figures.curves([(name, entry["curves"]) for name, entry in named], score=score)
        caption = (
            "Learning curves over optimiser steps: the loss that each run minimises (another loss has another "
            "scale), and its score on the validation rows. Runs of one setting share a colour."
        )
        found.append(numbered(uri, caption, wide=True))
    bins = [
        (name, entry["held_out"]["reliability"])
        for name, entry in named
        if entry["held_out"] is not None and entry["held_out"]["reliability"]
    ]
    if bins:
        uri = figures.reliability(bins)
        found.append(numbered(uri, "Reliability of the students on validation rows; below the line: over-confident."))
    return found


def gain_parts(students: Sequence[Mapping[str, Any]], numbered: Figures) -> list[dict[str, Any]]:
    """For each compared setting its tables of gains by class; of many classes also a histogram."""
    found: list[dict[str, Any]] = []
    for place, entry in enumerate(students, start=1):
        against = entry["against_labels"]
        if against is None or len(found) == SHOWN_GAINS:
            continue
        gains = [row["gain"] for row in against["classes"]]
        largest = max([abs(gain) for gain in gains] + [0.01])
        figure = None
        if len(gains) > SHOWN_CLASSES:
            counts, edges = np.histogram([100 * gain for gain in gains], bins=_GAIN_BINS)
            uri = figures.histogram(
                edges.tolist(), counts.tolist(), xlabel="gain over labels only (points)", ylabel="classes"
            )
            figure = numbered(uri, f"Gain of student {place} over labels only by class: {len(gains)} classes.")
        tables = class_table(against["classes"], "gain")
        found.append(
            {"place": place, "entry": entry, "against": against, "tables": tables, "scale": largest, "figure": figure}
        )
    return found
