"""The calls that write: what each does, and what it says when it cannot (tests/proof lets every single one fail)."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from kdcache.errors import CorruptCacheError, IncompleteCacheError, KDCacheError, StorageError
from kdcache.store import posix
from kdcache.store.verify import verify
from kdcache.store.writer import Writer


def write(path: Path, table: Any, **options: Any) -> None:
    with Writer(path, classes=5, shard_rows=40, **options) as writer:
        done = len(writer.done)
        if done < 100:
            writer.write(table.ids[done:], table.logits[done:], table.labels[done:])


def test_the_order_of_publishing_is_write_sync_link_sync(
    tmp_path: Path, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing = {"create": 0, "pwrite_all": 1, "fsync": 2, "link": 3, "rename": 3, "fsync_folder": 4}
    log: list[str] = []

    def logged(name: str, real: Any) -> Any:
        return lambda *arguments: (log.append(name), real(*arguments))[1]

    for name in publishing:
        monkeypatch.setattr(posix, name, logged(name, getattr(posix, name)))
    write(tmp_path / "teacher", table)
    calls = log[log.index("create") :]
    assert set(log[: -len(calls)]) == {"fsync_folder"}  # of the folders that were made
    step = 4
    for call in calls:
        if publishing[call] == 0:
            assert step in (2, 4, 1), calls  # the short last shard begins while the long one is open
        else:
            assert publishing[call] in (step, step + 1), calls
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


def test_what_a_path_leads_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    kinds = {"file": "file", "fifo": "other", "link": "file", ".": "folder"}
    for name in ("file", "fifo", "link", ".", "dangling", "loop", "missing", "file/below"):
        assert posix.kind_of(tmp_path / name) == kinds.get(name)
        assert posix.exists(tmp_path / name) == (name in kinds)
    assert posix.is_file(tmp_path / "link")
    assert not posix.is_file(tmp_path)
    assert posix.is_folder(tmp_path)
    assert [n for n in ("file", "link", "dangling", "missing", "file/below") if posix.is_link(tmp_path / n)] == [
        "link",
        "dangling",
    ]
    assert posix.names_in(tmp_path) == ["dangling", "fifo", "file", "link", "loop"]
    assert posix.names_in(tmp_path / "missing") == posix.names_in(tmp_path / "file") == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_path_that_cannot_be_looked_at_is_not_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    for name in ("stat", "lstat", "listdir"):
        monkeypatch.setattr(os, name, refuse)
    for look in (posix.kind_of, posix.exists, posix.is_file, posix.is_folder, posix.is_link, posix.names_in):
        with pytest.raises(StorageError, match=os.strerror(code)):
            look(tmp_path)


def test_the_names_of_folders_that_are_made_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(posix, "fsync_folder", synced.append)
    posix.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path.parent, tmp_path, tmp_path / "a"]
    posix.make_folder(tmp_path / "a" / "b")  # whoever made it may have been killed before the fsync
    assert synced[3:] == [tmp_path / "a"]
    posix.make_folder(tmp_path / "a" / "c")
    assert synced[4:] == [tmp_path, tmp_path / "a"]
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError):
            posix.make_folder(path)


def test_a_folder_below_one_that_may_not_be_read_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(posix, "fsync_folder", refuse)
    posix.make_folder(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


def test_a_write_of_nothing_is_an_error_and_no_endless_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(StorageError, match="wrote nothing"):
        posix.write_file(tmp_path / "x", b"data", replace=True)


def test_a_temporary_file_is_in_hand_until_it_is_renamed_published_or_dropped(tmp_path: Path) -> None:
    first, second, third = (posix.new_temporary(tmp_path / "x") for _ in range(3))
    for path in (first, second, third):
        assert posix.is_in_hand(path.name, os.getpid())
        path.write_bytes(b"")
    posix.rename(first, tmp_path / "x")
    assert not posix.publish(second, tmp_path / "x")
    posix.drop(third)
    assert not any(posix.is_in_hand(path.name, os.getpid()) for path in (first, second, third))
    assert os.listdir(tmp_path) == ["x"]
    assert posix.is_in_hand(first.name, os.getppid())
    assert not posix.is_in_hand(first.name, 2**22 + 1)  # above the largest process id of Linux


def test_a_name_that_is_taken_is_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(posix, "fsync_folder", synced.append)
    for _ in range(2):
        posix.write_file(tmp_path / "x", b"data", replace=False)
    assert synced == [tmp_path] * 2


def test_an_error_of_close_says_nothing_about_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "x").write_bytes(b"data")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        assert posix.read_file(tmp_path / "x", 4) == b"data"


def test_a_file_that_can_be_opened_and_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "x").write_bytes(b"data")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", refuse)
        with pytest.raises(StorageError, match="could not look at"):
            posix.read_file(tmp_path / "x", 4)


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
