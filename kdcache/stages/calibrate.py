"""`kdcache calibrate`: fits a temperature to rows with labels, measures it on other rows, writes it beside the cache.

    rows with a label -> seeded split by sample -> fit on one part -> before and after on the other -> side file

The rows must be new to the teacher: on those it was trained on it is right more often than elsewhere, and what is
fitted there is too sure. Logits on disk never change; `distill --calibration` applies the file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.stages.calibration_file import (
    StoredCalibration,
    check_target,
    default_path,
    save_calibration,
)
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.store.rows import TeacherRows
from kdcache.store.scan import scan
from kdcache.train.calibrated import Calibration, check_serves
from kdcache.train.calibration import LARGEST, LEAST, METHODS, fit
from kdcache.train.calibration_metrics import CalibrationMetrics, CalibrationReport

LEAST_ROWS = 10  # labelled samples on each side of the split
FIT_VALUES = 1 << 25  # stored numbers that are fitted to: 33,000 rows of 1000 classes, and all of CIFAR-10
_BLOCK_BYTES = 8 << 20


@final
@dataclass(frozen=True)
class CalibrateResult:
    """What `calibrate` did.

    Attributes:
        path: of the side file.
        stored: its content.
        before: on the rows held out, without calibration.
        after: on the same rows, with it.
        notes: what to know about the result, a sentence each.
    """

    path: Path
    stored: StoredCalibration
    before: CalibrationReport
    after: CalibrationReport
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": self.path,
            "root": self.stored.root,
            "method": self.stored.method,
            "temperature": self.stored.calibration.temperature,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "fitted_on": self.stored.fitted_on,
            "notes": list(self.notes),
        }


def calibrate(
    cache: str | os.PathLike[str],
    *,
    on: str | os.PathLike[str] | None = None,
    method: str = "temperature",
    holdout: float = 0.2,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    allow_seen: bool = False,
    overwrite: bool = False,
) -> CalibrateResult:
    """Calibrates the teacher of a cache, and writes `CACHE.calibration.json`.

    Args:
        cache: whose logits are to be calibrated.
        on: a cache of the same teacher with labelled rows that it has not seen; `cache` itself by default.
        method: `temperature`, or, with all logits, `bias` (a temperature and a bias for each class) or `vector`.
        holdout: the share of samples that is not fitted to but measured on.
        seed: of the split.
        out: the side file.
        allow_seen: take rows that the teacher was trained on.
        overwrite: replace a side file that is there.

    Raises:
        UsageError: rows that the teacher was trained on, that have no labels or cannot serve the method; a value that
            cannot be meant; the file exists.
        MismatchError: `on` is of another teacher.
        DataError: too few labelled rows, or labels of one class.
        CorruptCacheError, IncompleteCacheError: of the cache.
    """
    if method not in METHODS:
        raise UsageError(f"--method {method!r:.80} is not known; choose one of {', '.join(METHODS)}")
    if not 0 < holdout < 1:
        raise UsageError(f"--holdout must lie between 0 and 1, found {holdout:g}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed must be at least 0 and below 2**63, found {seed}")
    with open_cache(cache) as target, open_cache(cache if on is None else on) as source:
        path = default_path(target) if out is None else Path(out)
        check_target(path, overwrite=overwrite)
        notes = [] if on is None else _check_same_teacher(target, source)
        _check_rows(source)
        notes += _check_seen(source, allow_seen=allow_seen)
        fitted, held_out = _split(source, holdout, seed)
        found = fit(_gather(source, fitted), method)
        check_serves(found.calibration, target.encoding)
        before, after = _measure(source, held_out, found.calibration)
        if found.bound is not None:
            notes.append(_about_bound(found.bound))
        if before.nll is not None and after.nll is not None and after.nll >= before.nll:
            notes.append(
                "on the rows held out the NLL is no better than without: the file is written all the same, and will "
                "hardly change anything; leave out --calibration"
            )
        fitted_on = {
            "cache": source.path.name,
            "root": source.root,
            "teacher_seen": _seen(source),
            "seed": seed,
            "holdout": float(holdout),
            "rows": found.rows,
            "held_out_rows": before.rows,
        }
        stored = StoredCalibration(found.calibration, target.root, method, fitted_on, before.to_json(), after.to_json())
        save_calibration(path, stored, overwrite=overwrite)
    return CalibrateResult(path, stored, before, after, tuple(notes))


def _check_rows(source: Cache) -> None:
    """Refuses what no calibration can be fitted to."""
    name = source.path.name
    if not source.has_labels:
        raise UsageError(
            f"{name} has no labels, and a calibration is fitted to labels: dump data that have them, or name another "
            "cache of this teacher with --on"
        )
    if source.num_classes < 2:
        raise UsageError(
            f"the teacher of {name} has one class, and softmax over one class is always 1: there is nothing to "
            "calibrate"
        )
    if len(source.encoding.row_shape) > 1:
        raise UsageError(
            f"{name} is a cache of dense prediction (rows of {source.encoding.row_shape}), which holds no label for "
            "each position: a calibration cannot be fitted to it"
        )


def _seen(source: Cache) -> str:
    found = source.provenance.get("teacher_seen")
    return found if isinstance(found, str) and found in ("yes", "no") else "unknown"


def _check_seen(source: Cache, *, allow_seen: bool) -> list[str]:
    """Warns on stderr where nobody knows whether the teacher was trained on the rows; refuses where it was."""
    seen = _seen(source)
    why = "on such rows it is right more often than on new ones, so that the temperature comes out too low"
    if seen == "yes" and not allow_seen:
        raise UsageError(
            f"the teacher of {source.path.name} was trained on these rows (teacher_seen: yes): {why}. Calibrate on "
            "rows that it has not seen (--on OTHER_CACHE), or pass --allow-seen"
        )
    if seen == "yes":
        return [f"fitted to rows that the teacher was trained on: {why}"]
    if seen == "no":
        return []
    note = (
        f"nobody said whether the teacher of {source.path.name} was trained on these rows (teacher_seen: unknown): if "
        f"it was, {why}. Say so when dumping: --teacher-saw yes or no"
    )
    print(f"Warning: {note}", file=sys.stderr, flush=True)
    return [note]


def _check_same_teacher(target: Cache, source: Cache) -> list[str]:
    """Refuses --on of another teacher; a note where the caches do not tell.

    Raises:
        MismatchError: other classes, or other weights.
    """
    mine, theirs = target.path.name, source.path.name
    if target.num_classes != source.num_classes:
        raise MismatchError(f"{mine} has {target.num_classes} classes, {theirs} {source.num_classes}: another teacher")
    if target.classes is not None and source.classes is not None and target.classes != source.classes:
        raise MismatchError(f"{mine} and {theirs} name their classes differently, or order them differently")
    weights = [_weights(cache) for cache in (target, source)]
    if None in weights:
        return [
            f"{mine} and {theirs} do not both say which weights their teacher had: make sure it was one and the same"
        ]
    if weights[0] != weights[1]:
        raise MismatchError(
            f"{mine} and {theirs} are of teachers with different weights (state_sha256 {weights[0]:.12} and "
            f"{weights[1]:.12}): a calibration of one says nothing about the other"
        )
    return []


def _weights(cache: Cache) -> str | None:
    teacher = cache.provenance.get("teacher")
    found = teacher.get("state_sha256") if isinstance(teacher, dict) else None
    return found if isinstance(found, str) else None


def _split(source: Cache, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of samples to fit to, in seeded order, and to measure on: all views of a sample are on one side.

    Raises:
        DataError: too few of them have a label.
    """
    labels = source.stored("label", 0, source.num_samples)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 0))
    count = round(len(order) * holdout)
    if count < LEAST_ROWS or len(order) - count < LEAST_ROWS:
        raise DataError(
            f"{source.path.name} has {len(order)} labelled samples, of which {len(order) - count} would be fitted to "
            f"and {count} measured on (--holdout {holdout:g}); {LEAST_ROWS} are needed for each"
        )
    return order[count:], order[:count]


