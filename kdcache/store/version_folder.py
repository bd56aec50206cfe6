"""Versions of a cache side by side in one folder, for a teacher that changes: the list of them is what counts.

    OUT/versions.json   the complete versions, sealed; the last one is current
    OUT/v000001/        a complete cache each, or one that is being written, which the list does not name

A version is listed after its manifest is on the disk, and taken off the list before its files go. So whoever reads
the list finds complete caches, whenever a writer is killed; what is not listed is cleared away by the next writer.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from kdcache.errors import CorruptCacheError, IncompleteCacheError, KDCacheError, MismatchError, UsageError
from kdcache.format.manifest import HEX64
from kdcache.format.sealed import dump_sealed, load_sealed
from kdcache.format.strict_json import MAX_JSON_BYTES
from kdcache.store import posix
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.store.folder import VERSIONS as LIST_NAME
from kdcache.store.locks import FINISH, let_go, lock_file
from kdcache.store.posix import TEMPORARY_PREFIX
from kdcache.store.removal import remove_dump, remove_empty
from kdcache.store.shards import remove_temporaries

FORMAT = 1
_FOLDER = re.compile(r"v(\d{6})")
_LAST = 999_999
_ADVICE = "fetch it again, or refresh into another folder"
_TRIES = 10  # a reader that loses this race ten times has met something else


@final
@dataclass(frozen=True)
class Version:
    """A complete cache of the list.

    Attributes:
        number: from 1 on, never given twice; also its generation, as its provenance has it.
        root: its root hash.
        teacher: sha256 (hex) of the teacher's tensors.
        asked: sha256 (hex) of the data and the settings that it was dumped with.
        step: optimiser step of the student's run after which it was made; None outside of one.
    """

    number: int
    root: str
    teacher: str
    asked: str
    step: int | None

    @property
    def name(self) -> str:
        """Of its folder."""
        return version_name(self.number)


def version_name(number: int) -> str:
    """The folder of a version.

    Raises:
        UsageError: there are no more numbers.

    >>> version_name(3)
    'v000003'
    """
    if number > _LAST:
        raise UsageError(f"a folder has room for {_LAST:,} versions; go on in another one")
    return f"v{number:06}"


def listed_versions(folder: Path) -> tuple[Version, ...]:
    """The complete versions, oldest first; none where there is no list.

    Raises:
        CorruptCacheError: the list is not what `write_list` wrote.
    """
    path = folder / LIST_NAME
    try:
        text = posix.read_file(path, MAX_JSON_BYTES)
    except IncompleteCacheError:
        return ()
    content = load_sealed(text, where=str(path), advice=_ADVICE)
    form, entries = content.get("kdcache_versions"), content.get("versions")
    if content.keys() != {"kdcache_versions", "versions"} or type(form) is not int or form != FORMAT:
        raise CorruptCacheError(f"{path} is no list of versions of format {FORMAT}; {_ADVICE}")
    if not isinstance(entries, list) or not entries:
        raise CorruptCacheError(f"{path}: a list of versions names at least one; {_ADVICE}")
    found = tuple(_parse(entry, path) for entry in entries)
    if any(a.number >= b.number for a, b in itertools.pairwise(found)):
        raise CorruptCacheError(f"{path}: the numbers of the versions do not rise; {_ADVICE}")
    return found


def write_list(folder: Path, versions: Sequence[Version]) -> None:
    """Replaces the list in one step; the last version is then current."""
    content = {"kdcache_versions": FORMAT, "versions": [asdict(version) for version in versions]}
    posix.write_file(folder / LIST_NAME, dump_sealed(content), replace=True)


def open_version(folder: Path, version: Version) -> Cache:
    """A version, with all its parts mapped: it stays readable where its files are removed meanwhile.

    Raises:
        IncompleteCacheError: it was dropped.
        CorruptCacheError, MismatchError: another cache lies there.
    """
    cache = open_cache(folder / version.name, expect_root=version.root)
    cache.keep()
    return cache


def current_version(folder: Path) -> Cache | None:
    """The latest complete version, None where there is none yet; safe beside a process that writes and drops versions.

    Raises:
        IncompleteCacheError, CorruptCacheError, MismatchError: it is listed and cannot be opened.
    """
    for _ in range(_TRIES):
        versions = listed_versions(folder)
        if not versions:
            return None
        try:
            return open_version(folder, versions[-1])
        except KDCacheError:
            if listed_versions(folder) == versions:
                raise  # nobody dropped it
    raise IncompleteCacheError(f"the versions in {folder} change faster than one can be opened; try again")


def version_of_root(folder: Path, root: str) -> Cache:
    """The version with a root hash.

    Raises:
        IncompleteCacheError: there is none, or it was dropped.
    """
    for version in listed_versions(folder):
        if version.root == root:
            return open_version(folder, version)
    raise IncompleteCacheError(
        f"{folder} holds no version with the root hash {root}: it was dropped; keep more of them, or start anew"
    )


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Makes the folder if need be, and keeps other writers out.

    Raises:
        UsageError: it holds something else than versions, or is none.
        MismatchError: another process writes a version.
        StorageError: it cannot be written.
    """
    if posix.kind_of(folder) not in ("folder", None):
        raise UsageError(f"{folder} exists and is not a folder; choose another one for the versions")
    foreign = [name for name in posix.names_in(folder) if not _is_ours(name)]
    if foreign:
        raise UsageError(
            f"{folder} holds {foreign[0]!r}, which is no version of a cache; choose another or an empty folder"
        )
    with posix.translated("write", folder):
        posix.make_folder(folder)
    locks = lock_file(folder)
    if not locks.try_lock(FINISH):
        raise MismatchError(f"process {locks.holder(FINISH)} is writing a version in {folder}; wait for it or stop it")
    try:
        yield
    finally:
        locks.unlock(FINISH)


