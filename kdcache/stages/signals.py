"""SIGINT and SIGTERM as a flag, so that a stage stops at a place of its own choosing.

A handler that raised would interrupt a step anywhere, half an optimiser update included. Here it only
notes the wish; the stage looks at the flag between two steps (or shards), saves, and raises
`InterruptedRunError` (exit code 75). A second Ctrl-C stops at once, for those who cannot wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 30


class StopRequest:
    """Whether a signal asked to stop: `requested`, and the `name` of the first such signal."""

    def __init__(self) -> None:
        self.requested = False
        self.name = ""

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler; the second SIGINT raises KeyboardInterrupt."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.name = signal.Signals(number).name
        self.requested = True


@contextmanager
def graceful_signals() -> Iterator[StopRequest]:
    """Notes SIGINT and SIGTERM instead of dying of them; restores the former handlers at the end.

    In a thread other than the main one Python allows no handlers: the flag is then never set.

    >>> with graceful_signals() as stop:
    ...     stop.requested
    False
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    former = {number: signal.signal(number, stop.note) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            # None: a handler that was not installed from Python, which cannot be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def shield_worker(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: the main process alone decides what a signal means.

    Ctrl-C and batch systems signal the whole process group. A worker that died of it would fail the
    step in hand, which is to be finished. The second SIGTERM does end a worker, and so does the time: an
    interpreter that exits sends one and then waits for its children without an end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GRACE_SECONDS)