def _gather(source: Cache, positions: np.ndarray) -> TeacherRows:
    """The rows of samples in all views, as they are stored; of very many, the first in the order of the split."""
    encoding = source.encoding
    values = encoding.num_classes if encoding.has_all_logits else source.catalog.schema.payload_row_bytes // 2
    most = FIT_VALUES // (values * len(source.views))
    blocks = list(_blocks(source, positions[: max(LEAST_ROWS, most)]))

    def joined(name: str) -> Any:
        parts = [getattr(block, name) for block in blocks]
        return None if parts[0] is None else np.concatenate(parts)

    arrays = {name: np.concatenate([block.arrays[name] for block in blocks]) for name in blocks[0].arrays}
    names = ("sample_id", "view", "label", "has_teacher", "label_b", "mix_ratio")
    return TeacherRows(encoding, arrays, **{name: joined(name) for name in names})


def _blocks(source: Cache, positions: np.ndarray) -> Iterator[TeacherRows]:
    """The rows of samples at positions, view by view, each row checked."""
    wanted = np.zeros(source.num_samples, bool)
    wanted[positions] = True
    names = [spec.name for spec in source.encoding.specs]
    for _, places, block in scan(source.catalog, views=source.views, block_bytes=_BLOCK_BYTES):
        chosen = np.flatnonzero(wanted[places])
        if not len(chosen):
            continue
        picked = {name: array[chosen] for name, array in block.items()}
        yield TeacherRows(
            source.encoding,
            {name: picked[name] for name in names},
            picked["sample_id"],
            picked["view"],
            picked["label"],
            np.ones(len(chosen), bool),
            label_b=picked.get("label_b"),
            mix_ratio=picked.get("mix_ratio"),
        )


def _measure(
    source: Cache, positions: np.ndarray, calibration: Calibration
) -> tuple[CalibrationReport, CalibrationReport]:
    """Before and after on the rows of samples, in one pass."""
    before, after = CalibrationMetrics(), CalibrationMetrics(calibration)
    for block in _blocks(source, positions):
        before.add(block)
        after.add(block)
    return before.result(), after.result()


def _about_bound(bound: str) -> str:
    if bound == "lower":
        return (
            f"the temperature is at its lower bound, {LEAST:g}: the teacher is right on (nearly) all of these rows, "
            "and no finite sureness is too much. Rows that it has not seen may tell more"
        )
    return (
        f"the temperature is at its upper bound, {LARGEST:g}: on these rows the teacher is no better than chance. Are "
        "the classes of labels and logits in the same order?"
    )
