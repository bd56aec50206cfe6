"""A CSV file written in one piece: streamed to a temporary name, then published durably, never over another file.

Spreadsheets run a cell that begins with = + - @ (or a tab, a carriage return) as a formula, and ids and class names
come from other people's files. Such text gets an apostrophe in front, and so does text that begins with one: whoever
reads the file back takes one leading apostrophe off. Numbers stay as they are.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kdcache.errors import CorruptCacheError, UsageError
from kdcache.store import posix
from kdcache.store.shards import remove_temporaries

_RISKY = ("=", "+", "-", "@", "\t", "\r", "\n", "'")
_LINES = 8192


def safe_text(text: str) -> str:
    """Text that no spreadsheet runs.

    >>> safe_text("=1+1"), safe_text("cat/1.png"), safe_text("'quoted")
    ("'=1+1", 'cat/1.png', "''quoted")
    """
    return "'" + text if text.startswith(_RISKY) else text


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, overwrite: bool = False) -> int:
    """Writes a header and rows; text cells through `safe_text`, None as an empty cell; lines as in RFC 4180.

    Args:
        path: the file to make, in a folder that is made if need be.
        columns: the header.
        rows: of cells, drawn one by one.
        overwrite: replace the file if it exists.

    Returns:
        Rows written.

    Raises:
        UsageError: the file exists.
        StorageError: the disk refused; no part of the file is left.
    """
    refuse_existing(path, overwrite=overwrite)
    remove_temporaries(path.parent, path.name, of_the_dead=True)
    count = 0
    with posix.translated("write", path):
        posix.make_folder(path.parent)
        temporary = posix.new_temporary(path)
        try:
            fd = posix.create(temporary)
            try:
                end = _append(fd, 0, [columns])
                left = iter(rows)
                while lines := list(islice(left, _LINES)):
                    end = _append(fd, end, lines)
                    count += len(lines)
                posix.fsync(fd)
            finally:
                os.close(fd)
            if overwrite:
                posix.rename(temporary, path)
                posix.fsync_folder(path.parent)
            elif not posix.publish(temporary, path):
                refuse_existing(path, overwrite=False)
        except BaseException:
            posix.drop(temporary)
            raise
    return count


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuses a file that is there, or a folder.

    Raises:
        UsageError: naming it.
    """
    kind = posix.kind_of(path)
    if kind == "folder":
        raise UsageError(f"{path} is a folder; name a file in it")
    if kind is not None and not overwrite:
        raise UsageError(f"{path} exists; choose another name or pass --overwrite")


def check_output(path: Path, *, overwrite: bool, begins: bytes, what: str) -> None:
    """Refuses a place where a file of ours cannot go, before anything is computed.

    Args:
        path: the file to make, in a folder that is there.
        overwrite: replace it, if it is what the same command once made.
        begins: what such a file begins with.
        what: such a file, for the message.

    Raises:
        UsageError: there is no such folder; something is there, and is not to be replaced, or is something else.
    """
    refuse_existing(path, overwrite=overwrite)
    if posix.kind_of(path.parent) != "folder":
        raise UsageError(f"{path.parent} is no folder, so {path.name} cannot be made in it; make it first")
    if posix.kind_of(path) is None:
        return
    try:
        fd, size = posix.open_regular(path)
        try:
            is_ours = posix.read_exactly(fd, 0, min(size, len(begins)), path) == begins
        finally:
            posix.close_reader(fd)
    except CorruptCacheError:  # a link, or no regular file
        is_ours = False
    if not is_ours:
        raise UsageError(f"{path} is not {what}, so it is not replaced; choose another -o FILE")


def _append(fd: int, end: int, lines: Iterable[Sequence[Any]]) -> int:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([safe_text(cell) if isinstance(cell, str) else cell for cell in line] for line in lines)
    data = text.getvalue().encode("utf-8", "backslashreplace")
    posix.pwrite_all(fd, data, end)
    return end + len(data)
