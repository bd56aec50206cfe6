"""Every system call may fail, at any moment: a typed error, nothing half-done published, and the same bytes after."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, IncompleteCacheError, KDCacheError, StorageError, UsageError
from kdcache.store import posix
from kdcache.store.verify import verify
from kdcache.store.writer import Writer

CALLS = (
    "create",
    "pwrite_all",
    "truncate",
    "fsync",
    "fsync_folder",
    "make_read_only",
    "link",
    "rename",
    "unlink",
    "make_folder",
    "read_exactly",
)


class Fault:
    """Counts all calls of the functions in CALLS and lets call number `at` fail with `code`."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1, code: int = errno.EIO) -> None:
        self.count = 0
        self.log: list[str] = []
        for name in CALLS:
            self._wrap(patch, name, getattr(posix, name), at, code)

    def _wrap(self, patch: pytest.MonkeyPatch, name: str, real: Any, at: int, code: int) -> None:
        def call(*arguments: Any) -> Any:
            self.count += 1
            self.log.append(name)
            if self.count - 1 == at:
                if name == "read_exactly":  # translates by itself
                    raise StorageError(f"could not read: {os.strerror(code)}")
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        patch.setattr(posix, name, call)


def write(path: Path, table: Any, **options: Any) -> None:
    with Writer(path, classes=5, shard_rows=40, **options) as writer:
        done = len(writer.done)
        if done < 100:
            writer.write(table.ids[done:], table.logits[done:], table.labels[done:])


def count_calls(path: Path, table: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        fault = Fault(patch)
        write(path, table)
    return fault.count


def check_every(numbers: list[int], name: str, tmp_path: Path, table: Any, content: Any, patching: Any) -> None:
    expected = list(content(tmp_path / name).values())
    for number in numbers:
        path = tmp_path / f"{number}-{name}"
        code = (errno.ENOSPC, errno.EIO)[number % 2]
        with patching.context() as patch:
            Fault(patch, number, code)
            with contextlib.suppress(StorageError):
                write(path, table)
        try:
            write(path, table, resume=True)
        except UsageError as error:
            if "finished" not in str(error):
                raise
        assert list(content(path).values()) == expected, f"call {number}"
        assert verify(path).ok
        assert [p for p in tmp_path.rglob(".tmp-*")] == []


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_a_call_that_fails_is_a_storage_error_and_resuming_gives_the_same_bytes(
    tmp_path: Path, table: Any, content: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    total = count_calls(tmp_path / name, table, monkeypatch)
    assert total > 60
    numbers = sorted(np.random.default_rng(0).choice(total, 24, replace=False).tolist())
    check_every(numbers, name, tmp_path, table, content, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_every_call_that_fails_is_a_storage_error_and_resuming_gives_the_same_bytes(
    tmp_path: Path, table: Any, content: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    total = count_calls(tmp_path / name, table, monkeypatch)
    check_every(list(range(total)), name, tmp_path, table, content, monkeypatch)


def test_the_order_of_publishing_is_write_sync_link_sync(
    tmp_path: Path, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(monkeypatch)
    write(tmp_path / "teacher", table)
    calls = [c for c in fault.log if c not in ("unlink", "read_exactly", "make_read_only", "truncate")]
    assert calls[0] == "make_folder"
    publishing = {"create": 0, "pwrite_all": 1, "fsync": 2, "link": 3, "rename": 3, "fsync_folder": 4}
    step = 4
    for call in calls[1:]:
        if publishing[call] == 0:
            assert step in (2, 4, 1), fault.log  # the short last shard begins while the long one is open
        else:
            assert publishing[call] in (step, step + 1), fault.log
        step = publishing[call]
    assert step == 4


def test_short_writes_go_on(tmp_path: Path, table: Any, folder: Path, content: Any, monkeypatch: Any) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:7], offset))
    write(tmp_path / "other", table)
    assert content(tmp_path / "other") == content(folder)


def test_short_reads_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 7), offset))
    assert verify(folder).ok


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK])
def test_a_file_system_without_links_gets_a_rename(
    tmp_path: Path, table: Any, folder: Path, content: Any, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(posix, "link", link)
    write(tmp_path / "other", table)
    assert content(tmp_path / "other") == content(folder)
    (tmp_path / "new").write_text("new")
    assert not posix.publish(tmp_path / "new", folder / "manifest.json")
    assert not (tmp_path / "new").exists()
    assert verify(folder).ok


def test_publishing_never_overwrites(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
    assert not posix.publish(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    assert not (tmp_path / "new").exists()
    assert not posix.write_file(tmp_path / "old", b"new", replace=False)
    assert (tmp_path / "old").read_text() == "old"
    assert posix.write_file(tmp_path / "old", b"new", replace=True)
    assert (tmp_path / "old").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("name", ["create", "pwrite_all", "make_read_only", "fsync", "link", "fsync_folder"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_small_file_that_fails_leaves_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, replace: bool
) -> None:
    name = "rename" if replace and name == "link" else name
    monkeypatch.setattr(posix, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StorageError, match="disk is full"):
        posix.write_file(tmp_path / "x", b"data", replace=replace)
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if name == "fsync_folder" else [])


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "I/O error"),
        (errno.ENAMETOOLONG, "mend the cause"),
    ],
)
def test_an_error_says_what_to_do(code: int, advice: str) -> None:
    with pytest.raises(StorageError, match=advice) as caught, posix.translated("write", Path("x")):
        raise OSError(code, os.strerror(code))
    assert str(caught.value).startswith("could not write x: ")


