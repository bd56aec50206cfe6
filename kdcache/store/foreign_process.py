"""The side that asks a reading process for rows: starts it, believes nothing it says, and outlives whatever it does.

The process is a fresh interpreter: isolated mode, no variables of the environment but those that libraries are found
by, no descriptors but the file, nothing on its path but what is on ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kdcache.errors import CorruptCacheError, DataError, UsageError
from kdcache.format.strict_json import load_json
from kdcache.store.foreign_wire import DATA, HEAD, JSON, MAX_JSON_BYTES, clipped

_START = "import sys; sys.path[:] = sys.argv[1:]; from kdcache.store.foreign_child import main; main()"
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")
_LOOK_SECONDS = 0.2
_SHOWN_STDERR = 4096
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


def environment() -> dict[str, str]:
    """The variables of a reading process: `HDF5_PLUGIN_PRELOAD=::` is how libhdf5 is told to load no plug-in."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    threads = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**kept, **threads, "HDF5_PLUGIN_PRELOAD": "::", "LC_ALL": "C.UTF-8"}


def command() -> list[str]:
    """The command line of a reading process; it finds the packages that this process finds, wherever they are."""
    ours = str(Path(__file__).resolve().parents[2])
    paths = [path for path in sys.path if os.path.isabs(path)]
    return [sys.executable, "-I", "-B", "-c", _START, *paths, *([] if ours in paths else [ours])]


class ReadingProcess:
    """A process that reads one file; use it as a context manager, which ends it.

    Args:
        file: descriptor of the file.
        name: of the file, for the messages.
        request: what it is asked; see `kdcache.store.foreign_child`.
        seconds: it may take, `pausing` apart.
        check: called a few times a second while it is waited for; what it raises ends the reading.
    """

    def __init__(
        self, file: int, *, name: str, request: Mapping[str, Any], seconds: int, check: Callable[[], None]
    ) -> None:
        self._name, self._seconds, self._check = name, seconds, check
        self._memory_mib = request["memory_bytes"] >> 20
        self._deadline = time.monotonic() + seconds
        self._said = b""
        self._process = subprocess.Popen(
            command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=[file],
            cwd="/",
            env=environment(),
            start_new_session=True,  # Ctrl-C is for us to answer
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out, self._err = self._process.stdout.fileno(), self._process.stderr.fileno()
        os.set_blocking(self._err, False)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        self._poll.register(self._err, select.POLLIN)
        with contextlib.suppress(BrokenPipeError):  # it died already, which is noticed when its answer is read
            os.write(self._process.stdin.fileno(), json.dumps({**request, "file": file}).encode())
        self._process.stdin.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def __enter__(self) -> ReadingProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Work of this side that the time limit does not count."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._deadline += time.monotonic() - begun

    def answer(self) -> dict[str, Any]:
        """The next frame, which must be JSON.

        Raises:
            DataError: what the process says is wrong with the file, or what became of the process.
            UsageError: what it says is wrong with the request.
        """
        length = self._head(JSON, MAX_JSON_BYTES)
        return self._parse(length)

    def rows(self, target: memoryview) -> None:
        """Fills `target` with the next frame, which must be data of that length.

        Raises:
            DataError: as for `answer`.
        """
        if self._head(DATA, len(target)) != len(target):
            raise self._nonsense("a block of another length")
        self._receive(target)

    def end(self) -> None:
        """Waits until the process has ended as it should.

        Raises:
            DataError: it sends more than was agreed upon, or did not end well.
        """
        if self.answer() != {"done": True}:
            raise self._nonsense("rows without an end")
        if self._read(memoryview(bytearray(1))):
            raise self._nonsense("more than it announced")
        if self._wait() != 0:
            raise self._death()

    def _head(self, kind: bytes, limit: int) -> int:
        """The length of the next frame; one that tells of an error is raised."""
        raw = bytearray(HEAD.size)
        self._receive(memoryview(raw))
        found, length = HEAD.unpack(raw)
        if found == JSON and kind == DATA and length <= MAX_JSON_BYTES:
            self._parse(length)
        if found != kind or length > limit:
            raise self._nonsense(f"a frame {found!r} of {length} bytes")
        return int(length)

    def _parse(self, length: int) -> dict[str, Any]:
        raw = bytearray(length)
        self._receive(memoryview(raw))
        try:
            value = load_json(bytes(raw), where=self._name)
        except CorruptCacheError:
            raise self._nonsense("something that is not JSON") from None
        if "error" in value:
            raise self._refusal(str(value["error"]), clipped(str(value.get("message"))))
        return value

    def _receive(self, target: memoryview) -> None:
        got = 0
        while got < len(target):
            count = self._read(target[got:])
            if not count:
                self._wait()
                raise self._death()
            got += count

    def _read(self, target: memoryview) -> int:
        """Bytes read from the process, as soon as there are any; 0 at the end."""
        while True:
            self._check()
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._too_late()
            ready = {fd for fd, _ in self._poll.poll(1000 * min(left, _LOOK_SECONDS))}
            if self._err in ready:
                self._listen()
            if self._out in ready:
                return os.readv(self._out, [target])

    def _listen(self) -> None:
        """Keeps the end of what libraries print, so that they never wait for a reader."""
        try:
            text = os.read(self._err, 65536)
        except BlockingIOError:
            return
        if not text:
            with contextlib.suppress(KeyError):  # unregistered before
                self._poll.unregister(self._err)
        self._said = (self._said + text)[-_SHOWN_STDERR:]

    def _wait(self) -> int:
        try:
            return self._process.wait(max(0.0, min(self._deadline - time.monotonic(), 10.0)))
        except subprocess.TimeoutExpired:
            raise self._too_late() from None

    def _refusal(self, kind: str, message: str) -> DataError | UsageError:
        if kind == "memory":
            return self._out_of_memory(message)
        text = f"{self._name}: {message}"
        return UsageError(text) if kind == "usage" else DataError(text)

    def _nonsense(self, what: str) -> DataError:
        return DataError(f"{self._name}: the process that reads it sent {what}; suspect the file. Nothing was kept")

    def _out_of_memory(self, message: str) -> DataError:
        return DataError(
            f"{self._name}: reading it takes more than the {self._memory_mib} MiB of --memory-limit "
            f"({message or 'MemoryError'}). Raise the limit if you trust the file; a small file that unpacks to a "
            "giant is made to do harm. Nothing was kept"
        )

    def _too_late(self) -> DataError:
        return DataError(
            f"{self._name}: not read within the {self._seconds} s of --time-limit. Raise the limit if the file is "
            "large or its disk slow; otherwise suspect the file. Nothing was kept"
        )

    def _death(self) -> DataError:
        """What became of a process that ended before it had said all."""
        code = self._process.returncode
        number = signal.Signals(-code) if code is not None and -code in set(signal.Signals) else None
        self._listen()
        if number == signal.SIGXCPU:
            return self._too_late()
        if number in _CRASHES:
            return DataError(
                f"{self._name}: the process that reads it crashed ({number.name}): the file is damaged, or made to do "
                "harm. If you trust it, write it again with the tool that made it. Nothing was kept"
            )
        if number == signal.SIGKILL:
            return DataError(
                f"{self._name}: the process that reads it was killed, most likely because the machine ran out of "
                "memory; free some, or lower --memory-limit. Nothing was kept"
            )
        how = f"was ended by {number.name}" if number else f"ended with exit code {code}"
        said = clipped(self._said.decode("utf-8", "replace").strip().rpartition("\n")[2])
        return DataError(f"{self._name}: the process that reads it {how}{': ' if said else ''}{said}. Nothing was kept")
