"""Progress on stderr: tqdm on a terminal, one plain line every 30 s elsewhere (a log file, a batch system)."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

PLAIN_SECONDS = 30.0


class Progress:
    """Counts towards `total`; use as a context manager.

    Args:
        total: units of work.
        what: name of the work, shown in front.
        unit: name of one unit.
        done: units that an earlier process did.
        enabled: False shows nothing (other ranks, quiet runs).
    """

    def __init__(self, total: int, *, what: str, unit: str, done: int = 0, enabled: bool = True) -> None:
        self._total, self._what, self._unit, self._done = total, what, unit, done
        self._is_plain = enabled and not sys.stderr.isatty()
        self._stream = _Forgiving(sys.stderr)
        self._bar = tqdm(
            total=total, desc=what, unit=unit, initial=done, disable=None if enabled else True, file=self._stream
        )
        self._next_line = time.monotonic() + PLAIN_SECONDS

    def advance(self, count: int = 1) -> None:
        """Notes that `count` more units are done."""
        self._done += count
        self._bar.update(count)
        if self._is_plain and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self._stream.write(f"{self._what}: {self._done:,} of {self._total:,} {self._unit}\n")
            self._stream.flush()

    def note(self, text: str) -> None:
        """Shows a short text (the last loss) behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()


class _Forgiving:
    """A stream whose failures end no work: a log file on a full disk, a terminal that is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
