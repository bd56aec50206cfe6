"""Students in a report: runs grouped by setting, each against the run that learnt from labels alone.

Runs that differ in their seed only are one setting: means, with the standard error of the mean over seeds. A setting is
compared with labels alone where both have the same validation rows, student, training rows, steps and batch size; what
else differs is said beside the numbers.

A class counts as lost or gained where the difference of its accuracies is beyond what so few rows can tell. With p1 and
p2 the shares of its n validation rows that are right, each of them moved towards one half by one row in either
direction, (k + 1) / (n + 2), so that 3 of 3 is not certain:

    standard error = sqrt((p1 (1 - p1) + p2 (1 - p2)) / n)        lost: p1 - p2 < -z * standard error

z is such that, were all C classes alike, one comparison in 20 would name any (Bonferroni, both sides: 2.8 for 10
classes, 4.1 for 1000). Both students saw the same rows, which makes the true error smaller: the rule rather misses a
class than accuses one. A class with fewer than 10 rows is never named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from kdcache.errors import MismatchError, UsageError
from kdcache.stages.report_students_advice import advise
from kdcache.stages.report_students_runs import StudentRun, read_run
from kdcache.stages.standard_errors import needed

MIN_CLASS_ROWS = 10
FALSE_ALARM = 0.05
_HELD_OUT = ("accuracy", "nll", "brier", "confidence", "agreement", "kl")
_TRAINING = ("accuracy", "agreement", "kl")
# Options that a comparison of losses leaves alike; seeds, names and the losses themselves may differ.
_ALIKE = ("lr", "optimizer", "momentum", "weight_decay", "schedule", "warmup", "clip_norm", "amp", "augment", "views",
          "view_order", "drop_last", "label_smoothing", "init")  # fmt: skip


def students(runs: Sequence[Path], *, root: str | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the records of runs say of their students.

    Args:
        runs: folders that `distill` wrote.
        root: hash of the cache that is reported; runs that learnt from others are named.

    Returns:
        One entry for each setting, those of labels alone first: `runs`, `labels_only`, `student`, `parameters`,
        `formula`, `steps`, `batch_size`, `rows`, `held_out`, `training`, `against_labels`, `curves` and `missing`; and
        the advice, as in the rest of the report. Means over seeds are `{"mean", "standard_error", "runs"}`, the error
        None for one run.

    Raises:
        UsageError: a folder that is no run, or one given twice.
        CorruptCacheError: a record that is damaged.
    """
    places = [folder.resolve() for folder in runs]
    for at, place in enumerate(places):
        if place in places[:at]:
            raise UsageError(f"the run {place.name} is given twice; give each one once")
    groups: dict[str, list[StudentRun]] = {}
    for folder in runs:
        run = read_run(folder)
        groups.setdefault(run.setting, []).append(run)
    ordered = sorted(groups.values(), key=lambda group: not group[0].learns_from_labels_only)
    entries = [describe_setting(group) for group in ordered]
    for group, entry in zip(ordered, entries, strict=True):
        entry["against_labels"] = _against_labels(group, entry, ordered, entries)
    return entries, advise(entries, ordered, root=root)


def describe_setting(group: Sequence[StudentRun]) -> dict[str, Any]:
    """The entry of runs that differ in their seed only, without the comparison."""
    first, finished = group[0], [run for run in group if run.is_done]
    missing: dict[str, str] = {}
    for name, parts in (("held_out", "val"), ("training", "train")):
        if not finished:
            missing[name] = "no run of this setting is finished: go on with it with the same command and --resume"
        elif not any(run.measures.get(parts) for run in finished):
            reasons = [(run.measures.get("missing") or {}).get(parts) for run in finished]
            why = next((reason for reason in reasons if isinstance(reason, str)), None)
            missing[name] = why or "the run was made by a version that did not measure it: train it again"
    return {
        "name": first.name if len(group) == 1 else f"{first.name} and {len(group) - 1} more",
        "runs": [_describe_run(run) for run in group],
        "labels_only": first.learns_from_labels_only,
        "student": first.record["student"]["spec"],
        "parameters": first.record["student"]["parameters"],
        "formula": first.record["formula"],
        "steps": first.record["total_steps"],
        "batch_size": first.options.get("batch_size"),
        "rows": first.record["data"]["rows"],
        "held_out": _held_out([run.measures["val"] for run in finished if run.measures.get("val")]),
        "training": _training([run.measures["train"] for run in finished if run.measures.get("train")]),
        "against_labels": None,
        "curves": [{"run": run.name, "train": run.train, "evaluations": run.evaluations} for run in group],
        "missing": missing,
    }


