"""Metrics as JSON lines: one object a line, append-only, cut back to the checkpoint when a run resumes.

A checkpoint stores the length of the file at its step. What a killed run wrote after it is cut off
before the same steps are logged again, so that no step appears twice. TensorBoard gets the same numbers
if asked for (extra `tensorboard`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdcache.errors import KDCacheError
from kdcache.stages.tensorboard_events import EventFile
from kdcache.store.growing import GrowingFile

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"


class MetricsLog:
    """The metrics file of a run (`folder` None: nowhere, for runs that only return their student).

    Args:
        folder: the run's folder.
        keep_bytes: length to cut an existing file to; 0 starts anew.
        tensorboard: write TensorBoard events beside it.
        step: the step the run starts at.

    Raises:
        StorageError: the disk is full or refuses otherwise; so do `write`, `sync` and `close`.
        MismatchError: the file is shorter than `keep_bytes`.
    """

    def __init__(self, folder: Path | None, *, keep_bytes: int = 0, tensorboard: bool = False, step: int = 0) -> None:
        self._file: GrowingFile | None = None
        self._events: EventFile | None = None
        if folder is None:
            return
        try:
            self._file = GrowingFile(folder / METRICS_NAME, keep_bytes=keep_bytes)
            if tensorboard:
                self._events = EventFile(folder / TENSORBOARD_NAME, step=step)
        except KDCacheError:
            self.close()
            raise

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line; keys `step` and `event` are expected, numbers must be finite."""
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        if self._events is not None:
            scalars = {f"{record['event']}/{key}": value for key, value in record.items() if isinstance(value, float)}
            self._events.write(record["step"], scalars)

    def sync(self) -> int:
        """Brings the lines to the disk and returns the file's length in bytes (0 without a file)."""
        return 0 if self._file is None else self._file.sync()

    def close(self) -> None:
        """Closes what is open; harmless when repeated."""
        try:
            if self._file is not None:
                self._file.close()
        finally:
            if self._events is not None:
                self._events.close()
