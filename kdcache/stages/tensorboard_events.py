"""TensorBoard events in a file whose name tells nothing about the machine.

torch's SummaryWriter puts the host's name into the file's name, and the folder of a run may be published. Here the
name holds the step that a process started at. A process that starts there again writes the same steps again, and
so replaces the file; files in the order of their names are in the order of their steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from kdcache.errors import MissingExtraError, StorageError
from kdcache.store.growing import GrowingFile
from kdcache.store.posix import make_folder, translated

EVENTS_PREFIX = "events.out.tfevents."  # TensorBoard looks for `tfevents`


@final
class EventFile:
    """The scalars of one process, from its first step on.

    Args:
        folder: made if it is not there.
        step: the last step that was done before; TensorBoard hides what an earlier process wrote after it.

    Raises:
        MissingExtraError: tensorboard is not installed.
        StorageError: the file cannot be written.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise MissingExtraError.of("tensorboard", extra="tensorboard", what="--tensorboard") from None
        self._path = folder / f"{EVENTS_PREFIX}{step:010d}"
        self._event, self._summary = Event, Summary
        with translated("open", self._path):
            make_folder(folder)
        self._records = RecordWriter(GrowingFile(self._path))
        try:
            begins = Event(step=step + 1, session_log=SessionLog(status="START"))
            self._write(Event(file_version="brain.Event:2"), begins)
        except StorageError:
            with suppress(StorageError):
                self.close()
            raise

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds numbers by their tags."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(self._event(step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Closes the file; harmless when repeated."""
        self._records.close()

    def _write(self, *events: Any) -> None:
        for event in events:
            event.wall_time = time.time()
            self._records.write(event.SerializeToString())
