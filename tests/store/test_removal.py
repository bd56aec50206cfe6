"""What `--overwrite` may remove: caches, and nothing that could be somebody else's."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import StorageError, UsageError
from kdcache.store import posix
from kdcache.store.merge import merge
from kdcache.store.removal import clear_parts, remove_one_file
from kdcache.store.verify import verify
from kdcache.store.writer import Writer


def test_a_one_file_cache_is_removed_and_a_missing_one_is_fine(make_cache: Any) -> None:
    path = make_cache("teacher.h5")
    remove_one_file(path)
    assert not path.exists()
    remove_one_file(path)


@pytest.mark.parametrize("content", [b"", b"letters", b"\x89HDF\r\n\x1a\n" + bytes(600)])
def test_what_is_not_readable_as_a_cache_stays_and_the_message_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.h5"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="remove it yourself"):
        remove_one_file(path)
    with pytest.raises(UsageError, match="remove it yourself"):
        Writer(path, classes=3, overwrite=True)
    assert path.read_bytes() == content


def test_a_writer_replaces_a_cache_when_asked_to(make_cache: Any) -> None:
    path = make_cache("teacher.h5")
    with Writer(path, classes=2, overwrite=True) as writer:
        writer.write([1], np.zeros((1, 2), np.float32))
    assert not [p for p in path.parent.iterdir() if p.name != "teacher.h5"]


def test_shards_go_only_when_the_name_of_their_one_file_is_on_the_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    merge(folder, tmp_path / "x.h5")
    (tmp_path / ".tmp-x.h5-1-0123abcd").write_bytes(b"left by a process that was killed")
    with monkeypatch.context() as patch:
        patch.setattr(posix, "fsync_folder", refuse)
        with pytest.raises(StorageError, match="I/O error"):
            clear_parts(folder, tmp_path / "x.h5")
    assert verify(folder).ok
    clear_parts(folder, tmp_path / "x.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_a_cache_that_is_replaced_takes_along_what_a_killed_process_left(make_cache: Any) -> None:
    path = make_cache("teacher.h5")
    path.with_name(".tmp-teacher.h5-4194305-0123abcd").write_bytes(b"")
    path.with_name(f".tmp-teacher.h5-{os.getppid()}-0123abcd").write_bytes(b"")
    remove_one_file(path)
    assert [p.name for p in path.parent.iterdir()] == [f".tmp-teacher.h5-{os.getppid()}-0123abcd"]
