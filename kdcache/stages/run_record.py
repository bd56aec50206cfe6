"""The folder of a run and its record: what was asked for, what it was made from, what came out.

run.json        options as resolved, formula, cache root, data, versions, results; no absolute path,
                host or user name, so that it may be published beside the student
metrics.jsonl   one object a line
best.pt         the student at its best evaluation, a plain state dict (with validation data only)
last.pt         the student at the end, likewise
resume.pt       while the run is unfinished: all it takes to go on
teacher/        versions of a moving teacher's cache (--refresh-every)
tensorboard/    events of the same numbers, if asked for
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import KDCacheError, UsageError
from kdcache.format.strict_json import MAX_JSON_BYTES
from kdcache.stages.checkpoint import BEST_NAME, LAST_NAME, RESUME_NAME
from kdcache.stages.metrics import METRICS_NAME, TENSORBOARD_NAME
from kdcache.stages.tensorboard_events import EVENTS_PREFIX
from kdcache.store import posix
from kdcache.store.version_folder import remove_versions

if TYPE_CHECKING:
    from kdcache.stages.distill_inputs import Source

RECORD_NAME = "run.json"
RECORD_FORMAT = 1
TEACHER_NAME = "teacher"
RUN_FILES = (RECORD_NAME, RESUME_NAME, METRICS_NAME, BEST_NAME, LAST_NAME)  # in the order in which they are removed


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that is taken, before anything is loaded.

    Raises:
        UsageError: `out` is a file, holds something else, or a run and neither `resume` nor `overwrite` is asked
            for.
    """
    if posix.kind_of(out) not in ("folder", None):
        raise UsageError(f"--out {out} is a file; a run needs a folder")
    holds = [name for name in RUN_FILES if posix.exists(out / name)]
    if holds and not (resume or overwrite):
        raise UsageError(
            f"--out {out} holds a run ({', '.join(holds)}): go on with it with --resume, replace it with "
            "--overwrite, or choose another folder"
        )
    foreign = [] if holds else [name for name in posix.names_in(out) if not _is_ours(name)]
    if foreign:
        raise UsageError(
            f"--out {out} holds {foreign[0]!r}, which is not part of a run; choose another or an empty folder"
        )
    own = out / TEACHER_NAME
    if not (holds or overwrite) and posix.kind_of(own) == "folder" and posix.names_in(own):
        raise UsageError(
            f"--out {out} holds no run but a folder {TEACHER_NAME}, where runs keep the versions of their teacher: "
            "what is there would be removed; choose another folder, or give --overwrite"
        )


def _is_ours(name: str) -> bool:
    return name in (*RUN_FILES, TENSORBOARD_NAME, TEACHER_NAME) or name.startswith(".tmp-")


def prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Makes the folder of a run; what is in it goes with `overwrite`, or where there is nothing to go on from.

    Raises:
        StorageError: it cannot be written.
    """
    with posix.translated("write", out):
        posix.make_folder(out)
        there = posix.names_in(out)
        is_new, names = False, [name for name in there if name.startswith(posix.TEMPORARY_PREFIX)]
        if not overwrite and read_record(out).get("status") == "done":
            names += {RESUME_NAME}.intersection(there)  # its process was killed right before it removed this
        elif is_new := overwrite or RESUME_NAME not in there:
            events = [n for n in posix.names_in(out / TENSORBOARD_NAME) if n.startswith(EVENTS_PREFIX)]
            names += [*(n for n in RUN_FILES if n in there), *(f"{TENSORBOARD_NAME}/{name}" for name in events)]
        for name in names:
            posix.unlink(out / name)
        if names:
            posix.fsync_folder(out)  # else an old checkpoint could come back beside new metrics
        if is_new:
            remove_versions(out / TEACHER_NAME)  # after the checkpoint, which may be of one of them


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
    if source.items is not None and source.items.replay is not None:
        described["views"] = {**source.items.replay.describe(), **(source.views or {})}
    if source.cache is not None:
        described["cache"] = {
            "name": source.cache.path.name,
            "root": source.cache.root,
            "rows": len(source.cache),
            "encoding": source.cache.encoding.to_json(),
            "provenance": source.cache.provenance,
        }
    if source.teachers is not None:
        described["ensemble"] = source.teachers.describe()
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
    if not posix.exists(path):
        return {}
    try:
        record = json.loads(posix.read_file(path, MAX_JSON_BYTES))
    except ValueError as error:
        raise KDCacheError(
            f"{path.name} in {folder.name} is damaged ({error}); start again with --overwrite"
        ) from error
    return record if isinstance(record, dict) else {}
