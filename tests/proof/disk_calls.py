"""Every system call that this process makes on paths under one folder, seen before it happens.

The functions of `os` and `fcntl` that kdcache/store/posix.py and its neighbours use are replaced for a while. A call
on a path under the folder, or on a descriptor that was opened there, goes through `before`, which may let it pass,
raise instead of it, shorten it or end the process; every other call goes straight on. An audit hook tells whether
anything got past: an open, a rename, a mkdir ... under the folder that did not come through here is in `missed`.

fsync waits for nothing here: to everybody who does not cut the power the page cache is the disk. What survives a
power cut is for `power_loss` to say.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGING = ("create", "pwrite", "ftruncate", "fsync", "fchmod", "link", "replace", "unlink", "mkdir", "rmdir")
TAKING_SPACE = ("create", "pwrite", "ftruncate", "fsync", "link", "replace", "mkdir", "close")
OF_PATHS = ("open", "stat", "lstat", "statvfs", "link", "replace", "unlink", "mkdir", "rmdir", "listdir", "scandir")
OF_DESCRIPTORS = ("close", "pread", "preadv", "pwrite", "ftruncate", "fsync", "fchmod", "fstat", "lseek")
OF_TWO_PATHS = ("link", "replace", "rename", "symlink")
# Nobody calls these on a file of ours; one who does is in `missed`, or `power_loss` would replay another file.
UNKNOWN = ("write", "writev", "pwritev", "sendfile", "copy_file_range", "truncate", "rename", "symlink", "remove")
AUDITED = ("open", "remove", "rename", "link", "symlink", "mkdir", "rmdir", "truncate", "chmod", "listdir", "scandir")


@dataclass(frozen=True)
class Call:
    """A call about to happen.

    `name` is that of the function, or `create` for an open that makes a file; `path` the one that it changes: of a
    descriptor the path that it was opened by, of link and replace the target.
    """

    number: int
    name: str
    path: str
    arguments: tuple[Any, ...]


def _nothing(call: Call, result: Any = None) -> None:
    return None


class Disk:
    """The calls under `root` while the `with` block runs; one at a time in this process.

    Args:
        root: a folder.
        before: gets each call and returns the largest number of bytes that a read or write may take, or None.
        after: gets each call that has succeeded, with its result.

    Attributes:
        calls: names of all calls so far.
        descriptors: open ones, with their paths.
        missed: what the audit hook saw and this did not.
    """

    def __init__(
        self,
        root: Path,
        before: Callable[[Call], int | None] = _nothing,
        after: Callable[[Call, Any], None] = _nothing,
    ) -> None:
        self.root = os.path.realpath(root)
        self.calls: list[str] = []
        self.descriptors: dict[int, str] = {}
        self.missed: list[str] = []
        self._before, self._after = before, after
        self._real: dict[tuple[Any, str], Any] = {}
        self._order = threading.RLock()  # what is recorded happens in the order of the numbers

    def __enter__(self) -> Disk:
        for name in sorted({*OF_PATHS, *OF_DESCRIPTORS, *UNKNOWN}):
            self._replace(os, name)
        for name in ("lockf", "fcntl"):
            self._replace(fcntl, name)
        _WATCHED.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _WATCHED.remove(self)
        for (module, name), real in self._real.items():
            setattr(module, name, real)

    def path_of(self, target: Any, folder: int | None = None) -> str | None:
        """The absolute path of a path (in the folder of a descriptor) or descriptor of ours, None for any other."""
        if isinstance(target, int):
            return self.descriptors.get(target)
        if folder is not None and folder not in self.descriptors:
            return None
        try:
            text = os.path.abspath(os.path.join(self.descriptors.get(folder, ""), os.fsdecode(target)))
        except (TypeError, ValueError):
            return None
        return text if text == self.root or text.startswith(self.root + os.sep) else None

    def _replace(self, module: Any, name: str) -> None:
        real = self._real[module, name] = getattr(module, name)

        def call(*given: Any, **keywords: Any) -> Any:
            folder = keywords.get("dir_fd")
            path = self.path_of(given[name in OF_TWO_PATHS], folder) if self in _WATCHED and given else None
            if path is None:
                return real(*given, **keywords)
            if name in UNKNOWN:
                self.missed.append(f"{name} {path}")
                return real(*given, **keywords)
            if name in ("lockf", "fcntl"):  # may wait for another thread
                return self._through(Call(self._next(name), name, path, given), real, keywords)
            with self._order:
                kind = "create" if name == "open" and given[1] & os.O_CREAT and not self._exists(path) else name
                return self._through(Call(self._next(kind), kind, path, given), real, keywords)

        setattr(module, name, call)

    def _exists(self, path: str) -> bool:
        try:
            self._real[os, "lstat"](path)
        except FileNotFoundError:
            return False
        return True

    def _next(self, name: str) -> int:
        self.calls.append(name)
        return len(self.calls)

    def _through(self, call: Call, real: Any, keywords: Any) -> Any:
        given = list(call.arguments)
        try:
            limit = self._before(call)
            if limit is not None:
                _shorten(call.name, given, limit)
        except OSError:
            if call.name == "close":  # Linux closes a descriptor and then says what went wrong
                self._forget(real, given[0])
            raise
        _INSIDE.depth = getattr(_INSIDE, "depth", 0) + 1
        try:
            if call.name == "fsync":
                result = None
            elif call.name == "close":
                result = self._forget(real, given[0])
            else:
                result = real(*given, **keywords)
            if call.name in ("open", "create"):
                self.descriptors[result] = call.path
        finally:
            _INSIDE.depth -= 1
        self._after(call, result)
        return result

    def _forget(self, real: Any, descriptor: int) -> Any:
        self.descriptors.pop(descriptor, None)
        return real(descriptor)


def _shorten(name: str, given: list[Any], limit: int) -> None:
    if name == "pwrite":
        given[1] = memoryview(given[1]).cast("B")[:limit]
    elif name == "pread":
        given[1] = min(given[1], limit)
    elif name == "preadv":
        given[1] = [memoryview(given[1][0]).cast("B")[:limit]]


_WATCHED: list[Disk] = []
_INSIDE = threading.local()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCHED and event.removeprefix("os.") in AUDITED and not getattr(_INSIDE, "depth", 0):
        for disk in _WATCHED:
            paths = [a for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
            disk.missed += [f"{event} {path!r}" for path in paths if disk.path_of(path) is not None]


sys.addaudithook(_audit)  # for good: Python has no way to take one back
