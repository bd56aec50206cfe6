"""POSIX record locks: one byte per shard in a file `.lock`, held by the process that works on the shard.

A record lock vanishes with its process, whatever its children do; `flock` was kept for 5 s by orphaned
DataLoader workers (measured). Its one trap is that closing *any* descriptor of the file drops all locks
of the process, so there is one descriptor a file and process, and it is never closed early.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import sys
import threading
from pathlib import Path

from kdcache.errors import CorruptCacheError
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

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._held: set[int] = set()
        self._guard = threading.Lock()

    def try_lock(self, index: int) -> bool:
        """Takes the lock of shard `index`; False if another process, or this one, holds it."""
        with self._guard:
            if index in self._held:
                return False
            if not self._take(1, index):
                return False
            self._held.add(index)
            return True

    def unlock(self, index: int) -> None:
        """Gives the lock back."""
        with self._guard:
            self._held.discard(index)
            with posix.translated("unlock", self._path):
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, index)

    def share(self, index: int) -> None:
        """Takes a lock together with others; nobody can have it alone meanwhile. Waits for one who has."""
        with self._guard:
            self._held.discard(index)
            with posix.translated("lock", self._path):
                fcntl.lockf(self._fd, fcntl.LOCK_SH, 1, index)

    def try_lock_all(self) -> bool:
        """Takes the locks of all shards at once; False if any of them is held, here or in another process."""
        with self._guard:
            if self._held:
                return False
            if not self._take(0, 0):  # length 0: to the end of all files
                return False
            self._held.add(FINISH)
            return True

    def unlock_all(self) -> None:
        """Gives back what `try_lock_all` took."""
        with self._guard:
            self._held.clear()
            with posix.translated("unlock", self._path):
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 0, 0)

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self._fd)

    def _take(self, length: int, start: int) -> bool:
        with posix.translated("lock", self._path):
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                raise
        return True

    def holder(self, index: int, count: int = 1) -> int | None:
        """The process id that holds the lock, or one of `count` (0: all) from `index` on; None if free or unknown.

        Only Linux tells, and not of a process on another machine or in another container.
        """
        if self._held and (count == 0 or any(index <= i < index + count for i in self._held)):
            return os.getpid()
        if not sys.platform.startswith("linux"):
            return None
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, index, count, 0)
        with posix.translated("look at", self._path):
            kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(self._fd, fcntl.F_GETLK, request))
        return None if kind == fcntl.F_UNLCK or pid <= 0 else pid


def lock_file(folder: Path) -> LockFile:
    """The locks of `folder`, shared by everything in this process.

    Raises:
        StorageError: the file `.lock` cannot be made or opened.
        CorruptCacheError: it is a link, or no regular file: a FIFO would wait for ever, a device may do anything.
    """
    path = folder / ".lock"
    if posix.is_link(path):
        raise CorruptCacheError(f"{path} is a symbolic link; remove it, a dump makes the file it needs")
    with _GUARD, posix.translated("lock", path):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            pass
        else:
            known = _OPEN.get((os.getpid(), status.st_dev, status.st_ino))
            if known is not None:
                return known
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(path, flags, 0o644)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptCacheError(f"{path} is not a regular file; remove it, a dump makes the file it needs")
        except BaseException:
            os.close(fd)  # which no lock hangs on yet
            raise
        locks = _OPEN[os.getpid(), status.st_dev, status.st_ino] = LockFile(fd, path)
        return locks


def let_go(folder: Path) -> None:
    """Closes this process's descriptor of a folder that nobody will work on again; its locks go with it.

    One descriptor a folder is no matter for a dump, but for a run that makes a folder every few epochs.
    """
    with _GUARD, contextlib.suppress(OSError):
        status = os.stat(folder / ".lock")
        known = _OPEN.pop((os.getpid(), status.st_dev, status.st_ino), None)
        if known is not None:
            known.close()
