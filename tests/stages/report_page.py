"""A report as `kdcache report` gives it, made up: of any number of classes, with hostile names if asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

HOSTILE = '<script>alert("x")</script><img src=http://evil.example/p.png> $\\frac{1}{0}$ \x1b[2J\u202egpj.exe'


def histogram(values: np.ndarray, bins: int = 30) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def reliability(rng: np.random.Generator, *, shift: float) -> list[dict[str, float]]:
    found = []
    for place in range(15):
        low, high, rows = place / 15, (place + 1) / 15, int(rng.integers(0, 60) + 40 * (place == 14))
        middle = (low + high) / 2
        found.append(
            {
                "low": low,
                "high": high,
                "rows": rows,
                "confidence": middle,
                "accuracy": max(0.0, middle - shift * middle),
            }
        )
    return found


def mean(value: float, error: float | None = 0.004) -> dict[str, Any]:
    return {"mean": value, "standard_error": error, "runs": 1 if error is None else 3}


def entry(name: str, classes: int, rng: np.random.Generator, *, labels_only: bool) -> dict[str, Any]:
    runs = [f"{name}-{seed}" for seed in range(3)]
    shares = np.clip(rng.normal(0.9 if labels_only else 0.92, 0.05, classes), 0, 1)
    gains = [
        {
            "class": place,
            "rows": 40,
            "accuracy": share,
            "labels_only": 0.9,
            "gain": share - 0.9,
            "standard_error": 0.03,
            "verdict": "lost" if share < 0.82 else "gained" if share > 0.98 else "same",
        }
        for place, share in enumerate(shares.tolist())
    ]
    curve = [{"event": "train", "step": step, "loss": 2.3 / (1 + step / 40)} for step in range(10, 400, 10)]
    scores = [{"event": "eval", "step": step, "val_accuracy": 0.92 - 2 / (2 + step)} for step in range(20, 401, 20)]
    against = {
        "with": "labels-0 and 2 more",
        "differs": ["lr 0.1 against 0.05"],
        "why_not": None,
        "accuracy": {"gain": 0.02, "standard_error": 0.006, "of": "seeds"},
        "classes": gains,
    }
    return {
        "name": f"{name}-0 and 2 more",
        "runs": [{"name": run, "seed": at, "status": "done", "step": 400, "of": 400} for at, run in enumerate(runs)],
        "labels_only": labels_only,
        "student": "mlp:784-128-10",
        "parameters": 101_770,
        "formula": "0.1*CE + 0.9*16*KL(teacher || student) at temperature 4",
        "steps": 400,
        "batch_size": 128,
        "rows": 12_000,
        "held_out": {
            "rows": 2000,
            "labelled": 2000,
            "accuracy": mean(0.9213),
            "nll": mean(0.2712),
            "brier": mean(0.13),
            "confidence": mean(0.95),
            "agreement": mean(0.941),
            "kl": mean(0.08),
            "ece": {"equal_width": mean(0.041), "equal_mass": mean(0.043)},
            "reliability": reliability(rng, shift=0.1 if labels_only else 0.03),
            "classes": [{"class": row["class"], "rows": 40, "accuracy": row["accuracy"]} for row in gains],
            "confusions": [{"label": 3, "student_class": 5, "rows": 4.5}],
        },
        "training": {"rows": 1000, "accuracy": mean(0.97), "agreement": mean(0.62), "kl": mean(0.4, None)},
        "against_labels": None if labels_only else against,
        "curves": [{"run": run, "train": curve, "evaluations": scores} for run in runs],
        "missing": {},
    }


def sample_report(classes: int = 10, *, hostile: bool = False, students: bool = True) -> dict[str, Any]:
    """Everything that a report can hold; the sample of the first suspect is `sample-0`."""
    rng = np.random.default_rng(7)
    names = [f"{HOSTILE}{place}" if hostile else f"name {place}" for place in range(classes)]
    text = HOSTILE if hostile else "digits"
    shares = np.clip(rng.normal(0.9, 0.08, classes), 0, 1).tolist()
    return {
        "cache": {
            "name": text,
            "root": "3f" * 32,
            "samples": 12_000,
            "rows": 24_000,
            "views": [0, 1],
            "classes": classes,
            "class_names": names,
            "encoding": {"name": "dense", "dtype": "float16", "shape": [classes]},
            "teacher": text,
            "data": text,
            "teacher_seen": "unknown",
        },
        "teacher": {
            "rows": 24_000,
            "labelled": 23_500,
            "top1": 0.9412,
            "top5": 0.9951,
            "nll": 0.3121,
            "brier": 0.12,
            "ece": {"equal_width": 0.141, "equal_mass": 0.139},
            "reliability": reliability(rng, shift=0.2),
            "confidence_histogram": histogram(rng.beta(9, 1, 4000)),
            "entropy_histogram": histogram(rng.gamma(1.0, 0.3, 4000)),
            "softness": [
                {"temperature": t, "entropy": 0.2 * t, "outside_label": 0.08 * t, "outside_top": 0.06 * t}
                for t in (1, 2, 4, 8)
            ],
            "classes": [
                {"class": at, "name": names[at], "rows": 2400, "accuracy": share, "predicted": 0.1}
                for at, share in enumerate(shares)
            ],
            "confusions": [{"label": at, "teacher_class": (at + 5) % classes, "rows": 90 - at} for at in range(8)],
            "views": {"views": [0, 1], "top1_each": [0.94, 0.93], "agreement": 0.97, "kl_mean": 0.031},
        },
        "data": {
            "samples": 12_000,
            "labelled": 11_750,
            "coverage": 1.0,
            "disagreement": {"rows": 1381, "share": 0.0588},
            "suspects": [
                {
                    "sample_id": f"{HOSTILE if hostile else 'sample'}-{at}",
                    "label": at % classes,
                    "teacher_class": (at + 1) % classes,
                    "score": 0.001 * (at + 1),
                }
                for at in range(12)
            ],
            "domain": {
                "energy_histogram": histogram(rng.normal(-12, 2, 4000)),
                "max_probability_mean": 0.93,
                "unlike_share": 0.013,
                "rule": "energy more than 3 robust standard deviations above the median",
            },
        },
        "students": [entry("labels", classes, rng, labels_only=True), entry("kd", classes, rng, labels_only=False)]
        if students
        else [],
        "unavailable": {"top5": f"there are 4 classes {text}"},
        "advice": [
            {
                "section": "teacher",
                "level": "warning",
                "text": "teacher's ECE is 0.14",
                "command": "kdcache calibrate C",
            },
            {
                "section": "data",
                "level": "note",
                "text": f"5.9 % of rows contradict their label {text}",
                "command": None,
            },
            {"section": "students", "level": "ok", "text": "kd: +2.00 points: the teacher helps", "command": None},
        ],
    }
