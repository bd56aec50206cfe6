"""The folder of a sweep. No torch here.

sweep.json      what was asked for, and in the end what was chosen; no absolute path
sweep.csv       one row per finished or failed run, appended as it ends
heat_map.png    mean accuracy over alpha and temperature (with matplotlib, extra `report`)
runs/NAME/      one folder per run, as `kdcache distill` makes it

The truth about a run is its own run.json: when a sweep goes on, the table is written anew from them, and runs that
failed are tried again.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import CorruptCacheError, KDCacheError, MismatchError, UsageError
from kdcache.format.strict_json import MAX_JSON_BYTES, load_json
from kdcache.stages.distill_options import RESUMABLE, portable
from kdcache.stages.sweep_grid import Run
from kdcache.stages.sweep_options import SWEPT, SweepOptions
from kdcache.store import posix
from kdcache.store.csv_file import safe_text, write_csv
from kdcache.store.growing import GrowingFile
from kdcache.store.locks import lock_file

RECORD_NAME = "sweep.json"
TABLE_NAME = "sweep.csv"
HEAT_MAP_NAME = "heat_map.png"
RUNS_NAME = "runs"
FORMAT = 1
METRICS = ("val_accuracy", "agreement", "val_nll", "val_loss", "teacher_kl")
COLUMNS = (
    "name",
    *(name for name in SWEPT if name != "label_fraction"),
    "label_fraction",
    "unlabelled",
    "labelled_rows",
    "steps",
    *METRICS,
    "best_accuracy",
    "best_step",
    "seconds",
    "cache_root",
    "error",
)
_RUN_RECORD = "run.json"


def open_folder(out: Path, *, resume: bool) -> dict[str, Any]:
    """Makes the folder, or looks at what is there; the record of the sweep to go on with, empty for a new one.

    Raises:
        UsageError: it holds something else, a sweep and `resume` is not asked for, or one that is running.
        CorruptCacheError: its record is damaged.
    """
    if posix.kind_of(out) not in ("folder", None):
        raise UsageError(f"--out {out} is a file; a sweep needs a folder")
    there = [name for name in posix.names_in(out) if not name.startswith(".")] if posix.is_folder(out) else []
    if RECORD_NAME in there:
        if not resume:
            raise UsageError(f"--out {out} holds a sweep: go on with it with --resume, or choose another folder")
        record = load_json(posix.read_file(out / RECORD_NAME, MAX_JSON_BYTES), where=str(out / RECORD_NAME))
        if record.get("kdcache_sweep") != FORMAT or not isinstance(record.get("identity"), dict):
            raise CorruptCacheError(
                f"{out / RECORD_NAME} is no record of a sweep of format {FORMAT}; choose another --out"
            )
    elif there:
        raise UsageError(f"--out {out} holds {there[0]!r}, which is not part of a sweep; choose an empty folder")
    else:
        record = {}
    with posix.translated("write", out):
        posix.make_folder(out)
    if not lock_file(out).try_lock(0):
        raise UsageError(f"--out {out}: another process works on this sweep; wait for it, or choose another folder")
    return record


def close_folder(out: Path) -> None:
    """Lets others go on with the sweep."""
    lock_file(out).unlock(0)


def identity_of(asked: SweepOptions, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a sweep that goes on must agree on, as JSON gives it back; `facts` are what a check of the base found."""
    base = {name: value for name, value in portable(asked.base).items() if name not in RESUMABLE and name not in SWEPT}
    values = {name: list(asked.values.get(name, [getattr(asked.base, name)])) for name in SWEPT}
    own = {
        "random": asked.random,
        "random_seed": asked.random_seed if asked.random else 0,
        "labels_budget": asked.labels_budget,
    }
    whole: dict[str, Any] = json.loads(json.dumps({**base, **values, **own, **facts}))
    return whole


def check_same_sweep(found: Mapping[str, Any], wanted: Mapping[str, Any], *, out: Path) -> None:
    """Refuses to go on with another sweep; only what `wanted` names is compared.

    Raises:
        MismatchError: naming the first option or fact that differs.
    """
    for name in sorted(wanted):
        if found.get(name) != wanted.get(name):
            raise MismatchError(
                f"the sweep in {out.name} has {name} = {found.get(name)!r}, this call has {wanted.get(name)!r}: "
                "--resume goes on with the same sweep only; repeat its options, or choose another --out"
            )


def write_sweep(out: Path, record: Mapping[str, Any]) -> None:
    """Replaces the record of the sweep."""
    text = json.dumps({"kdcache_sweep": FORMAT, **record}, indent=2, default=str) + "\n"
    posix.write_file(out / RECORD_NAME, text.encode(), replace=True)


def finished_row(out: Path, run: Run) -> dict[str, Any] | None:
    """The row of a run from its record; None while it is not finished."""
    path = out / RUNS_NAME / run.name / _RUN_RECORD
    if not posix.exists(path):
        return None
    try:
        record = json.loads(posix.read_file(path, MAX_JSON_BYTES))
    except ValueError as error:
        raise KDCacheError(
            f"{path} is damaged ({error}); remove the folder, and --resume makes the run again"
        ) from error
    if record.get("status") != "done":
        return None
    last, best, roots = record["last"], record["best"], record["identity"].get("data cache root")
    return {
        **row_of(run),
        "labelled_rows": record.get("labels", {}).get("labelled_rows"),
        "steps": record["steps"],
        **{name: last.get(name) for name in METRICS},
        "best_accuracy": best.get("val_accuracy"),
        "best_step": best.get("step"),
        "seconds": record["train_seconds"],
        "cache_root": roots if isinstance(roots, str) or roots is None else json.dumps(roots),
    }


def row_of(run: Run, *, error: str | None = None) -> dict[str, Any]:
    """What the table says of any run: its name, its setting, and why it failed."""
    options = run.setting.options
    row = {name: getattr(options, name) for name in (*SWEPT, "unlabelled")}
    return {**row, "name": run.name, "loss": ";".join(options.loss) or "kl", "seed": run.seed, "error": error}


class Table:
    """sweep.csv, written anew with the rows that are known and then appended to, a row at a time.

    Args:
        out: the sweep's folder.
        rows: that are known.
    """

    def __init__(self, out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        path = out / TABLE_NAME
        write_csv(path, COLUMNS, ([row.get(name) for name in COLUMNS] for row in rows), overwrite=True)
        self._file = GrowingFile(path, keep_bytes=path.stat().st_size)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row in one piece, onto the disk."""
        text = io.StringIO()
        cells = [row.get(name) for name in COLUMNS]
        csv.writer(text).writerow([safe_text(cell) if isinstance(cell, str) else cell for cell in cells])
        self._file.write(text.getvalue().encode("utf-8", "backslashreplace"))
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
