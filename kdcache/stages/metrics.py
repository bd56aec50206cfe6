"""Metrics as JSON lines: one object a line, append-only, cut back to the checkpoint when a run resumes.

A checkpoint stores the length of the file at its step. What a killed run wrote after it is cut off
before the same steps are logged again, so that no step appears twice. TensorBoard gets the same numbers
if asked for (extra `tensorboard`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from kdcache.errors import MissingExtraError

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"


class ScalarWriter(Protocol):
    """The part of TensorBoard's SummaryWriter that is used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Records one number."""

    def close(self) -> None:
        """Flushes and closes the event file."""


class MetricsLog:
    """The metrics file of a run (`folder` None: nowhere, for runs that only return their student).

    Args:
        folder: the run's folder.
        keep_bytes: length to cut an existing file to; 0 starts anew.
        tensorboard: write TensorBoard events beside it.
        step: the step the run starts at; TensorBoard hides what an earlier process wrote beyond it.
    """

    def __init__(self, folder: Path | None, *, keep_bytes: int = 0, tensorboard: bool = False, step: int = 0) -> None:
        self._file = None
        self._scalars: ScalarWriter | None = None
        if folder is not None:
            if tensorboard:
                self._scalars = _summary_writer(folder / TENSORBOARD_NAME, step)
            self._file = (folder / METRICS_NAME).open("ab")
            self._file.truncate(min(keep_bytes, self._file.tell()))

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line; keys `step` and `event` are expected, numbers must be finite."""
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._file.flush()
        if self._scalars is not None:
            for key, value in record.items():
                if isinstance(value, float):
                    self._scalars.add_scalar(f"{record['event']}/{key}", value, record["step"])

    def sync(self) -> int:
        """Brings the lines to the disk and returns the file's length in bytes (0 without a file)."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Closes what is open; harmless when repeated."""
        if self._file is not None:
            self._file.close()
        if self._scalars is not None:
            self._scalars.close()


def _summary_writer(folder: Path, step: int) -> ScalarWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError.of("tensorboard", extra="tensorboard", what="--tensorboard") from None
    writer: ScalarWriter = SummaryWriter(str(folder), purge_step=step)
    return writer
