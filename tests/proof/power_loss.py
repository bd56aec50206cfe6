"""What a power cut may leave of a folder, from a recording of every call that changed it.

`Tape` records a job through `Disk`: writes, sizes, names, and the fsyncs of files and folders, in the order in which
they happened. `Tape.cut` builds the folder as it may be found after a cut behind any of them. The model is no
file system's, but the weakest that POSIX allows one to be and that a journal may not excuse:

* What fsync of a file returned for is there: its bytes and its size, not its name.
* Of later writes to it each sector of 512 bytes of each write is there or not, whatever the order they came in, so
  that an old write may show through a new one. The size is the old one, the new one, or any between; where no data
  came, there are zeros, or (ext4 and XFS with data=writeback) what somebody else had deleted.
* What fsync of a folder returned for is there: the names in this folder, not the folder's own name in its parent.
* Of later changes to its names any subset is there, or any beginning, and folders know nothing of each other: a link
  may be there without the temporary name it was made from, an unlink before the link that came first. One rename is
  one change, as in every journal. A folder whose name is lost takes with it what was synced inside of it.
* Whatever is mapped, cached or held by an open descriptor is gone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disk_calls import Call

SECTOR = 512


@dataclass(eq=False)
class File:
    """A file, whatever names it has: the number and content of each change; `synced` are the numbers of fsyncs."""

    first: bytes = b""
    changes: list[tuple[int, int, bytes | None]] = field(default_factory=list)  # number, offset or size, data
    synced: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Folder:
    """A folder: each change gives names to things, or takes them (None)."""

    first: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[tuple[int, dict[str, File | Folder | None]]] = field(default_factory=list)
    synced: list[int] = field(default_factory=list)


class Tape:
    """A recording; `record` is the `after` of a `Disk`.

    Args:
        root: the folder, as it is now: all of it is on the disk.

    Attributes:
        length: how many changes and fsyncs were recorded.
        begun: the first moment at which a cut is of interest.
        marks: what the job believed, and from which number on (`mark`).
    """

    def __init__(self, root: Path) -> None:
        self.length = self.begun = 0
        self.marks: list[tuple[int, tuple[str, str]]] = []
        self._root = os.path.realpath(root)
        self._top = _as_found(root)
        self._now: dict[str, File | Folder] = dict(_paths(self._top, self._root))
        self._open: dict[int, File | Folder] = {}

    def mark(self, belief: tuple[str, str]) -> None:
        """Notes something that holds from here on."""
        self.marks.append((self.length, belief))

    def record(self, call: Call, result: Any) -> None:
        """One call that has succeeded."""
        given = call.arguments
        if call.name in ("open", "create"):
            if call.name == "create":
                self._rename({call.path: File()})
            self._open[result] = self._now[call.path]
        elif call.name == "close":
            self._open.pop(given[0], None)
        elif call.name == "pwrite":
            self._file(given[0]).changes.append((self._next(), given[2], bytes(given[1])[:result]))
        elif call.name == "ftruncate":
            self._file(given[0]).changes.append((self._next(), given[1], None))
        elif call.name == "fsync":
            self._open[given[0]].synced.append(self._next())
        elif call.name == "mkdir":
            self._rename({call.path: Folder()})
        elif call.name == "link":
            self._rename({call.path: self._now[_path(given[0])]})
        elif call.name == "replace":
            self._rename({call.path: self._now[_path(given[0])], _path(given[0]): None})
        elif call.name in ("unlink", "rmdir"):
            self._rename({call.path: None})

    def cut(self, at: int, to: Path, rng: random.Random) -> tuple[int, int]:
        """Builds as `to` what may be found after a cut behind change number `at`.

        Returns:
            How many changes that no fsync followed are there, and how many are lost; of a write each sector counts.
        """
        fate = _Fate(rng)
        _build(self._top, to, at, fate)
        return fate.kept, fate.lost

    def whole(self, to: Path) -> None:
        """Builds what is there without a cut: equal to the folder itself, or something was not recorded."""
        _build(self._top, to, self.length, None)

    def _next(self) -> int:
        self.length += 1
        return self.length

    def _file(self, descriptor: int) -> File:
        found = self._open[descriptor]
        assert isinstance(found, File)
        return found

    def _rename(self, names: dict[str, File | Folder | None]) -> None:
        parents = {os.path.dirname(path) for path in names}
        assert len(parents) == 1, "a rename between two folders is two changes, which nobody makes here"
        parent = self._now[parents.pop()]
        assert isinstance(parent, Folder)
        parent.changes.append((self._next(), {os.path.basename(path): what for path, what in names.items()}))
        for path, what in names.items():
            if what is None:
                del self._now[path]
            else:
                self._now[path] = what


class _Fate:
    """What becomes of the changes that no fsync followed, drawn anew for each file and folder."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.kept = self.lost = 0
        self._contents: dict[int, bytes] = {}  # a file with two names is one file

    def content(self, file: File, at: int) -> bytes:
        """The bytes of a file."""
        if id(file) not in self._contents:
            self._contents[id(file)] = self._drawn(file, at)
        return self._contents[id(file)]

    def _drawn(self, file: File, at: int) -> bytes:
        rng, rate = self._rng, self._rng.choice((0.0, 0.3, 0.7, 1.0))
        fill = bytes if rng.random() < 0.7 else rng.randbytes
        synced = max((number for number in file.synced if number <= at), default=0)
        data = bytearray(file.first)
        sizes = [len(data)]
        for number, offset, block in file.changes:
            if number > at:
                break
            if number < synced:
                sizes = [_apply(data, offset, block, bytes)]
                continue
            sizes.append(offset if block is None else max(sizes[-1], offset + len(block)))
            if block is None:
                if self._keeps(rate):
                    _apply(data, offset, None, fill)
                continue
            first = offset
            while first < offset + len(block):
                stop = min(offset + len(block), first - first % SECTOR + SECTOR)
                if self._keeps(rate):
                    _apply(data, first, block[first - offset : stop - offset], fill)
                first = stop
        size = rng.choice((sizes[0], sizes[-1], rng.randint(min(sizes), max(sizes))))
        _apply(data, size, None, fill)
        return bytes(data)

    def _keeps(self, rate: float) -> bool:
        kept = self._rng.random() < rate
        self.kept += kept
        self.lost += not kept
        return kept

    def names(self, folder: Folder, at: int) -> dict[str, File | Folder]:
        """The names in a folder."""
        rng, rate = self._rng, self._rng.choice((0.0, 0.3, 0.7, 1.0))
        synced = max((number for number in folder.synced if number <= at), default=0)
        names = dict(folder.first)
        later = [changed for number, changed in folder.changes if synced < number <= at]
        if rng.random() < 0.5:
            kept = later[: rng.randint(0, len(later))]
        else:
            kept = [changed for changed in later if rng.random() < rate]
        self.kept += len(kept)
        self.lost += len(later) - len(kept)
        for changed in [*(c for number, c in folder.changes if number <= min(at, synced)), *kept]:
            _give(names, changed)
        return names


