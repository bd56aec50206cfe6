"""The folder of a run and its record: what was asked for, what it was made from, what came out.

run.json        options as resolved, formula, cache root, data, versions, results; no absolute path,
                host or user name, so that it may be published beside the student
metrics.jsonl   one object a line
best.pt         the student at its best evaluation, a plain state dict (with validation data only)
last.pt         the student at the end, likewise
resume.pt       while the run is unfinished: all it takes to go on
tensorboard/    events of the same numbers, if asked for
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kdcache.errors import KDCacheError, StorageError, UsageError
from kdcache.stages.checkpoint import BEST_NAME, LAST_NAME, RESUME_NAME
from kdcache.stages.distill_inputs import Source
from kdcache.stages.metrics import METRICS_NAME, TENSORBOARD_NAME
from kdcache.stages.tensorboard_events import EVENTS_PREFIX
from kdcache.store import posix

RECORD_NAME = "run.json"
RECORD_FORMAT = 1
RUN_FILES = (RECORD_NAME, METRICS_NAME, BEST_NAME, LAST_NAME, RESUME_NAME)


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that is taken, before anything is loaded.

    Raises:
        UsageError: `out` is a file, holds something else, or a run and neither `resume` nor `overwrite` is asked
            for.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; a run needs a folder")
    holds = [name for name in RUN_FILES if (out / name).exists()]
    if holds and not (resume or overwrite):
        raise UsageError(
            f"--out {out} holds a run ({', '.join(holds)}): go on with it with --resume, replace it with "
            "--overwrite, or choose another folder"
        )
    foreign = [] if holds or not out.exists() else sorted(p.name for p in out.iterdir() if not _is_ours(p.name))
    if foreign:
        raise UsageError(
            f"--out {out} holds {foreign[0]!r}, which is not part of a run; choose another or an empty folder"
        )


def _is_ours(name: str) -> bool:
    return name in (*RUN_FILES, TENSORBOARD_NAME) or name.startswith(".tmp-")


def prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Makes the folder of a run; with `overwrite` the run in it goes.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".tmp-*"):  # of a process that was killed while it wrote
            left.unlink()
        if overwrite:
            events = (out / TENSORBOARD_NAME).glob(f"{EVENTS_PREFIX}*")
            for path in [*(out / name for name in RUN_FILES), *events]:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"--out {out} cannot be written: {error.strerror or error}; choose another folder"
        ) from error


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe_source(source: Source) -> dict[str, Any]:
    """A data set and its cache, for the record."""
    described: dict[str, Any] = {
        "rows": len(source.positions),
        "fingerprint": source.fingerprint,
        "data": source.provenance,
    }
    if source.cache is not None:
        described["cache"] = {
            "name": source.cache.path.name,
            "root": source.cache.root,
            "rows": len(source.cache),
            "encoding": source.cache.encoding.to_json(),
            "provenance": source.cache.provenance,
        }
    return described


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replaces the run's record."""
    text = json.dumps({"kdcache_run": RECORD_FORMAT, **record}, indent=2, default=str) + "\n"
    posix.write_file(folder / RECORD_NAME, text.encode(), replace=True)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of the run in a folder, empty if there is none.

    Raises:
        KDCacheError: it is damaged.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise KDCacheError(
            f"{path.name} in {folder.name} is damaged ({error}); start again with --overwrite"
        ) from error
    return record if isinstance(record, dict) else {}