def test_reading_says_what_a_file_is_not(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError, match="is missing"):
        posix.open_regular(tmp_path / "x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"12345")
    for name in ("fifo", "link", "."):
        with pytest.raises(CorruptCacheError, match="regular files only"):
            posix.open_regular(tmp_path / name)
    with pytest.raises(CorruptCacheError, match="limit of 4"):
        posix.read_file(tmp_path / "file", 4)
    assert posix.read_file(tmp_path / "file", 5) == b"12345"
    fd, size = posix.open_regular(tmp_path / "file")
    assert size == 5
    with pytest.raises(CorruptCacheError, match="ends at byte 5, expected 6"):
        posix.read_exactly(fd, 2, 4, tmp_path / "file")
    os.close(fd)


LIMITED = """
import resource, sys, numpy as np
from kdcache.errors import StorageError
from kdcache.store.writer import Writer
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with Writer(sys.argv[1], classes=20, shard_rows=1000) as writer:
        for start in range(0, 3000, 250):
            writer.write(np.arange(start, start + 250), np.zeros((250, 20), np.float32))
except StorageError as error:
    assert "file-size limit" in str(error), error
    sys.exit(error.exit_code)
"""


def test_a_file_size_limit_is_a_storage_error_and_no_signal(tmp_path: Path, python: Any) -> None:
    for number, limit in enumerate((10, 2000, 30_000)):
        assert python(LIMITED, tmp_path / str(number), limit, check=False).returncode == 1
        assert not (tmp_path / str(number) / "manifest.json").exists()
        assert [p for p in tmp_path.rglob(".tmp-*")] == []
    assert python(LIMITED, tmp_path / "enough", 10**9).returncode == 0


def test_a_full_disk_in_the_middle_keeps_what_is_committed(
    tmp_path: Path, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a real full disk does it: from some byte on, every write fails."""
    real, left = os.pwrite, [9000]

    def pwrite(fd: int, data: Any, offset: int) -> int:
        count = min(len(data), left[0])
        if count == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= count
        return real(fd, memoryview(data)[:count], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(KDCacheError, match="disk is full"):
            write(tmp_path / "teacher", table)
    with Writer(tmp_path / "teacher", classes=5, resume=True) as writer:
        done = len(writer.done)
        assert done in (40, 80)
        writer.write(table.ids[done:], table.logits[done:], table.labels[done:])
    assert verify(tmp_path / "teacher").ok