def _apply(data: bytearray, offset: int, block: bytes | None, fill: Callable[[int], bytes]) -> int:
    """One change: a size (without a block), or a write; returns the size."""
    stop = offset if block is None else offset + len(block)
    if len(data) < stop:
        data += fill(stop - len(data))
    if block is None:
        del data[offset:]
    else:
        data[offset:stop] = block
    return len(data)


def _give(names: dict[str, File | Folder], changed: dict[str, File | Folder | None]) -> None:
    for name, what in changed.items():
        if what is None:
            names.pop(name, None)
        else:
            names[name] = what


def _build(folder: Folder, to: Path, at: int, fate: _Fate | None) -> None:
    to.mkdir()
    names = dict(folder.first)
    if fate is None:
        for _, changed in folder.changes:
            _give(names, changed)
    else:
        names = fate.names(folder, at)
    for name, what in names.items():
        if isinstance(what, Folder):
            _build(what, to / name, at, fate)
        else:
            (to / name).write_bytes(_everything(what) if fate is None else fate.content(what, at))


def _everything(file: File) -> bytes:
    data = bytearray(file.first)
    for _, offset, block in file.changes:
        _apply(data, offset, block, bytes)
    return bytes(data)


def _as_found(folder: Path) -> Folder:
    return Folder({p.name: _as_found(p) if p.is_dir() else File(p.read_bytes()) for p in folder.iterdir()})


def _paths(folder: Folder, where: str) -> Iterator[tuple[str, File | Folder]]:
    yield where, folder
    for name, what in folder.first.items():
        if isinstance(what, Folder):
            yield from _paths(what, f"{where}/{name}")
        else:
            yield f"{where}/{name}", what


def _path(target: Any) -> str:
    return os.path.abspath(os.fsdecode(target))
