"""What `--overwrite` may remove: caches, and nothing that could be somebody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import UsageError
from kdcache.store.removal import remove_one_file
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
