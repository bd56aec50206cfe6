"""Metrics as JSON lines: one object a line, append-only, cut back to the checkpoint when a run resumes.

A checkpoint stores the length of the file at its step. What a killed run wrote after it is cut off
before the same steps are logged again, so that no step appears twice. TensorBoard gets the same numbers
if asked for (extra `tensorboard`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kdcache.errors import KDCacheError
from kdcache.stages.tensorboard_events import EventFile
from kdcache.store.posix import translated

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
    """

    def __init__(self, folder: Path | None, *, keep_bytes: int = 0, tensorboard: bool = False, step: int = 0) -> None:
        self._file = None
        self._events: EventFile | None = None
        if folder is None:
            return
        self._path = folder / METRICS_NAME
        try:
            with translated("open", self._path):
                self._file = self._path.open("ab")
                if self._file.tell() > keep_bytes:
                    self._file.truncate(keep_bytes)
            if tensorboard:
                self._events = EventFile(folder / TENSORBOARD_NAME, step=step)
        except KDCacheError:
            self.close()
            raise

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line; keys `step` and `event` are expected, numbers must be finite."""
        if self._file is not None:
            line = json.dumps(record, allow_nan=False).encode() + b"\n"
            with translated("write", self._path):
                self._file.write(line)
                self._file.flush()
        if self._events is not None:
            scalars = {f"{record['event']}/{key}": value for key, value in record.items() if isinstance(value, float)}
            self._events.write(record["step"], scalars)

    def sync(self) -> int:
        """Brings the lines to the disk and returns the file's length in bytes (0 without a file)."""
        if self._file is None:
            return 0
        with translated("write", self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Closes what is open; harmless when repeated."""
        try:
            if self._file is not None:
                with translated("write", self._path):
                    self._file.close()
        finally:
            if self._events is not None:
                self._events.close()
