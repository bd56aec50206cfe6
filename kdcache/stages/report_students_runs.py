"""Reading the folders of runs for a report: the record, what was measured at the end, and the learning curve.

A record may come from somebody else, beside a published student: every field that a report uses is looked at first, and
one that is not what `distill` writes ends in an error that names file and field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

from kdcache.errors import CorruptCacheError, IncompleteCacheError, UsageError, printable
from kdcache.format.strict_json import MAX_JSON_BYTES, load_json
from kdcache.stages.metrics import METRICS_NAME
from kdcache.stages.run_record import RECORD_FORMAT, RECORD_NAME
from kdcache.stages.sweep_folder import RUNS_NAME
from kdcache.store import posix

CURVE_POINTS = 200  # of each event; a curve on a page shows no more
_MAX_METRICS_BYTES = 64 << 20
_SHARES = ("accuracy", "confidence", "agreement")
_RUN_OPTIONS = ("seed",)  # what differs between the runs of one setting


@final
@dataclass(frozen=True)
class StudentRun:
    """One run as a report sees it.

    Attributes:
        name: of its folder.
        record: run.json, its fields checked.
        train: lines of the training events: `step` and numbers.
        evaluations: those of the evaluations.
    """

    name: str
    record: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def options(self) -> dict[str, Any]:
        """As resolved, plain values."""
        found: dict[str, Any] = self.record["options"]
        return found

    @property
    def is_done(self) -> bool:
        """Whether it came to its last step."""
        return bool(self.record["status"] == "done")

    @property
    def measures(self) -> dict[str, Any]:
        """What was measured at the end; empty where there is nothing."""
        found: dict[str, Any] = self.record.get("measures") or {}
        return found

    @property
    def setting(self) -> str:
        """What its runs of other seeds share, as a key."""
        shared = {name: value for name, value in self.record["identity"].items() if name not in _RUN_OPTIONS}
        return json.dumps([self.record["student"], self.record["total_steps"], shared], sort_keys=True)

    @property
    def learns_from_labels_only(self) -> bool:
        """Whether no teacher took part: there was no cache, or it had no weight and every row a label."""
        if "cache" not in self.record["data"]:
            return True
        options, sample = self.options, self.measures.get("train") or {}
        has_weight = options.get("alpha") != 0 or options.get("alpha_schedule", "constant") != "constant"
        takes_part = has_weight or options.get("hard_targets") or options.get("disagreement", "keep") != "keep"
        is_labelled = sample.get("labelled") == sample.get("rows")
        return not takes_part and options.get("confidence_below") is None and is_labelled

    @property
    def roots(self) -> tuple[str, ...]:
        """Root hashes of the caches that it learnt from; of a teacher that changed, that of the first version."""
        data = self.record["data"]
        found = [data.get("cache"), *(data.get("ensemble") or {}).get("members", [])]
        return tuple(one["root"] for one in found if one is not None)

    def rows_of(self, name: str) -> str | None:
        """What identifies the rows of `data` or `val`; None where there are none.

        A run with a cache also knows their ids, one without does not, so that these cannot be part of it. With a
        fraction of the labels the unlabelled rest may take part or not: the labels are what two such runs share. All
        labels (1.0) are the same as no choice among them, whatever its seed.
        """
        found = self.record.get(name)
        if found is None:
            return None
        data = found["data"].get("fingerprint") or found["data"].get("name")
        fraction = self.options.get("label_fraction") if name == "data" else None
        if fraction is None:
            return f"{data}, {found['rows']} rows"
        if fraction == 1:
            return f"{data}, {(self.record.get('labels') or {}).get('labelled_rows', found['rows'])} rows"
        return f"{data}, {fraction} of the labels (label seed {self.options.get('label_seed') or 0})"


def read_run(folder: Path) -> StudentRun:
    """The run in a folder, finished or not.

    Raises:
        UsageError: there is no run.
        CorruptCacheError: a file that is not what `distill` wrote.
        StorageError: the disk refused.
    """
    path = folder / RECORD_NAME
    if posix.kind_of(folder) != "folder" or not posix.exists(path):
        raise UsageError(f"{folder} is no run: it has no {RECORD_NAME}. {_where_runs_are(folder)}")
    where = f"{folder.resolve().name}/{RECORD_NAME}"
    record = load_json(posix.read_file(path, MAX_JSON_BYTES), where=where)
    _check_record(record, where)
    lines = list(_lines(folder))
    return StudentRun(
        printable(folder.resolve().name),
        record,
        _thinned(line for line in lines if line.get("event") == "train"),
        _thinned(line for line in lines if line.get("event") == "eval"),
    )


def _where_runs_are(folder: Path) -> str:
    """What to give instead of a folder that is no run, such as that of a sweep."""
    for runs in (folder / RUNS_NAME, folder):
        names = [name for name in sorted(posix.names_in(runs)) if posix.exists(runs / name / RECORD_NAME)]
        if names:
            return f"The runs in it are {runs / 'NAME'}, such as {runs / names[0]}: give --run with each"
    return "Give the folder that `kdcache distill --out` made"


def _check_record(record: dict[str, Any], where: str) -> None:
    check = _Fields(record, where)
    if record.get("kdcache_run") != RECORD_FORMAT:
        raise CorruptCacheError(
            f"{where}: kdcache_run is {record.get('kdcache_run')!r:.50}, expected {RECORD_FORMAT}: it is no record "
            "of a run, or one of a later version"
        )
    check.of(str, "status")
    check.of(str, "formula")
    for name in ("options", "identity", "student", "data"):
        check.of(dict, name)
    check.of(str, "student", "spec")
    check.count("student", "parameters")
    check.count("student", "classes")
    check.count("total_steps")
    if "steps" in record:
        check.count("steps")
    for name in ("data", "val"):
        if record.get(name) is not None:
            check.of(dict, name)
            check.of(dict, name, "data")
            check.count(name, "rows")
    if record["data"].get("cache") is not None:
        check.of(str, "data", "cache", "root")
    if record["data"].get("ensemble") is not None:
        for place, member in enumerate(check.of(list, "data", "ensemble", "members")):
            if not isinstance(member, dict) or not isinstance(member.get("root"), str):
                check.refuse(("data", "ensemble", "members", str(place)), member, "a cache with its root")
    if record.get("labels") is not None:
        check.of(dict, "labels")
        check.count("labels", "labelled_rows")
    if record.get("measures") is not None:
        _check_measures(check, record["student"]["classes"])


def _check_measures(check: _Fields, classes: int) -> None:
    check.of(dict, "measures")
    check.of(dict, "measures", "missing")
    for name in ("val", "train"):
        found = check.record["measures"].get(name)
        if found is None:
            continue
        check.of(dict, "measures", name)
        check.count("measures", name, "rows")
        check.count("measures", name, "labelled")
        for field in ("accuracy", "nll", "brier", "confidence", "agreement", "kl", "taught"):
            if found.get(field) is not None:
                check.number("measures", name, field, most=1 if field in _SHARES else None)
        if name == "train" or not found["labelled"]:
            continue
        check.number("measures", name, "accuracy", most=1)
        check.of(dict, "measures", name, "ece")
        for field in ("equal_width", "equal_mass"):
            if found["ece"].get(field) is not None:
                check.number("measures", name, "ece", field, most=1)
        for field in ("class_rows", "class_correct", "class_predicted"):
            check.counts(("measures", name, field), classes)
        if any(right > rows for right, rows in zip(found["class_correct"], found["class_rows"], strict=True)):
            check.refuse(("measures", name, "class_correct"), "more than the rows of a class", "at most its rows")
        if sum(found["class_rows"]) != found["labelled"]:
            check.refuse(("measures", name, "class_rows"), sum(found["class_rows"]), f"{found['labelled']} rows in all")
        check.table(("measures", name, "reliability"), ("low", "high", "confidence", "accuracy"), most=1)
        check.table(("measures", name, "reliability"), ("rows",), most=found["labelled"])
        check.table(("measures", name, "confusions"), ("label", "student_class"), most=classes - 1)
        check.table(("measures", name, "confusions"), ("rows",), most=found["labelled"])


@final
@dataclass(frozen=True)
class _Fields:
    """Looks at fields of a record by their path."""

    record: dict[str, Any]
    where: str

    def of(self, kind: type, *path: str) -> Any:
        value: Any = self.record
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            self.refuse(path, value, {"dict": "an object", "str": "a text", "list": "a list"}[kind.__name__])
        return value

    def number(self, *path: str, most: float | None = None) -> None:
        value = (self.of(dict, *path[:-1]) if path[:-1] else self.record).get(path[-1])
        if not _is_number(value, most):
            self.refuse(path, value, "a number" if most is None else f"a number from 0 to {most}")

    def count(self, *path: str) -> None:
        value = (self.of(dict, *path[:-1]) if path[:-1] else self.record).get(path[-1])
        if type(value) is not int or value < 0:
            self.refuse(path, value, "a number of things")

    def counts(self, path: tuple[str, ...], length: int) -> None:
        values = self.of(list, *path)
        if len(values) != length or not all(type(value) is int and value >= 0 for value in values):
            self.refuse(path, f"a list of {len(values)}", f"{length} numbers of rows")

    def table(self, path: tuple[str, ...], keys: tuple[str, ...], *, most: float) -> None:
        for row in self.of(list, *path):
            if not isinstance(row, dict) or not all(_is_number(row.get(key), most) for key in keys):
                self.refuse(path, row, f"rows of {', '.join(keys)} from 0 to {most}")

    def refuse(self, path: tuple[str, ...], found: Any, expected: str) -> NoReturn:
        raise CorruptCacheError(
            f"{self.where}: {'.'.join(path)} is {found!r:.50}, expected {expected}: the record is damaged, or was not "
            "written by kdcache; leave this run out, or train it again with --overwrite"
        )


def _is_number(value: Any, most: float | None) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return most is None or 0 <= value <= most


def _lines(folder: Path) -> Iterable[dict[str, Any]]:
    """The lines of metrics.jsonl; a run that goes on may have written half of the last one."""
    try:
        text = posix.read_file(folder / METRICS_NAME, _MAX_METRICS_BYTES)
    except IncompleteCacheError:
        return
    *lines, _ = text.split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{folder.resolve().name}/{METRICS_NAME}, line {number}"
        found = load_json(line, where=where)
        if type(found.get("step")) is not int:
            raise CorruptCacheError(f"{where}: step is {found.get('step')!r:.50}, expected a number of steps")
        yield {
            name: value
            for name, value in found.items()
            if name == "event" or (isinstance(value, (int, float)) and not isinstance(value, bool))
        }


def _thinned(lines: Iterable[dict[str, float]]) -> list[dict[str, Any]]:
    """At most so many of the lines, evenly, with the last one."""
    found = list(lines)
    stride = -(-len(found) // CURVE_POINTS) or 1
    return found[::-1][::stride][::-1]
