"""What runs with several caches refuse, before their first step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdcache
from kdcache.errors import CoverageError, DataError, MismatchError, UsageError

sys.path.insert(0, str(Path(__file__).parent))
from several_caches import CLASSES, LABELS, LOGITS, NAMES, ROWS, cache_of, ran, two_caches


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return two_caches(tmp_path)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ensemble": "best"}, UsageError, "is not known; choose one of logits"),
        ({"ensemble": "soft-targets", "loss": ("mse",)}, UsageError, "mse needs the logits of all classes"),
        ({"ensemble": "soft-targets", "loss": ("standardized_kd",)}, UsageError, "soft targets at temperature 4"),
        ({"ensemble": "soft-targets", "loss": ("kl:temperature=2",)}, UsageError, "asked for at temperature 2"),
        ({"ensemble": "soft-targets", "confidence_below": 0.5}, UsageError, "calibration_error needs"),
        ({"ensemble": "soft-targets", "disagreement": "downweight"}, UsageError, "nll needs the probability"),
        ({"expect_root": "0" * 64}, UsageError, "--expect-root is of one cache, and --cache names 2"),
        ({"calibration": ("nothing.json",)}, UsageError, "there is no file nothing.json: a calibration is"),
        ({"ensemble": "route:nothing.csv"}, UsageError, "there is no file nothing.csv: a route names a table"),
    ],
)
def test_options_that_several_teachers_cannot_serve_are_refused(
    two: list[Path], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ran(two, **changed)


def test_caches_that_do_not_belong_together_are_refused(two: list[Path], tmp_path: Path) -> None:
    first = two[0]
    named = cache_of(tmp_path / "named", LOGITS[1], names=NAMES)
    others = cache_of(tmp_path / "others", LOGITS[1], names=[*NAMES[:-1], "z"])
    wide = tmp_path / "wide"
    with kdcache.Writer(wide, classes=7) as writer:
        writer.write(np.arange(ROWS), torch.randn(ROWS, 7).numpy())
    wrong = cache_of(tmp_path / "wrong", LOGITS[1], labels=(LABELS + 1) % CLASSES)
    away = tmp_path / "away"
    with kdcache.Writer(away, classes=CLASSES) as writer:
        writer.write(np.arange(1000, 1000 + ROWS), LOGITS[1].numpy())
    augmented = cache_of(
        tmp_path / "augmented", LOGITS[1], views={"augment": "shift2", "named": True, "seed": 1, "mix": None}
    )
    soft = tmp_path / "soft.h5"
    kdcache.ensemble(two, soft, rule="soft-targets", temperature=4.0)
    for caches, changed, error, message in (
        ([first, named], {}, UsageError, "first does not name its classes"),
        ([named, others], {}, MismatchError, r"other classes \('f', 'z' in one of them alone\): give one map"),
        ([first, wide], {}, MismatchError, "wide has 7 classes, first 6"),
        ([first, wrong], {}, MismatchError, r"sample 0 has the label \d in wrong and \d in first; 60 labels differ"),
        ([first, away], {"missing": "ce"}, CoverageError, "first shares no sample of the data with any other"),
        ([first, first], {}, UsageError, "--cache names first twice"),
        ([first, augmented], {}, MismatchError, "augmented was dumped with the pipeline"),
        ([first, soft], {}, UsageError, "soft.h5 is the mean of several teachers itself"),
        ([first], {"ensemble": "logits"}, UsageError, "give --cache more than once"),
    ):
        with pytest.raises(error, match=message):
            ran(caches, **changed)
    with pytest.raises(UsageError, match="--val-cache is given 2 times and --cache 3 times"):
        ran([*two, cache_of(tmp_path / "third", LOGITS[2])], val=two)
    with pytest.raises(UsageError, match="--val-cache is given 2 times for a single --cache"):
        ran(first, val=two)
    with pytest.raises(MismatchError, match="give the validation caches in the order"):
        ran(two, val=[first, wide])
    turned = cache_of(tmp_path / "turned", LOGITS[0], names=NAMES[::-1], labels=None)
    with pytest.raises(MismatchError, match=r"turned \(--val-cache\) has other classes than named"):
        ran([named, cache_of(tmp_path / "again", LOGITS[0], names=NAMES)], val=turned)


def test_teachers_of_two_halves_of_the_data_are_no_ensemble(tmp_path: Path) -> None:
    halves = [cache_of(tmp_path / str(n), LOGITS[n], rows=slice(30 * n, 30 * n + 30)) for n in range(2)]
    with pytest.raises(CoverageError, match=r"0 shares no sample of the data with any other --cache \(30 of the 60"):
        ran(halves, missing="ce")


def test_rules_refuse_what_they_cannot_measure(two: list[Path], tmp_path: Path) -> None:
    first = two[0]
    seen = cache_of(tmp_path / "seen", LOGITS[1], teacher_seen="yes")
    bare = cache_of(tmp_path / "bare", LOGITS[1], labels=None)
    few = cache_of(tmp_path / "few", LOGITS[1], labels=torch.where(torch.arange(ROWS) < 9, LABELS, -1))
    kdcache.convert(first, tmp_path / "sparse", top_k=3, temperatures=(1.0, 2.0))
    sparse = tmp_path / "sparse"
    for caches, rule, error, message in (
        ([first, seen], "accuracy", UsageError, r"seen was trained on these rows \(teacher_seen: yes\)"),
        ([first, bare], "calibration", UsageError, "bare has none of single rows"),
        ([first, few], "class-accuracy", DataError, "few has 9 labelled rows"),
        ([two[1], sparse], "logits", UsageError, "needs the logits of all classes, and sparse holds topk rows"),
        ([two[1], sparse], "entropy", UsageError, "needs the logits of all classes"),
        ([two[1], sparse], None, UsageError, "topk rows of sparse at that temperature, and they hold 1, 2"),
    ):
        with pytest.raises(error, match=message):
            ran(caches, ensemble=rule)
    assert ran([two[1], sparse], temperature=2.0).steps == 8
