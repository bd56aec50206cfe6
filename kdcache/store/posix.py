"""The system calls that write a cache, each in one place, so that a test can make any of them fail.

libhdf5 never writes to the disk: on a full disk h5py segfaults in `close()` in 9 of 13 write modes, and
its `flush` never fsyncs. Here every call is checked, short writes go on, and every OSError becomes a
StorageError that names the file and what to do. A file that cannot be looked at is not a file that is missing, and
`os.path.exists` says False for both: a finished dump would be done again.
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

TEMPORARY_PREFIX = ".tmp-"
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
    errno.ENOTDIR: "a part of this path is a file; choose another folder",
    errno.EIO: "the disk reported an I/O error; check it, then run the same command again",
}


_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)
_in_hand: set[str] = set()  # names of temporary files that this process is writing


@contextlib.contextmanager
def translated(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a StorageError about `path`."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "nothing that was committed is lost; mend the cause and run again")
        raise StorageError(f"could not {action} {path}: {error.strerror or error}; {advice}") from error


def kind_of(path: Path) -> str | None:
    """What a path leads to: `file`, `folder`, `other`; None if there is nothing.

    Raises:
        StorageError: the system does not say.
    """
    with translated("look at", path):
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def exists(path: Path) -> bool:
    """Whether there is anything; like the two below, an error where the system does not say."""
    return kind_of(path) is not None


def is_file(path: Path) -> bool:
    """Whether it is a regular file, or a link to one."""
    return kind_of(path) == "file"


def is_folder(path: Path) -> bool:
    """Whether it is a folder, or a link to one."""
    return kind_of(path) == "folder"


def is_link(path: Path) -> bool:
    """Whether the path itself is a symbolic link, wherever it leads."""
    with translated("look at", path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return stat.S_ISLNK(os.lstat(path).st_mode)
    return False


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder.

    Raises:
        StorageError: it cannot be read.
    """
    with translated("read", folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(os.listdir(folder))
    return []


def new_temporary(final: Path) -> Path:
    """A name beside `final` to write to first: `.tmp-NAME-PROCESS-RANDOM`; `rename`, `publish` or `drop` ends it."""
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{os.getpid()}-{os.urandom(4).hex()}")
    _in_hand.add(temporary.name)
    return temporary


def is_in_hand(name: str, process: int) -> bool:
    """Whether a temporary file belongs to a process of this machine that is alive, and to us only if we still write it.

    Where a disk failed for good the file could not be removed either, and a notebook goes on for days.
    """
    if process == os.getpid():
        return name in _in_hand
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def create(path: Path) -> int:
    """A descriptor of a new file, opened for reading and writing; an existing file is an error."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)


def open_or_create(path: Path) -> int:
    """A descriptor of a file that may be there, opened for reading and writing."""
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)


def open_regular(path: Path, *, inside: bool = False) -> tuple[int, int]:
    """(descriptor, size) of an existing regular file, opened for reading, never followed or waited for.

    Args:
        path: the file.
        inside: the folder that holds it must not be a link either: it is one of the cache's own.

    Raises:
        IncompleteCacheError: there is no such file.
        CorruptCacheError: it is a link, a FIFO, a device or a folder.
        StorageError: it cannot be opened.
    """
    folder = None
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
        if inside:
            folder = os.open(path.parent, flags)  # not O_DIRECTORY, which hides what else it is
        fd = os.open(path.name if inside else path, flags, dir_fd=folder)
    except FileNotFoundError:
        raise IncompleteCacheError(f"{path} is missing; fetch it again, or run the dump again to make it") from None
    except OSError as error:
        what = path.parent if inside and folder is None else path
        if error.errno == errno.ELOOP:
            raise CorruptCacheError(f"{what} is a symbolic link; a cache holds regular files only") from None
        if error.errno == errno.ENOTDIR:
            raise CorruptCacheError(f"{path.parent} is not a folder; a cache keeps its shards in one") from None
        if error.errno == errno.ENXIO:
            raise CorruptCacheError(f"{what} is a socket; a cache holds regular files only") from None
        raise StorageError(f"could not open {path}: {error.strerror or error}") from error
    finally:
        if folder is not None:
            close_reader(folder)
    try:
        with translated("look at", path):
            status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
            raise CorruptCacheError(f"{path} is {kind}, not a regular file; a cache holds regular files only")
    except BaseException:
        close_reader(fd)
        raise
    return fd, status.st_size


def has_hole(fd: int, start: int, stop: int) -> bool:
    """Whether a file has bytes in [start, stop) that take no place on the disk and read as zero; False if unknown."""
    try:
        return os.lseek(fd, start, os.SEEK_HOLE) < stop
    except (OSError, AttributeError):  # a file system, or a Python, that does not say
        return False


def close_reader(fd: int) -> None:
    """Closes a descriptor that was read from; an error then says nothing about what was read."""
    with contextlib.suppress(OSError):
        os.close(fd)


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
        close_reader(fd)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`, going on after short writes."""
    left = memoryview(data).cast("B")
    while len(left):
        count = os.pwrite(fd, left, offset)
        if count == 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
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
    _in_hand.discard(source.name)


def unlink(path: Path) -> None:
    """Removes a name; a missing one is fine."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def drop(temporary: Path) -> None:
    """Removes a temporary file if it is there; never raises."""
    _in_hand.discard(temporary.name)
    with contextlib.suppress(OSError):
        os.unlink(temporary)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; an existing one is fine. Afterwards their names are on the disk.

    Also those of folders which were there: whoever made them may have been killed before that. A folder gets its first
    one inside only when its own name is on the disk, so no more than two levels are in doubt.
    """
    if not is_folder(path):
        if is_folder(path.parent):
            _sync_name(path.parent)
        else:
            make_folder(path.parent)
        try:
            os.mkdir(path)
        except FileExistsError:  # another process made it, or it is none
            if not is_folder(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    _sync_name(path)


def _sync_name(folder: Path) -> None:
    with contextlib.suppress(PermissionError):  # a parent that may not be read cannot be synced
        fsync_folder(folder.parent)


def publish(temporary: Path, final: Path) -> bool:
    """Gives a finished, fsynced temporary file its final name, which is on the disk afterwards; never overwrites.

    Returns:
        True, or False where `final` exists already (then nothing is changed but the temporary name).
    """
    published = _link_or_rename(temporary, final)
    _in_hand.discard(temporary.name)
    fsync_folder(final.parent)  # a file that is there may be that of a process which was killed before this line
    return published


def _link_or_rename(temporary: Path, final: Path) -> bool:
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
        if exists(final):
            unlink(temporary)
            return False
        rename(temporary, final)
    else:
        unlink(temporary)
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
    temporary = new_temporary(path)
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
            drop(temporary)
            raise
