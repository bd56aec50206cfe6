"""A dump in progress: a folder of shards that any number of processes fill, without talking to each other.

Each process takes the lock of a free shard, publishes it, writes its commit record, and goes on; whoever
finds all records present writes `manifest.json`. A kill costs at most the shard in hand of each process.
No manifest, no cache.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from kdcache.errors import CorruptCacheError, IncompleteCacheError, MismatchError
from kdcache.format.checksums import file_sha256
from kdcache.format.head import HEAD_FILE
from kdcache.format.headers import shard_header
from kdcache.format.manifest import (
    CLASSES_FILE,
    Manifest,
    ShardRecord,
    parse_manifest,
    parse_shard,
    shard_name,
)
from kdcache.format.sealed import dump_sealed, load_sealed
from kdcache.format.strict_json import MAX_JSON_BYTES
from kdcache.store import posix
from kdcache.store.folder import MANIFEST, PLAN, SHARDS, read_manifest
from kdcache.store.locks import FINISH, OWNER, PRESENT, lock_file
from kdcache.store.plan import Plan, check_shard_count, extends, parse_plan, plan_of_manifest, require_same_plan
from kdcache.store.removal import refuse_foreign
from kdcache.store.shards import ContainerWriter, remove_temporaries


class DumpFolder:
    """One process's view of a dump folder; get it from `open_dump`.

    `merged` is the one-file cache that the folder becomes at the end, if it does.
    """

    def __init__(self, folder: Path, plan: Plan, merged: Path | None = None) -> None:
        self.folder = folder
        self.plan = plan
        self._merged = merged
        self._locks = lock_file(folder)
        self._replaces: tuple[tuple[int, int], str | None] | None = None  # a manifest: which file, and what to name

    @property
    def manifest_path(self) -> Path:
        """Where the manifest is, or will be."""
        return self.folder / MANIFEST

    @property
    def finished(self) -> bool:
        """Whether the manifest is there, or another process has made the one file and cleared the folder away.

        Where a finished folder is added to the old manifest is there; then, whether another one has taken its place.
        """
        if posix.exists(self.manifest_path):
            return self._replaces is None or self._manifest_identity() != self._replaces[0]
        return self._merged is not None and posix.exists(self._merged)

    def record(self, view: int, index: int) -> ShardRecord | None:
        """The commit record of a shard; None if it is not committed, or its file is gone or cut short since."""
        path = self._record_path(view, index)
        try:
            text = posix.read_file(path, MAX_JSON_BYTES)
        except IncompleteCacheError:  # never written, or cleared away by the process that wrote the manifest
            return None
        again = "remove it and run the same command again: its shard is then done again"
        record = parse_shard(load_sealed(text, where=str(path), advice=again), self.plan.schema, where=str(path))
        if (record.file, record.view) != (shard_name(view, index), view):
            raise CorruptCacheError(f"{path}: the record of another shard, {record.file}; {again}")
        start, stop = self._span(index)
        if record.start != start or record.stop > stop or (self.plan.samples is not None and record.stop != stop):
            found = f"samples {record.start} to {record.stop - 1}"
            at_most = "at most " if self.plan.samples is None else ""
            raise CorruptCacheError(
                f"{path}: {found}, expected {at_most}{stop - start} from sample {start} on; {again}"
            )
        return record if self._is_whole(record) else None

    def _span(self, index: int) -> tuple[int, int]:
        """Samples [start, stop) of shard `index` of a view; of a `Writer`'s the last may have fewer."""
        if self.plan.samples is None:
            return index * self.plan.shard_rows, (index + 1) * self.plan.shard_rows
        return self.plan.tiling.span(index)

    def claim(self, view: int, index: int) -> bool:
        """Takes the lock of a shard that nobody has committed; False if it is done or in other hands."""
        lock = self._lock_index(view, index)
        if self.finished or self.record(view, index) is not None:
            return False
        with posix.translated("lock", self.folder):
            if not self._locks.try_lock(lock):
                return False
        try:
            is_free = not self.finished and self.record(view, index) is None  # else committed while we asked
            if is_free:
                self.clear_shard(view, index)
        except BaseException:
            self.release(view, index)  # else this process would wait for itself when it tries again
            raise
        if not is_free:
            self.release(view, index)
        return is_free

    def clear_shard(self, view: int, index: int) -> None:
        """Removes what is left of a shard that is not committed: temporary files, a shard or a record alone."""
        remove_temporaries(self.folder / SHARDS, shard_name(view, index))
        self.discard(view, index)

    def own(self) -> None:
        """Takes the folder for this process alone: a `Writer`, whose shards follow each other.

        Raises:
            MismatchError: another process, or another writer of this one, has it.
        """
        with posix.translated("lock", self.folder):
            if not self._locks.try_lock(OWNER):
                holder = self._locks.holder(OWNER)
                raise MismatchError(f"{self.folder} is being written by process {holder}; wait for it or stop it")

    def disown(self) -> None:
        """Gives the folder back."""
        self._locks.unlock(OWNER)

    def discard(self, view: int, index: int) -> None:
        """Takes a committed shard back, record first, so that it is done again; nobody reads before the manifest."""
        with posix.translated("remove", self.folder):
            posix.unlink(self._record_path(view, index))
            posix.unlink(self.folder / SHARDS / shard_name(view, index))

    def release(self, view: int, index: int) -> None:
        """Gives the lock of a shard back."""
        self._locks.unlock(self._lock_index(view, index))

    def holder(self, view: int, index: int) -> int | None:
        """The process that works on a shard, where the system tells."""
        return self._locks.holder(self._lock_index(view, index))

    def container(self, view: int, index: int, start: int, stop: int) -> ContainerWriter:
        """A writer for samples [start, stop) of a view; the caller holds the shard's lock.

        Raises:
            UsageError: one shard more than a cache can have; only where their number was not known before.
        """
        check_shard_count(index + 1)
        teacher = self.plan.provenance.get("teacher", {})
        header = shard_header(self.plan.schema, self.plan.classes, teacher, view=view, start=start, stop=stop)
        path = self.folder / SHARDS / shard_name(view, index)
        return ContainerWriter(path, self.plan.schema, stop - start, header)

    def commit(self, writer: ContainerWriter, record: ShardRecord, index: int) -> None:
        """Publishes a finished shard and writes its commit record, in this order."""
        path = self.folder / SHARDS / record.file
        if not writer.publish():
            self._settle_existing(path, record)
        posix.write_file(self._record_path(record.view, index), dump_sealed(record.to_json()), replace=True)

    def finish(self, records: list[ShardRecord], *, samples: int) -> Manifest | None:
        """Writes the manifest, once, and clears the plan and the commit records away.

        Args:
            records: of all shards, ordered by (view, start).
            samples: of each view.

        Returns:
            The manifest; None if another process has made the one file meanwhile and cleared the folder away.
        """
        with self.exclusive(FINISH):
            if self.finished:
                return read_manifest(self.folder) if posix.exists(self.manifest_path) else None
            manifest = Manifest(
                schema=self.plan.schema,
                classes=self.plan.classes,
                samples=samples,
                views=self.plan.views,
                shard_rows=self.plan.shard_rows,
                provenance=self.plan.provenance,
                shards=tuple(records),
                created=utc_now(),
                predecessor=None if self._replaces is None else self._replaces[1],
                extents=self.plan.extents,
                head=self.plan.head,
            ).sealed()
            if manifest.head is not None and not posix.is_file(self.folder / HEAD_FILE):
                raise IncompleteCacheError(f"{self.folder / HEAD_FILE} was removed; run the same command again")
            parse_manifest(manifest.dump(), where=str(self.manifest_path))  # never publish what we would refuse
            names = self.plan.classes.own_file
            if names is not None:
                posix.write_file(self.folder / CLASSES_FILE, names, replace=True)
            posix.write_file(self.manifest_path, manifest.dump(), replace=self._replaces is not None)
            self._clear()
            return manifest

    @contextlib.contextmanager
    def exclusive(self, lock: int, while_waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Waits for a lock that only one process holds at a time (for milliseconds, or for a merge).

        Args:
            lock: its index.
            while_waiting: called again and again meanwhile; may raise.
        """
        with posix.translated("lock", self.folder):
            while not self._locks.try_lock(lock):
                time.sleep(0.02)
                if while_waiting is not None:
                    while_waiting()
        try:
            yield
        finally:
            self._locks.unlock(lock)

    def all_records(self) -> list[ShardRecord] | None:
        """The records of all planned shards in order, None while one is missing."""
        records = []
        for number in range(self.plan.shard_count):
            view, _, _ = self.plan.span(number)
            record = self.record(view, number % self.plan.shards_per_view)
            if record is None:
                return None
            records.append(record)
        return records

    def join(self, where: str) -> None:
        """Writes the plan, or compares it with the one that is there.

        Under the lock of the manifest: a plan that is published while another process finishes the dump would stay.
        """
        with self.exclusive(FINISH):
            if posix.exists(self.manifest_path):
                self._join_finished(read_manifest(self.folder), where)
            elif not self.finished:
                self._join_plan(where)
            with posix.translated("lock", self.folder):
                self._locks.share(PRESENT)

    def leave(self) -> None:
        """Ends this process's part in the dump; others may then replace it."""
        with posix.translated("lock", self.folder):
            self._locks.unlock(PRESENT)

    def _join_finished(self, manifest: Manifest, where: str) -> None:
        found = plan_of_manifest(manifest, samples_known=self.plan.samples is not None)
        holder = self._locks.holder(PRESENT)
        with posix.translated("write", self.manifest_path):
            posix.fsync_folder(self.folder)  # whoever wrote it may have been killed before this
        if extends(self.plan, found):
            self._replace(manifest, manifest.root, where)
        elif not extends(found, self.plan):  # else it holds these views and more: nothing is left to do
            require_same_plan(found, self.plan, where=where, holder=holder)
            under_way = self._plan_there()
            if under_way is not None and extends(under_way, found):
                return  # other processes add to it
            is_healed = under_way is not None and under_way.to_json() == self.plan.to_json()
            if self.plan.samples is not None and (is_healed or not all(map(self._is_whole, manifest.shards))):
                self._replace(manifest, manifest.predecessor, where)
            else:
                self._clear()  # what a process that was killed right after it wrote the manifest left behind

    def _replace(self, manifest: Manifest, predecessor: str | None, where: str) -> None:
        """Joins or begins a dump of what a finished folder lacks; its manifest stays until all of that is there.

        That is views, samples, or shards that are gone. Those that are there get their records back and stay.

        Args:
            manifest: of the folder.
            predecessor: what the manifest that replaces it names as its own.
            where: for messages.
        """
        there = self._plan_there()
        if there is None or there.to_json() != self.plan.to_json():
            if there is not None and not self._locks.try_lock(PRESENT):
                require_same_plan(there, self.plan, where=where, holder=self._locks.holder(PRESENT))
            if there is None or not (extends(self.plan, there) or there.provenance == self.plan.provenance):
                self._drop_records()  # of other data, whose samples stand at other positions
        for record in filter(self._is_whole, manifest.shards):
            # Where others have begun, a shard may have been made anew and not be recorded yet, with other bytes.
            if there is None or self._has_record(record) or self._is_same(record):
                self._write_record(record)
        if there is None or there.to_json() != self.plan.to_json():
            posix.write_file(self.folder / PLAN, self.plan.dump(), replace=True)
        self._replaces = self._manifest_identity(), predecessor

    def _drop_records(self) -> None:
        """Shards without a record are done again; on the disk before the next plan is, lest it find them there."""
        with posix.translated("clean", self.folder):
            for name in posix.names_in(self.folder / SHARDS):
                if name.endswith(".json"):
                    posix.unlink(self.folder / SHARDS / name)
            posix.fsync_folder(self.folder / SHARDS)

    def _plan_there(self) -> Plan | None:
        """The plan beside a manifest: of views that are being added, or a leftover, which may be anything."""
        path = self.folder / PLAN
        if not posix.exists(path):
            return None
        with contextlib.suppress(CorruptCacheError):
            return parse_plan(posix.read_file(path, MAX_JSON_BYTES), where=str(path))
        return None

    def _manifest_identity(self) -> tuple[int, int]:
        """Tells a manifest that was replaced by rename from the one before."""
        with posix.translated("look at", self.manifest_path):
            status = os.lstat(self.manifest_path)
        return status.st_ino, status.st_mtime_ns

    def _join_plan(self, where: str) -> None:
        path = self.folder / PLAN
        shards = [name for name in posix.names_in(self.folder / SHARDS) if name.endswith(".h5")]
        if shards and not posix.exists(path):
            raise IncompleteCacheError(
                f"{where} holds shards ({shards[0]} ...) but neither {MANIFEST} nor {PLAN}: bring the manifest back, "
                "or replace everything with --overwrite"
            )
        posix.write_file(path, self.plan.dump(), replace=False)
        found = parse_plan(posix.read_file(path, MAX_JSON_BYTES), where=str(path))
        try:
            require_same_plan(found, self.plan, where=where, holder=self._locks.holder(PRESENT))
        except MismatchError:
            if shards or not self._locks.try_lock(PRESENT):
                raise
            # Nothing was stored by that plan, and nobody is at work on it: a first try that failed.
            posix.write_file(path, self.plan.dump(), replace=True)

    def _has_record(self, record: ShardRecord) -> bool:
        return posix.exists(self.folder / SHARDS / f"{record.file[:-3]}.json")

    def _write_record(self, record: ShardRecord) -> None:
        if not self._has_record(record):
            path = self.folder / SHARDS / f"{record.file[:-3]}.json"
            posix.write_file(path, dump_sealed(record.to_json()), replace=True)

    def _is_whole(self, record: ShardRecord) -> bool:
        path = self.folder / SHARDS / record.file
        with posix.translated("look at", path), contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            return stat.S_ISREG(status.st_mode) and status.st_size == record.size
        return False

    def _clear(self) -> None:
        self._drop_records()
        remove_temporaries(self.folder / SHARDS)
        remove_temporaries(self.folder)
        with posix.translated("clean", self.folder):
            posix.unlink(self.folder / PLAN)

    def _is_same(self, record: ShardRecord) -> bool:
        """Whether a shard that is there has the bytes of its record."""
        path = self.folder / SHARDS / record.file
        fd, size = posix.open_regular(path)
        try:
            same = size == record.size
            return same and file_sha256(lambda o, n: posix.read_exactly(fd, o, n, path), size) == record.sha256
        finally:
            posix.close_reader(fd)

    def _settle_existing(self, path: Path, record: ShardRecord) -> None:
        """Somebody published this shard although we hold its lock. Equal bytes are fine."""
        if not self._is_same(record):
            raise CorruptCacheError(
                f"{path} was published by another process while this one held its lock, with other bytes; "
                "locks do not work on this file system. Run the dump from one machine, or with --shard I/N"
            )

    def _record_path(self, view: int, index: int) -> Path:
        return self.folder / SHARDS / f"{shard_name(view, index)[:-3]}.json"

    def _lock_index(self, view: int, index: int) -> int:
        return view * (1 << 24) + index


def utc_now() -> str:
    """The date for a manifest, in UTC; SOURCE_DATE_EPOCH stands in where builds must be reproducible."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    when = datetime.fromtimestamp(int(fixed), timezone.utc) if fixed.isdigit() else datetime.now(timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def open_dump(folder: Path, plan: Plan, *, merged: Path | None = None) -> DumpFolder:
    """Joins or starts the dump of `plan` in `folder`, which becomes the file `merged` at the end.

    Raises:
        UsageError: the folder holds something that is not a dump.
        MismatchError: it holds another dump; the message names the field that differs, and a process at work on it.
        StorageError: it cannot be made or written.
    """
    refuse_foreign(folder)
    with posix.translated("create", folder):
        posix.make_folder(folder)
        posix.make_folder(folder / SHARDS)
    dump = DumpFolder(folder, plan, merged)
    dump.join(str(folder))
    return dump
