"""`kdcache suspects`: the rows whose label the teacher contradicts, most suspicious first, as a CSV file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import UsageError
from kdcache.format.topk import TopK
from kdcache.store.csv_file import check_output, write_csv
from kdcache.store.parts import Catalog, read_catalog
from kdcache.train.label_quality import NO_GUESS, NO_LABEL, LabelQuality, label_quality

SCORES = ("self-confidence", "margin")
COLUMNS = (
    "sample_id",
    "label",
    "teacher_class",
    "score",
    "self_confidence",
    "margin",
    "teacher_confidence",
    "is_issue",
)
# Beside the numbers, where the cache knows its classes by name.
NAMES = ("label_name", "teacher_class_name")
_CHUNK = 65536


@dataclass(frozen=True)
class ClassIssues:
    """Of one class.

    Attributes:
        label: its number.
        name: None where unknown.
        labelled: rows with this label.
        issues: of them, those that confidently belong to another class.
        found_elsewhere: issues of other labels that confidently belong to this class.
        threshold: mean self-confidence of the rows with this label; None without any.
    """

    label: int
    name: str | None
    labelled: int
    issues: int
    found_elsewhere: int
    threshold: float | None


@dataclass(frozen=True)
class Suspects:
    """What `suspects` found and wrote.

    Attributes:
        path: of the CSV file.
        rows: of the view.
        labelled: rows with a label, which are all that are ranked.
        written: lines of the file without its header.
        disagree: labelled rows whose most likely class is another one.
        issues: labelled rows that confidently belong to another class.
        score: what they are ranked by.
        view: which was read.
        temperature: of the probabilities.
        teacher_seen: whether the teacher was trained on these rows: yes, no or unknown.
        undecided: rows whose `topk` row holds too few classes to be sure of `is_issue`.
        classes: of every class.
        warnings: what the reader has to know before believing the list.
    """

    path: Path
    rows: int
    labelled: int
    written: int
    disagree: int
    issues: int
    score: str
    view: int
    temperature: float
    teacher_seen: str
    undecided: int
    classes: tuple[ClassIssues, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "classes": [asdict(one) for one in self.classes], "warnings": list(self.warnings)}


def suspects(
    cache: str | Path,
    out: str | Path,
    *,
    score: str = "self-confidence",
    limit: int | None = None,
    view: int | None = None,
    temperature: float = 1.0,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Suspects:
    """Ranks the labelled rows of a cache by how little its teacher supports their label; the lowest score comes first.

    Args:
        cache: path of the cache.
        out: the CSV file to make, in a folder that is there.
        score: `self-confidence`, p(label), or `margin`, (p(label) - max of the others + 1) / 2.
        limit: lines at most; all labelled rows by default.
        view: which view; the first by default.
        temperature: of softmax(z / temperature): 1, or the one that calibrates the teacher.
        overwrite: replace `out` if it exists and is such a list.
        progress: called with the number of rows after each block; the cache is read twice.

    Raises:
        UsageError: a score, limit or `out` that cannot be meant, or a cache that cannot serve; see `label_quality`.
        DataError, MismatchError, CorruptCacheError, IncompleteCacheError, StorageError: as in `label_quality`.
    """
    target = Path(out)
    if score not in SCORES:
        raise UsageError(f"--score {score!r:.80} is not known; choose one of {', '.join(SCORES)}")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, found {limit}: a list without a row tells nothing")
    what = "a list that `kdcache suspects` made"
    check_output(target, overwrite=overwrite, begins=",".join(COLUMNS).encode(), what=what)
    catalog = read_catalog(Path(cache))
    encoding = catalog.schema.encoding
    if score == "margin" and isinstance(encoding, TopK) and encoding.k < 2:
        raise UsageError("--score margin needs the two largest logits of a row, and these topk rows keep one")
    quality = label_quality(cache, view=view, temperature=temperature, progress=progress)
    ranked = _ranked(quality, score)[:limit]
    names = catalog.classes.names
    columns = COLUMNS if names is None else (*COLUMNS, *NAMES)
    written = write_csv(target, columns, _lines(quality, ranked, score, names), overwrite=overwrite)
    return _report(target, catalog, quality, score, temperature, written)


def _ranked(quality: LabelQuality, score: str) -> np.ndarray:
    """Positions of the labelled rows, lowest score first; equal ones stay in stored order."""
    labelled = np.flatnonzero(quality.label != NO_LABEL)
    return labelled[np.argsort(_scores(quality, score)[labelled], kind="stable")]


def _scores(quality: LabelQuality, score: str) -> np.ndarray:
    return quality.margin if score == "margin" else quality.self_confidence


def _lines(
    quality: LabelQuality, ranked: np.ndarray, score: str, names: tuple[str, ...] | None
) -> Iterator[tuple[Any, ...]]:
    for start in range(0, len(ranked), _CHUNK):
        rows = ranked[start : start + _CHUNK]
        label, top = quality.label[rows].tolist(), quality.teacher_class[rows].tolist()
        columns = [
            [
                one.decode("utf-8", "replace") if isinstance(one, bytes) else one
                for one in quality.sample_id[rows].tolist()
            ],
            label,
            top,
            *(
                [_number(value) for value in values[rows].tolist()]
                for values in (
                    _scores(quality, score),
                    quality.self_confidence,
                    quality.margin,
                    quality.teacher_confidence,
                )
            ),
            quality.is_issue[rows].astype(int).tolist(),
        ]
        if names is not None:
            columns += [[names[one] for one in label], [names[one] for one in top]]
        yield from zip(*columns, strict=True)


def _number(value: float) -> str | None:
    """Seven digits, which is what a float32 has; an empty cell for NaN."""
    return None if math.isnan(value) else f"{value:.7g}"


def _report(
    target: Path, catalog: Catalog, quality: LabelQuality, score: str, temperature: float, written: int
) -> Suspects:
    labelled = quality.label != NO_LABEL
    issues = int(quality.is_issue.sum())
    seen = str(catalog.provenance.get("teacher_seen", "unknown"))
    classes = _by_class(quality, catalog.classes.names)
    warnings = []
    if seen != "no":
        saw = "was" if seen == "yes" else "may have been (the cache does not say)"
        warnings.append(
            f"the teacher {saw} trained on these rows: it has learnt wrong labels too, and supports them. What is "
            "listed is doubtful all the same, but many errors are not. Use a teacher of other rows (or out of fold), "
            "and dump with --teacher-saw no"
        )
    without = sum(one.labelled == 0 for one in classes)
    if without:
        warnings.append(
            f"{without} of {len(classes)} classes have no labelled row, so no row is said to belong to them"
            + ("; of a single class no row can be an issue" if without == len(classes) - 1 else "")
        )
    if quality.undecided:
        warnings.append(
            f"of {quality.undecided} topk rows is_issue may be wrong: a class that is not kept could be the confident "
            "one. Their scores are exact"
        )
    return Suspects(
        path=target,
        rows=len(quality.label),
        labelled=int(labelled.sum()),
        written=written,
        disagree=int((labelled & (quality.teacher_class != quality.label)).sum()),
        issues=issues,
        score=score,
        view=quality.view,
        temperature=temperature,
        teacher_seen=seen,
        undecided=quality.undecided,
        classes=classes,
        warnings=tuple(warnings),
    )


def _by_class(quality: LabelQuality, names: tuple[str, ...] | None) -> tuple[ClassIssues, ...]:
    count = quality.num_classes
    labelled = np.bincount(quality.label[quality.label != NO_LABEL], minlength=count)
    issues = np.bincount(quality.label[quality.is_issue], minlength=count)
    elsewhere = np.bincount(quality.guess[quality.is_issue & (quality.guess != NO_GUESS)], minlength=count)
    return tuple(
        ClassIssues(
            label,
            None if names is None else names[label],
            int(labelled[label]),
            int(issues[label]),
            int(elsewhere[label]),
            float(quality.thresholds[label]) if labelled[label] else None,
        )
        for label in range(count)
    )