def sweep(folder: Path, keep: Sequence[str]) -> None:
    """Removes what killed writers left and what was taken off the list; the caller is the only writer.

    Args:
        folder: of the versions.
        keep: names of folders that stay.
    """
    remove_temporaries(folder)
    for name in posix.names_in(folder):
        if _FOLDER.fullmatch(name) and name not in keep:
            remove_version(folder / name)


def remove_version(folder: Path) -> None:
    """Removes a version's folder; readers that have mapped it read on.

    Raises:
        UsageError: it holds something that is not a cache's.
        MismatchError: another process works on it.
    """
    remove_dump(folder)
    let_go(folder)
    remove_empty(folder)


def remove_versions(folder: Path) -> None:
    """Removes a folder of versions, the list first; nothing where there is none.

    Raises:
        UsageError: it holds something else.
        MismatchError: another process writes a version.
    """
    if not posix.exists(folder):
        return
    with only_writer(folder):
        with posix.translated("remove", folder):
            posix.unlink(folder / LIST_NAME)
            posix.fsync_folder(folder)
        sweep(folder, ())
    let_go(folder)
    remove_empty(folder)


def _is_ours(name: str) -> bool:
    return name in (LIST_NAME, ".lock") or name.startswith(TEMPORARY_PREFIX) or bool(_FOLDER.fullmatch(name))


def _parse(entry: Any, path: Path) -> Version:
    names = set(Version.__dataclass_fields__)
    if not isinstance(entry, dict) or entry.keys() != names:
        raise CorruptCacheError(f"{path}: a version has the fields {', '.join(sorted(names))}; {_ADVICE}")
    number, step = entry["number"], entry["step"]
    hashes = [entry[name] for name in ("root", "teacher", "asked")]
    is_counted = type(number) is int and 1 <= number <= _LAST and (step is None or (type(step) is int and step >= 0))
    if not is_counted or not all(isinstance(text, str) and HEX64.fullmatch(text) for text in hashes):
        raise CorruptCacheError(f"{path}: a number or a hash of a version is not one; {_ADVICE}")
    return Version(**entry)
