"""What a path holds before a dump begins: which dump, whether rows of it are stored, and who is at work on it.

A command compares this with as much of its own plan as it knows by then, so that a refusal waits neither for torch
nor for the teacher (2 s and more). Nothing is written or locked here: what decides is the comparison of whole plans
under the lock (`DumpFolder.join`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import IncompleteCacheError, StorageError
from kdcache.format.strict_json import MAX_JSON_BYTES
from kdcache.store import posix
from kdcache.store.folder import MANIFEST, PLAN, SHARDS, read_manifest
from kdcache.store.locks import PRESENT, lock_file
from kdcache.store.parts import read_catalog
from kdcache.store.plan import first_difference, parse_plan, plan_of_manifest, raise_difference
from kdcache.store.writer import dump_folder_of


@dataclass(frozen=True)
class Occupant:
    """The dump at a path.

    Attributes:
        path: the folder or the one file.
        plan: as in `plan.json`; what a one-file cache does not know (`shard_rows`) is left out.
        is_stored: rows of it are on the disk.
        holder: a process at work on it, where there is one and the system tells.
    """

    path: Path
    plan: dict[str, Any]
    is_stored: bool
    holder: int | None

    def field(self, *names: str) -> Any:
        """A value of the plan; None where it is not said, as in the free provenance of a `Writer`."""
        value: Any = self.plan
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def refuse_other(self, known: dict[str, Any]) -> None:
        """Compares the dump with what a command knows of its plan.

        A plan by which nothing was stored and nobody works is a first try that failed: it is in nobody's way.

        Raises:
            MismatchError: naming the first field that differs, with both values, and the holder.
        """
        told = {name: value for name, value in known.items() if name in self.plan}
        if self._agrees_on_views(told.get("views")):
            del told["views"]
        difference = first_difference(self.plan, told, is_partial=True)
        if difference is not None and (self.is_stored or self.holder is not None):
            raise_difference(difference, where=str(self.path), holder=self.holder)

    def _agrees_on_views(self, asked: Any) -> bool:
        """Whether these views are the first of those that are there, or a folder can be grown to them."""
        held = self.plan.get("views")
        if not isinstance(asked, list) or not isinstance(held, list):
            return False
        return asked == held[: len(asked)] or (held == asked[: len(held)] and not posix.is_file(self.path))


def occupant(out: Path) -> Occupant | None:
    """The dump at `out`, finished or not; None where there is none.

    Raises:
        CorruptCacheError: a plan, a manifest or a file that our writer did not write.
    """
    folder, _ = dump_folder_of(out)
    try:
        if posix.exists(folder / MANIFEST):
            plan = plan_of_manifest(read_manifest(folder), samples_known=True)
            return Occupant(out, plan.to_json(), True, _holder(folder))
        if posix.exists(folder / PLAN):
            path = folder / PLAN
            plan = parse_plan(posix.read_file(path, MAX_JSON_BYTES), where=str(path))
            is_stored = any(name.endswith(".h5") for name in posix.names_in(folder / SHARDS))
            return Occupant(out, plan.to_json(), is_stored, _holder(folder))
    except IncompleteCacheError:
        pass  # another process has finished it since, and cleared the folder away
    if not posix.is_file(out):
        return None
    catalog = read_catalog(out)
    known = {"samples": catalog.samples, "views": list(catalog.views), "provenance": catalog.provenance}
    return Occupant(out, {**catalog.schema.to_json(), **known}, True, _holder(folder))


def _holder(folder: Path) -> int | None:
    if not posix.exists(folder / ".lock"):
        return None
    try:
        return lock_file(folder).holder(PRESENT)
    except StorageError:  # read-only: nobody works there
        return None
