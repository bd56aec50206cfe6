"""Progress on stderr: tqdm on a terminal, one plain line every 30 s elsewhere (a log file, a batch system)."""

from __future__ import annotations

import sys
import time

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
        self._bar = tqdm(
            total=total, desc=what, unit=unit, initial=done, disable=None if enabled else True, file=sys.stderr
        )
        self._next_line = time.monotonic() + PLAIN_SECONDS

    def advance(self, count: int = 1) -> None:
        """Notes that `count` more units are done."""
        self._done += count
        self._bar.update(count)
        if self._is_plain and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_SECONDS
            print(f"{self._what}: {self._done:,} of {self._total:,} {self._unit}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Shows a short text (the last loss) behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()
