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

FINISH = 1 << 40
"""Index of the lock that guards the manifest."""
OWNER = FINISH + 1
"""Index of the lock of a process that fills a folder alone."""
PRESENT = FINISH + 2
"""Index of the lock that all processes of a dump share, so that nobody replaces its plan under them."""
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

    def share(self, index: int) -> None:
        """Takes a lock together with others; nobody can have it alone meanwhile. Waits for one who has."""
        with self._guard:
            self._held.discard(index)
            fcntl.lockf(self._fd, fcntl.LOCK_SH, 1, index)

    def try_lock_all(self) -> bool:
        """Takes the locks of all shards at once; False if any of them is held, here or in another process."""
        with self._guard:
            if self._held:
                return False
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)  # length 0: to the end of all files
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                raise
            self._held.add(FINISH)
            return True

    def unlock_all(self) -> None:
        """Gives back what `try_lock_all` took."""
        with self._guard:
            self._held.clear()
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 0, 0)

    def holder(self, index: int, count: int = 1) -> int | None:
        """The process id that holds the lock, or one of `count` (0: all) from `index` on; None if free or unknown.

        Only Linux tells.
        """
        if self._held and (count == 0 or any(index <= i < index + count for i in self._held)):
            return os.getpid()
        if not sys.platform.startswith("linux"):
            return None
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, index, count, 0)
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
