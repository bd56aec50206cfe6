"""The system calls that write a cache, each in one place, so that a test can make any of them fail.

libhdf5 never writes to the disk: on a full disk h5py segfaults in `close()` in 9 of 13 write modes, and
its `flush` never fsyncs. Here every call is checked, short writes go on, and every OSError becomes a
StorageError that names the file and what to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from kdcache.errors import CorruptCacheError, IncompleteCacheError, StorageError

_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, committed shards stay",
    errno.EDQUOT: "the quota is used up; free some space and run the same command again, committed shards stay",
    errno.EFBIG: "the file-size limit of this process is reached (ulimit -f); raise it or use smaller shards",
    errno.EROFS: "the file system is read-only; choose another --out",
    errno.EACCES: "no permission; choose another --out or change the folder's mode",
    errno.EPERM: "not permitted; choose another --out or change the folder's mode",
    errno.EIO: "the disk reported an I/O error; check it, then run the same command again",
}


@contextlib.contextmanager
def translated(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a StorageError about `path`."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "nothing that was committed is lost; mend the cause and run again")
        raise StorageError(f"could not {action} {path}: {error.strerror or error}; {advice}") from error


def create(path: Path) -> int:
    """A descriptor of a new file, opened for reading and writing; an existing file is an error."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)


def open_regular(path: Path) -> tuple[int, int]:
    """(descriptor, size) of an existing regular file, opened for reading, never followed or waited for.

    Raises:
        IncompleteCacheError: there is no such file.
        CorruptCacheError: it is a link, a FIFO, a device or a folder.
        StorageError: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        raise IncompleteCacheError(f"{path} is missing; fetch it again, or run the dump again to make it") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptCacheError(f"{path} is a symbolic link; a cache holds regular files only") from None
        raise StorageError(f"could not open {path}: {error.strerror or error}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCacheError(f"{path} is not a regular file; a cache holds regular files only")
    except BaseException:
        os.close(fd)
        raise
    return fd, status.st_size


def read_exactly(fd: int, offset: int, length: int, path: Path) -> bytes:
    """`length` bytes from `offset`.

    Raises:
        CorruptCacheError: the file ends before.
        StorageError: the read failed.
    """
    parts, got = [], 0
    with translated("read", path):
        while got < length:
            part = os.pread(fd, length - got, offset + got)
            if not part:
                raise CorruptCacheError(
                    f"{path}: ends at byte {offset + got}, expected {offset + length}; it is truncated"
                )
            parts.append(part)
            got += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_file(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes.

    Raises:
        CorruptCacheError: larger than `limit`, or not a regular file.
    """
    fd, size = open_regular(path)
    try:
        if size > limit:
            raise CorruptCacheError(f"{path}: {size} bytes, more than the limit of {limit}")
        return read_exactly(fd, 0, size, path)
    finally:
        os.close(fd)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, going on after short writes."""
    left = memoryview(data).cast("B")
    while len(left):
        count = os.pwrite(fd, left, offset)
        left, offset = left[count:], offset + count


def truncate(fd: int, size: int) -> None:
    """Sets the file's size."""
    os.ftruncate(fd, size)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Asks the kernel to begin writing a range to the disk, without waiting; only `fsync` tells that it is there."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def fsync(fd: int) -> None:
    """Waits until the file's bytes are on the disk."""
    os.fsync(fd)


def fsync_folder(folder: Path) -> None:
    """Waits until the folder's names are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_read_only(fd: int) -> None:
    """Mode 0444: a published file may be mapped by readers and is never modified."""
    os.fchmod(fd, 0o444)


def link(source: Path, target: Path) -> None:
    """A second name for a file; FileExistsError where `target` exists."""
    os.link(source, target)


def rename(source: Path, target: Path) -> None:
    """Moves a file over `target` in one step."""
    os.replace(source, target)


def unlink(path: Path) -> None:
    """Removes a name; a missing one is fine."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; an existing one is fine."""
    path.mkdir(parents=True, exist_ok=True)


def publish(temporary: Path, final: Path) -> bool:
    """Gives a finished, fsynced temporary file its final name; never overwrites.

    Returns:
        True, or False where `final` exists already (then nothing is changed but the temporary name).
    """
    try:
        link(temporary, final)
    except FileExistsError:
        unlink(temporary)
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
        # No hard links on this file system (FAT, some network mounts). The caller holds the lock of this
        # name, so looking first and renaming then cannot overwrite another process's file.
        if final.exists():
            unlink(temporary)
            return False
        rename(temporary, final)
    else:
        unlink(temporary)
    fsync_folder(final.parent)
    return True


def write_file(path: Path, data: bytes, *, replace: bool) -> bool:
    """Writes a small file durably: temporary name, fsync, link or rename, fsync of the folder.

    Args:
        path: the final name.
        data: its content.
        replace: whether an existing file is replaced in one step; else it stays.

    Returns:
        True if this call published it, False if it was there.

    Raises:
        StorageError: any failure; no temporary file is left.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    with translated("write", path):
        try:
            fd = create(temporary)
            try:
                pwrite_all(fd, data, 0)
                make_read_only(fd)
                fsync(fd)
            finally:
                os.close(fd)
            if not replace:
                return publish(temporary, path)
            rename(temporary, path)
            fsync_folder(path.parent)
            return True
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
