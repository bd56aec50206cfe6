"""A file that grows at its end, such as the metrics of a run: each write is there when the call returns.

Through `posix`, not `open`: a buffer would report a full disk at some later write, or in `close`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

from kdcache.errors import MismatchError, StorageError
from kdcache.store import posix


@final
class GrowingFile:
    """A file under its final name, made if it is not there.

    Args:
        path: of the file; its folder exists.
        keep_bytes: where to go on: what lies behind is cut off.

    Raises:
        StorageError: it cannot be opened; so does every other method once a write has failed.
        MismatchError: it is shorter than `keep_bytes`.
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        self._path = path
        self._end = keep_bytes
        self._error: StorageError | None = None
        self._fd = -1
        try:
            with posix.translated("open", path):
                self._fd = posix.open_or_create(path)
                size = os.fstat(self._fd).st_size
                if size > keep_bytes:
                    posix.truncate(self._fd, keep_bytes)
            if size < keep_bytes:
                raise MismatchError(
                    f"{path} has {size} bytes, and {keep_bytes} when the checkpoint was written: lines are missing. "
                    "Bring it back, or start again with --overwrite"
                )
        except BaseException:
            self._let_go()
            raise

    def write(self, data: bytes) -> int:
        """Appends bytes; returns how many."""
        try:
            with posix.translated("write", self._path):
                posix.pwrite_all(self._fd, data, self._end)
        except StorageError as error:
            self._error = self._error or error
            raise
        self._end += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def sync(self) -> int:
        """Brings what was written to the disk and returns the file's length."""
        self._raise()
        with posix.translated("write", self._path):
            posix.fsync(self._fd)
        return self._end

    def close(self) -> None:
        """Closes the file; harmless when repeated, but for an error of a write, which is raised each time."""
        self._let_go()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _let_go(self) -> None:
        if self._fd >= 0:
            posix.close_reader(self._fd)
            self._fd = -1
