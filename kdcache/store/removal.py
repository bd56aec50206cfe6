"""What may be replaced, and how it is removed: only caches and dumps, never a file that is not ours."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from kdcache.errors import CorruptCacheError, MismatchError, UsageError
from kdcache.format.head import HEAD_FILE
from kdcache.format.manifest import CLASSES_FILE, SHARD_NAME
from kdcache.store import posix
from kdcache.store.folder import MANIFEST, PLAN, SHARDS
from kdcache.store.locks import lock_file
from kdcache.store.parts import read_catalog
from kdcache.store.posix import TEMPORARY_PREFIX
from kdcache.store.shards import remove_temporaries

_IN_SHARDS = re.compile(rf"{SHARD_NAME.pattern[:-2]}(h5|json)|\.tmp-.*")
_OURS = {MANIFEST, PLAN, SHARDS, ".lock", "README.md", CLASSES_FILE, HEAD_FILE}


def refuse_foreign(folder: Path) -> None:
    """Refuses a path that is not a folder, or a folder with files that are not a dump's.

    Raises:
        UsageError: naming the first foreign entry.
        CorruptCacheError: the folder of the shards is a link.
    """
    kind = posix.kind_of(folder)
    if kind is None:
        return
    if kind != "folder":
        raise UsageError(f"{folder} exists and is not a folder; choose another --out")
    if posix.is_link(folder / SHARDS):  # what is removed there would be somebody's files
        raise CorruptCacheError(f"{folder / SHARDS} is a symbolic link; a cache holds a folder of its own there")
    names = set(posix.names_in(folder))
    shards = posix.names_in(folder / SHARDS) if posix.is_folder(folder / SHARDS) else []
    foreign = sorted(n for n in names - _OURS if not n.startswith(TEMPORARY_PREFIX))
    foreign += sorted(f"{SHARDS}/{n}" for n in shards if not _IN_SHARDS.fullmatch(n))
    if names and not names & {MANIFEST, PLAN, SHARDS, ".lock"}:
        foreign = sorted(names)  # a README.md alone is somebody's
    if foreign:
        raise UsageError(
            f"{folder} exists and holds {foreign[0]!r}, which is not part of a cache; choose another or an empty --out"
        )


def remove_dump(folder: Path) -> None:
    """Removes a cache or a dump in progress (`--overwrite`); the manifest goes first.

    Raises:
        UsageError: the folder holds something else, which is never removed.
        MismatchError: another process works on it.
    """
    refuse_foreign(folder)
    if not posix.exists(folder):
        return
    locks = lock_file(folder)
    with posix.translated("lock", folder):
        if not locks.try_lock_all():
            raise MismatchError(f"{folder} is in use by process {locks.holder(0, 0)}; wait for it or stop it")
    try:
        clear_dump(folder)
    finally:
        locks.unlock_all()


def remove_one_file(path: Path) -> None:
    """Removes a one-file cache (`--overwrite`) and what a process left that was killed while it wrote one.

    Raises:
        UsageError: not a cache, or so damaged that it cannot be told from a file of somebody else's.
    """
    remove_temporaries(path.parent, path.name, of_the_dead=True)
    if not posix.is_file(path):
        return
    try:
        read_catalog(path)
    except CorruptCacheError as error:
        raise UsageError(
            f"{path} cannot be read as a cache, and only caches are replaced: remove it yourself, or choose another "
            f"--out ({error})"
        ) from error
    with posix.translated("remove", path):
        posix.unlink(path)
        posix.fsync_folder(path.parent)


def clear_dump(folder: Path) -> None:
    """Removes the files of a dump, as far as they are there; the caller holds the lock FINISH."""
    remove_temporaries(folder)
    with posix.translated("remove", folder), contextlib.suppress(FileNotFoundError):
        # The plan goes last: shards and records without one could be taken for those of the next plan.
        for name in (MANIFEST, "README.md", CLASSES_FILE, HEAD_FILE):
            posix.unlink(folder / name)
        posix.fsync_folder(folder)
        if posix.is_folder(folder / SHARDS):
            for name in sorted(posix.names_in(folder / SHARDS), key=lambda n: not n.endswith(".json")):
                posix.unlink(folder / SHARDS / name)
            posix.fsync_folder(folder / SHARDS)
        posix.unlink(folder / PLAN)
        posix.fsync_folder(folder)


def clear_parts(folder: Path, merged: Path) -> None:
    """Removes the shards that were merged into a file, once the file's name is on the disk: whoever gave it the name
    may have been killed before that. The caller holds the lock FINISH."""
    with posix.translated("write", merged):
        posix.fsync_folder(merged.parent)
    remove_temporaries(merged.parent, merged.name)
    clear_dump(folder)
    remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Removes a dump folder that `clear_dump` has emptied; whatever else is in it stays."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileNotFoundError):  # another process that leaves is a step ahead
            (folder / SHARDS).rmdir()
        (folder / ".lock").unlink(missing_ok=True)
        folder.rmdir()
