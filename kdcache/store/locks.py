"""POSIX record locks: one byte per shard in a file `.lock`, held by the process that works on the shard.

A record lock vanishes with its process, whatever its children do; `flock` was kept for 5 s by orphaned
DataLoader workers (measured). Its one trap is that closing *any* descriptor of the file drops all locks
of the process, so there is one descriptor a file and process, and it is never closed early.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import threading
from pathlib import Path

from kdcache.store import posix

_PLAN_BYTE = 1 << 40
_GUARD = threading.Lock()
_OPEN: dict[tuple[int, int, int], LockFile] = {}


class LockFile:
    """The locks of one dump folder, as this process sees them; get it from `lock_file`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._held: set[int] = set()
        self._guard = threading.Lock()

    def try_lock(self, index: int) -> bool:
        """Takes the lock of shard `index`; False if another process, or this one, holds it."""
        with self._guard:
            if index in self._held:
                return False
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                raise
            self._held.add(index)
            return True

    def unlock(self, index: int) -> None:
        """Gives the lock back."""
        with self._guard:
            self._held.discard(index)
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, index)

    def holder(self, index: int) -> int | None:
        """The process id that holds the lock, where the system tells (Linux); None if free or unknown."""
        if not sys.platform.startswith("linux"):
            return None
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, index, 1, 0)
        kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(self._fd, fcntl.F_GETLK, request))
        return None if kind == fcntl.F_UNLCK else pid


def lock_file(folder: Path) -> LockFile:
    """The locks of `folder`, shared by everything in this process.

    Raises:
        StorageError: the file `.lock` cannot be made or opened.
    """
    path = folder / ".lock"
    with _GUARD, posix.translated("lock", path):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            pass
        else:
            known = _OPEN.get((os.getpid(), status.st_dev, status.st_ino))
            if known is not None:
                return known
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        status = os.fstat(fd)
        locks = _OPEN[os.getpid(), status.st_dev, status.st_ino] = LockFile(fd)
        return locks


FINISH = _PLAN_BYTE
"""Index of the lock that guards the manifest."""
