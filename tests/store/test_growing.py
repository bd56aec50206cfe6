"""A file that grows: what is written is there, what is cut off is gone, and a lost line is never passed over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kdcache.errors import MismatchError, StorageError
from kdcache.store.growing import GrowingFile


def test_writes_are_there_at_once_and_go_on_where_the_file_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "x"
    file = GrowingFile(path)
    assert file.write(b"one") == 3
    assert path.read_bytes() == b"one"
    assert file.sync() == 3
    file.write(b"two")
    file.close()
    file.close()
    again = GrowingFile(path, keep_bytes=3)
    assert path.read_bytes() == b"one"
    again.write(b"three")
    again.flush()
    again.close()
    assert path.read_bytes() == b"onethree"


def test_without_a_length_to_keep_it_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    GrowingFile(tmp_path / "x").close()
    assert (tmp_path / "x").read_bytes() == b""


def test_a_file_that_has_lost_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12")
    with pytest.raises(MismatchError, match="2 bytes, and 3 when the checkpoint was written"):
        GrowingFile(tmp_path / "x", keep_bytes=3)
    assert (tmp_path / "x").read_bytes() == b"12"


def test_after_a_failed_write_it_never_says_that_all_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = GrowingFile(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="disk is full"):
            file.write(b"lost")
    for call in (file.sync, file.close, file.close):
        with pytest.raises(StorageError, match="disk is full"):
            call()


def test_a_file_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="could not open"):
        GrowingFile(tmp_path)