def mean_of(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean over runs and its standard error (ddof 1), None for one run; None where a run has no such number.

    >>> mean_of([1.0, 3.0])
    {'mean': 2.0, 'standard_error': 1.0, 'runs': 2}
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    error = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return {"mean": float(np.mean(known)), "standard_error": error, "runs": len(known)}


def class_gains(rows: np.ndarray, accuracy: np.ndarray, labels_only: np.ndarray) -> list[dict[str, Any]]:
    """Gain of each class over labels alone, with the verdict of the rule above.

    Args:
        rows: (C,) validation rows.
        accuracy: (C,) share that is right, mean over seeds; likewise `labels_only`.
        labels_only: (C,).

    Returns:
        For each class with rows `class`, `rows`, `accuracy`, `labels_only`, `gain`, `standard_error` and `verdict`:
        `gained`, `lost`, `same`, or `few rows`.
    """
    compared = np.flatnonzero(rows)
    if not len(compared):
        return []
    z = NormalDist().inv_cdf(1 - FALSE_ALARM / 2 / len(compared))
    n = rows[compared].astype(np.float64)
    first, second = accuracy[compared], labels_only[compared]
    moved = [(share * n + 1) / (n + 2) for share in (first, second)]
    errors = np.sqrt(sum(share * (1 - share) for share in moved) / n)
    found = []
    for at, place in enumerate(compared.tolist()):
        gain, error = float(first[at] - second[at]), float(errors[at])
        verdict = "gained" if gain > z * error else "lost" if gain < -z * error else "same"
        found.append(
            {
                "class": place,
                "rows": int(n[at]),
                "accuracy": float(first[at]),
                "labels_only": float(second[at]),
                "gain": gain,
                "standard_error": error,
                "verdict": verdict if n[at] >= MIN_CLASS_ROWS else "few rows",
            }
        )
    return found


def _describe_run(run: StudentRun) -> dict[str, Any]:
    last = run.train[-1]["step"] if run.train else 0
    return {
        "name": run.name,
        "seed": run.options.get("seed"),
        "status": run.record["status"],
        "step": run.record.get("steps", last),
        "of": run.record["total_steps"],
    }


def _held_out(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean over runs of what was measured on the validation rows; counts are added up."""
    if not found:
        return None
    merged: dict[str, Any] = {"rows": found[0]["rows"], "labelled": found[0]["labelled"]}
    merged |= {name: mean_of([one.get(name) for one in found]) for name in _HELD_OUT}
    if not all(one["labelled"] for one in found):
        return {**merged, "ece": None, "reliability": None, "classes": None, "confusions": None}
    kinds = ("equal_width", "equal_mass")
    rows, correct, predicted = (
        np.sum([one[name] for one in found], axis=0) for name in ("class_rows", "class_correct", "class_predicted")
    )
    return {
        **merged,
        "ece": {kind: mean_of([one["ece"].get(kind) for one in found]) for kind in kinds},
        "reliability": _merged_bins([one["reliability"] for one in found]),
        "classes": [
            {
                "class": place,
                "rows": int(rows[place] // len(found)),
                "accuracy": float(correct[place] / rows[place]) if rows[place] else None,
                "predicted": float(predicted[place] / len(found)),
            }
            for place in range(len(rows))
        ],
        "confusions": _merged_confusions([one["confusions"] for one in found]),
    }


def _merged_bins(bins: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Reliability bins of several runs as one: rows added up, confidence and accuracy weighed by them."""
    if len({tuple((one["low"], one["high"]) for one in each) for each in bins}) > 1:
        raise MismatchError("the runs of one setting have reliability bins of different edges: report them one by one")
    merged = []
    for parts in zip(*bins, strict=True):
        rows = sum(part["rows"] for part in parts)
        shares = {
            name: sum(part["rows"] * part[name] for part in parts) / rows if rows else 0.0
            for name in ("confidence", "accuracy")
        }
        merged.append({"low": parts[0]["low"], "high": parts[0]["high"], "rows": rows, **shares})
    return merged


def _merged_confusions(tables: Sequence[list[dict[str, int]]]) -> list[dict[str, Any]]:
    """Mean rows over runs; a pair that one run had too seldom to list counts as 0 there."""
    total: dict[tuple[int, int], float] = {}
    for table in tables:
        for row in table:
            key = (row["label"], row["student_class"])
            total[key] = total.get(key, 0.0) + row["rows"] / len(tables)
    ordered = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:20]
    return [{"label": key[0], "student_class": key[1], "rows": rows} for key, rows in ordered]


def _training(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not found:
        return None
    return {"rows": found[0]["rows"], **{name: mean_of([one.get(name) for one in found]) for name in _TRAINING}}


def _against_labels(
    group: Sequence[StudentRun],
    entry: dict[str, Any],
    groups: Sequence[Sequence[StudentRun]],
    entries: Sequence[dict[str, Any]],
) -> dict[str, Any] | None:
    """The comparison with the setting of labels alone that fits best; None for such a setting, and without one."""
    if entry["labels_only"]:
        return None
    run, compared = group[0], []
    for others, other in zip(groups, entries, strict=True):
        if other["labels_only"] and other["held_out"] is not None:
            compared.append((_obstacles(run, others[0]), _differences(run, others[0]), other))
    if not compared:
        return None
    obstacles, differs, other = min(compared, key=lambda one: (len(one[0]), len(one[1])))
    found: dict[str, Any] = {
        "with": other["name"],
        "differs": differs,
        "why_not": None,
        "accuracy": None,
        "classes": [],
    }
    held_out = entry["held_out"]
    if obstacles:
        return {**found, "why_not": "; ".join(obstacles)}
    if held_out is None or held_out["accuracy"] is None or other["held_out"]["accuracy"] is None:
        return {**found, "why_not": "one of them has no accuracy on validation rows"}
    shares = [np.array([row["accuracy"] or 0.0 for row in each["classes"]]) for each in (held_out, other["held_out"])]
    rows = np.array([row["rows"] for row in held_out["classes"]])
    if rows.tolist() != [row["rows"] for row in other["held_out"]["classes"]]:
        return {**found, "why_not": "their validation rows have other labels"}
    found["accuracy"] = _gain(held_out["accuracy"], other["held_out"]["accuracy"], held_out["labelled"])
    return {**found, "classes": class_gains(rows, *shares)}


def _gain(first: dict[str, Any], second: dict[str, Any], rows: int) -> dict[str, Any]:
    """Difference of mean accuracies; its error is that of seeds where both have several, else that of the rows.

    Seeds are told apart by Student's t at 95 %, rows by two standard errors.
    """
    if first["standard_error"] is not None and second["standard_error"] is not None:
        error, of = math.hypot(first["standard_error"], second["standard_error"]), "seeds"
        least = needed(min(first["runs"], second["runs"]))  # the smaller of both degrees of freedom, to be safe
    else:
        spread = sum(share["mean"] * (1 - share["mean"]) for share in (first, second))
        error, of, least = math.sqrt(spread / rows), "rows", 2.0
    gain = first["mean"] - second["mean"]
    return {"gain": gain, "standard_error": error, "standard_errors_needed": least, "of": of}


def _obstacles(run: StudentRun, other: StudentRun) -> list[str]:
    """What makes a comparison meaningless."""
    facts = (
        ("validation rows", run.rows_of("val"), other.rows_of("val")),
        ("student", run.record["student"], other.record["student"]),
        ("training rows", run.rows_of("data"), other.rows_of("data")),
        ("steps", run.record["total_steps"], other.record["total_steps"]),
        ("batch size", run.options.get("batch_size"), other.options.get("batch_size")),
    )
    return [
        f"another {name}: {_shown(mine)} against {_shown(theirs)}" for name, mine, theirs in facts if mine != theirs
    ]


def _differences(run: StudentRun, other: StudentRun) -> list[str]:
    """What else differs, and is worth a look."""
    pairs = [(name, run.options.get(name), other.options.get(name)) for name in _ALIKE]
    return [f"{name} {_shown(mine)} against {_shown(theirs)}" for name, mine, theirs in pairs if mine != theirs]


def _shown(value: Any) -> str:
    return f"{value.get('spec')}" if isinstance(value, dict) else "none" if value is None else str(value)
