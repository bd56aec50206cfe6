"""What to do about the students of a report: one sentence for each finding, with the command where there is one."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from typing import Any

from kdcache.errors import printable
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.option import flag
from kdcache.stages.report_students_runs import StudentRun

# Share of training rows on which a student should agree with its teacher; below, it has not room (or time) enough.
CLOSE_ENOUGH = 0.9
# Agreement on training rows minus that on held-out rows above which more rows (or views) promise more than a student.
FAR_APART = 0.1
CALIBRATED = 0.05
NAMED_CLASSES = 8
_OF_LABELS = ("label_smoothing", "label_fraction", "label_seed")  # options of the loss that hold without a teacher
_OF_THE_RUN = ("cache", "expect_root", "val_cache", "out", "seed", "epochs", "steps")
_SURE = 2.0  # standard errors


def advise(
    entries: Sequence[dict[str, Any]], groups: Sequence[Sequence[StudentRun]], *, root: str | None = None
) -> list[dict[str, Any]]:
    """The advice of the section `students`: `section`, `level`, `text` and `command` each; see `students`."""
    if not entries:
        return []
    found: list[dict[str, Any]] = []
    for entry in entries:
        found += _unfinished(entry)
    if root is not None:
        found += _other_caches([run for group in groups for run in group], root)
    distilled = [at for at, entry in enumerate(entries) if not entry["labels_only"]]
    if distilled and not any(entry["labels_only"] for entry in entries):
        text = "no run that learnt from labels only is given, so that nobody knows what the teacher added: train one"
        found.append(_say("warning", text, labels_only_command(groups[distilled[0]][0])))
    for at in distilled:
        found += [*_gains(entries[at]), *_capacity(entries[at])]
    for entry in entries:
        found += _calibration(entry)
    return found


def labels_only_command(run: StudentRun) -> str | None:
    """The command of the same run without the teacher; None for a student or data that were objects.

    The record keeps the last names of absolute paths, which whoever runs it completes.
    """
    if not all(isinstance(run.options.get(name), str) for name in ("student", "data")):
        return None
    words = ["kdcache", "distill"]
    in_views = run.record["data"].get("views") is not None
    for field in dataclasses.fields(DistillOptions):
        value = run.options.get(field.name)
        is_wanted = field.metadata["group"] in ("inputs", "views", "training") or field.name in _OF_LABELS
        if not is_wanted or field.name in _OF_THE_RUN or value is None or value is False or value == field.default:
            continue
        if value is True:
            words.append(flag(field.name))
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [flag(field.name), _word(one)]
    words += ["--steps", str(run.record["total_steps"])]  # not epochs: rows without a label may be left out
    if run.options.get("label_fraction") is not None:
        words += ["--unlabelled", "drop"]
    cache = run.options.get("cache")
    names = [name for name in (cache if isinstance(cache, list) else [cache]) if isinstance(name, str)]
    if in_views and names:
        words += ["--cache", names[0]]  # the views are those of the cache
    return printable(shlex.join([*words, "--alpha", "0", "--out", "labels-only"]))


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unfinished(entry: dict[str, Any]) -> list[dict[str, Any]]:
    names = [f"{run['name']} (step {run['step']} of {run['of']})" for run in entry["runs"] if run["status"] != "done"]
    if not names:
        return []
    return [_say("note", f"not finished: {', '.join(names)}; go on with the same command and --resume")]


def _other_caches(runs: Sequence[StudentRun], root: str) -> list[dict[str, Any]]:
    others = [
        run
        for run in runs
        if run.roots and root not in run.roots and not run.learns_from_labels_only and "refresh" not in run.record
    ]
    if not others:
        return []
    shown = ", ".join(f"{run.name} ({run.roots[0]:.12})" for run in others[:NAMED_CLASSES])
    more = f" and {len(others) - NAMED_CLASSES} more" if len(others) > NAMED_CLASSES else ""
    text = (
        f"not of this cache ({root:.12}): {shown}{more} learnt from another one, so that what is said of the teacher "
        "here says nothing about them; report them with their own cache"
    )
    return [_say("warning", text)]


def _gains(entry: dict[str, Any]) -> list[dict[str, Any]]:
    against, name = entry["against_labels"], entry["name"]
    if against is None:
        return []
    if against["why_not"] is not None:
        text = f"{name}: not comparable with labels only ({against['with']}): {against['why_not']}"
        return [_say("note", text)]
    gain, error = against["accuracy"]["gain"], against["accuracy"]["standard_error"]
    least = against["accuracy"]["standard_errors_needed"] * error
    measured = f"{100 * gain:+.2f} points of accuracy against labels only (standard error {100 * error:.2f})"
    if gain > least:
        found = [_say("ok", f"{name}: {measured}: the teacher helps")]
    elif gain < -least:
        found = [_say("warning", f"{name}: {measured}: the teacher hurts; lower --alpha, or see the teacher's section")]
    else:
        found = [_say("note", f"{name}: {measured}: no difference that these runs can tell; train more seeds of both")]
    lost = sorted((row for row in against["classes"] if row["verdict"] == "lost"), key=lambda row: row["gain"])
    if lost:
        named = ", ".join(f"{row['class']} ({100 * row['gain']:+.1f})" for row in lost[:NAMED_CLASSES])
        more = f" and {len(lost) - NAMED_CLASSES} more" if len(lost) > NAMED_CLASSES else ""
        is_one = len(lost) == 1
        found.append(
            _say(
                "warning",
                f"{name}: {'class' if is_one else 'classes'} {named}{more} lost accuracy against labels only (points): "
                f"look at the teacher's accuracy on {'it' if is_one else 'them'}, and at --disagreement",
            )
        )
    return found


def _capacity(entry: dict[str, Any]) -> list[dict[str, Any]]:
    training, name = entry["training"], entry["name"]
    if training is None or training["agreement"] is None:
        return []
    share = training["agreement"]["mean"]
    if share + _SURE * _binomial(share, training["rows"]) < CLOSE_ENOUGH:
        text = (
            f"{name}: only {100 * share:.0f} % agreement with the teacher on training rows: the student is too "
            "small, or trained too short; give it more steps first, then more parameters"
        )
        return [_say("warning", text)]
    held_out = entry["held_out"]
    if held_out is None or held_out["agreement"] is None:
        return []
    apart = share - held_out["agreement"]["mean"]
    if apart - _SURE * _binomial(share, training["rows"]) > FAR_APART:
        text = (
            f"{name}: agrees with the teacher on {100 * share:.0f} % of training rows and on "
            f"{100 * held_out['agreement']['mean']:.0f} % of held-out rows: it has room enough, and lacks rows; add "
            "views (`precompute --augment --views`) or unlabelled data"
        )
        return [_say("note", text)]
    return []


def _calibration(entry: dict[str, Any]) -> list[dict[str, Any]]:
    held_out = entry["held_out"]
    if held_out is None or held_out["ece"] is None or held_out["ece"]["equal_width"] is None:
        return []
    error = held_out["ece"]["equal_width"]["mean"]
    if held_out["confidence"] is None or error <= CALIBRATED + _expected_error(held_out["reliability"]):
        return []
    sure, right = held_out["confidence"]["mean"], held_out["accuracy"]["mean"]
    word = "over-confident" if sure > right else "under-confident"
    text = (
        f"{entry['name']}: {word}, ECE (equal width) {error:.2f} (mean confidence {sure:.2f}, accuracy {right:.2f}); "
        "where its probabilities are used, dump it on held-out rows with `kdcache precompute` and fit a temperature "
        "with `kdcache calibrate`"
    )
    return [_say("note", text)]


def _binomial(share: float, rows: int) -> float:
    """The standard error of a share of so many rows, moved away from 0 and 1."""
    moved = (share * rows + 1) / (rows + 2)
    return math.sqrt(moved * (1 - moved) / max(rows, 1))


def _expected_error(bins: Sequence[dict[str, float]]) -> float:
    """The ECE that a calibrated student would have on so few rows: mean of |normal| of each bin's binomial error."""
    rows = sum(one["rows"] for one in bins)
    parts = (math.sqrt(2 / math.pi * one["rows"] * one["confidence"] * (1 - one["confidence"])) for one in bins)
    return sum(parts) / rows if rows else 0.0


def _say(level: str, text: str, command: str | None = None) -> dict[str, Any]:
    return {"section": "students", "level": level, "text": printable(text), "command": command}
