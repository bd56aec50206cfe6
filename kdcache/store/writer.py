"""`kdcache.Writer`: a cache from your own loop, any batch size, rows on disk as soon as a shard is full.

The number of rows need not be known. Shards fill to `shard_rows` and are committed one by one; an
exception or a kill loses the shard in hand, and `resume=True` tells which samples are there already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kdcache.errors import DataError, LogitsError, UsageError
from kdcache.format.encoding import Encoding, bad_rows
from kdcache.format.encodings import EncodingChoice
from kdcache.format.headers import FileHeader
from kdcache.format.identity import MAX_ID_BYTES, as_sample_ids, show_id
from kdcache.format.manifest import ShardRecord
from kdcache.format.schema import MAX_ROWS, RowSchema
from kdcache.format.strict_json import MAX_JSON_BYTES
from kdcache.store import posix
from kdcache.store.dump import DumpFolder, open_dump
from kdcache.store.folder import MANIFEST, PLAN, read_manifest
from kdcache.store.incoming import (
    as_digests,
    as_float_array,
    check_labels,
    class_list,
    consecutive,
    fit_ids,
    plain_provenance,
)
from kdcache.store.locks import FINISH
from kdcache.store.merge import merge
from kdcache.store.parts import read_catalog
from kdcache.store.plan import Plan, default_shard_rows, parse_plan, plan_of_manifest, require_same_file
from kdcache.store.removal import clear_parts, refuse_foreign, remove_dump, remove_empty, remove_one_file
from kdcache.store.shards import ContainerWriter, remove_temporaries
from kdcache.store.stored_ids import read_ids
from kdcache.store.versions import versions

_ID_ROUND = 16


class Writer:
    """Writes a cache in a `with` block; leaving it without an exception publishes the manifest.

    Args:
        path: a folder, or a name ending in `.h5` for a one-file cache.
        classes: their number, or the ordered names.
        dtype: of all logits: `float16` (row maximum kept apart), `float32`, `int8` or `int4`.
        top_k: store the K largest logits of a row instead (and its label's), and sums over the others.
        temperatures: with `top_k`, where the sums are taken: ascending, `"z2"` last; (1, 2, 4) by default.
        shard_rows: rows of a shard; up to 131,072 and 256 MiB by default.
        resume: go on with an unfinished dump; `done` lists the ids that are committed.
        overwrite: remove a cache that is there.
        provenance: what to say about the teacher and the data: nested plain values, no paths.
        id_bytes: room for text ids; by default twice the longest of the first batch.

    Memory: one block of rows, and the ids written so far (about 80 bytes each), to refuse one that comes twice.

    Raises:
        UsageError: the path is taken and neither `resume` nor `overwrite` was asked for.
        MismatchError: `resume` with other settings.

    >>> import numpy as np, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "teacher")
    >>> with Writer(path, classes=3) as writer:
    ...     writer.write([7, 8], np.zeros((2, 3), np.float32), [0, 2])
    """

    def __init__(
        self,
        path: str | Path,
        *,
        classes: int | Sequence[str],
        dtype: str = "float16",
        top_k: int | None = None,
        temperatures: Sequence[float | str] | None = None,
        shard_rows: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
        provenance: dict[str, Any] | None = None,
        id_bytes: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._folder, self._one_file = dump_folder_of(self.path)
        self._classes = class_list(classes)
        self._choice = EncodingChoice(dtype, top_k, None if temperatures is None else tuple(temperatures))
        self._choice.of((self._classes.count,))  # refuses a wrong dtype or count before anything is touched
        if shard_rows is not None and shard_rows < 1:
            raise UsageError(f"shard_rows must be at least 1, found {shard_rows}")
        if id_bytes is not None and not 1 <= id_bytes <= MAX_ID_BYTES:
            raise UsageError(f"id_bytes must be 1 to {MAX_ID_BYTES}, found {id_bytes}")
        self._shard_rows = shard_rows
        self._id_bytes = id_bytes
        self._provenance = plain_provenance({**(provenance or {}), "writer": "kdcache.Writer", "versions": versions()})
        self._dump: DumpFolder | None = None
        self._records: list[ShardRecord] = []
        self._container: ContainerWriter | None = None
        self._seen: set[Any] = set()
        self._done = np.empty(0, np.int64)
        self._closed = False
        self._failed = False
        self._prepare(resume=resume, overwrite=overwrite)

    def _prepare(self, *, resume: bool, overwrite: bool) -> None:
        if self._one_file and posix.is_folder(self.path):
            raise UsageError(f"{self.path} is a folder, and a name in .h5 asks for one file; choose another path")
        if overwrite:
            remove_dump(self._folder)
            if self._one_file:
                remove_one_file(self.path)
        elif not resume and (posix.exists(self.path) or posix.exists(self._folder)):
            refuse_foreign(self._folder)
            if posix.is_file(self.path) or posix.names_in(self._folder):
                raise UsageError(
                    f"{self.path} exists; pass resume=True to go on, overwrite=True to replace it, or another path"
                )
        if resume:
            self._read_back()

    @property
    def done(self) -> np.ndarray:
        """(n,) ids of the samples that are committed already, in stored order; skip them when resuming."""
        return self._done

    @property
    def clamped(self) -> int:
        """Values of the committed shards that are below the range of `dtype` and were clamped to it."""
        return sum(record.clamped for record in self._records)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def write(self, sample_ids: Any, logits: Any, labels: Any = None, *, input_digests: Any = None) -> None:
        """Adds rows.

        Args:
            sample_ids: (N,) integers or text, unique over the whole cache.
            logits: (N, C) or (N, C, ...) raw logits, an array or a tensor of any float type.
            labels: (N,) integers in [0, C), -1 for none; leave out where the data has no labels. Dense
                prediction keeps its label maps in the data set: pass none.
            input_digests: (N,) unsigned 64-bit digests of the inputs (`kdcache.input_digest`).

        Raises:
            DataError: duplicate ids, labels out of range, lengths that differ.
            LogitsError: NaN, +inf, a wrong number of classes; the message names the sample.
            StorageError: the disk refused; committed shards stay.
        """
        if self._closed:
            raise UsageError("this writer is closed")
        ids, values = as_sample_ids(sample_ids), as_float_array(logits)
        if values.ndim < 2 or values.shape[1] != self._classes.count:
            raise LogitsError(f"logits have shape {values.shape}, expected (N, {self._classes.count})")
        if len(ids) != len(values):
            raise DataError(f"{len(ids)} sample ids for {len(values)} rows of logits")
        if not len(ids):
            return
        if self._dump is not None and self._dump.finished:
            raise UsageError(f"all rows of {self.path} were committed before; close the writer, which makes the file")
        bad = bad_rows(values)
        if bad.size:
            raise LogitsError(f"the logits of sample {show_id(ids[bad[0]])} hold NaN, +inf or -inf alone")
        label = check_labels(labels, ids, self._classes.count)
        digests = as_digests(input_digests, len(ids))
        fresh = self._unseen(ids)
        encoding = self._encoding(values, has_labels=label is not None)
        encoded = encoding.encode(values, None if label is None else label[:, None])
        dump = self._start(ids, encoding, has_labels=label is not None, has_digests=digests is not None)
        schema = dump.plan.schema
        rows: dict[str, np.ndarray] = {"sample_id": fit_ids(ids, schema)}
        if schema.has_labels:
            rows["label"] = label if label is not None else np.full(len(ids), -1, np.int64)
        elif label is not None:
            raise DataError("labels must be given from the first batch on; pass -1 for rows without one")
        if schema.has_digests != (digests is not None):
            raise DataError("input_digests must be given for every row or for none, as in the first batch")
        if digests is not None:
            rows["input_digest"] = digests
        try:
            self._append(dump, {**rows, **encoded.arrays}, encoded.clamped)
        except BaseException:
            # Rows of this batch may be in the shard in hand already, so it must never be published.
            self._failed = True
            self.abandon()
            raise
        self._seen |= fresh

    def close(self) -> None:
        """Commits the last shard and publishes the manifest (and, for `.h5`, the one file).

        Raises:
            DataError: no rows were written.
            UsageError: an earlier write failed, and the exception did not end the `with` block.
        """
        if self._failed:
            raise UsageError(
                f"{self.path} is not finished: an earlier write failed. Committed shards stay; go on with resume=True"
            )
        if self._closed:
            return
        dump = self._dump
        if dump is None or (not self._records and self._container is None):
            self.abandon()
            raise DataError("no rows were written; a cache needs at least one")
        try:
            if self._container is not None:
                self._commit(dump)
            samples = self._records[-1].stop
            if not dump.finished:
                dump.finish(self._records, samples=samples)
            if self._one_file:
                if not posix.exists(self.path):
                    merge(self._folder, self.path)
                with dump.exclusive(FINISH):
                    clear_parts(self._folder, self.path)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drops the shard in hand; committed shards stay for `resume=True`."""
        self._closed = True
        if self._container is not None:
            self._container.abandon()
            self._container = None
        if self._dump is not None:
            _give_back(self._dump)

    def _read_back(self) -> None:
        """Takes up the shards of an unfinished dump; its plan is compared with this writer's."""
        finished = posix.exists(self._folder / MANIFEST)
        if posix.is_file(self.path) or (finished and not self._one_file):
            self._clear_leftovers()
            raise UsageError(f"{self.path} is finished; pass overwrite=True to replace it, or another path")
        found = self._found_plan(finished)
        if found is None:
            return
        wanted = replace(
            found,
            schema=replace(
                found.schema,
                encoding=self._choice.of(found.schema.encoding.row_shape, labels=int(found.schema.has_labels)),
            ),
            classes=self._classes,
            provenance=self._provenance,
            shard_rows=self._shard_rows or found.shard_rows,
        )
        dump = open_dump(self._folder, wanted)
        dump.own()
        try:
            if finished:
                self._records = list(read_manifest(self._folder).shards)
            while not finished and (record := dump.record(0, len(self._records))) is not None:
                if record.rows < found.shard_rows:  # killed while closing: more rows may follow, so it is done again
                    dump.discard(0, len(self._records))
                    break
                self._records.append(record)
            self._done = read_ids(self._folder, self._records)
            self._seen = set(self._done.tolist())
        except BaseException:
            _give_back(dump)
            raise
        self._dump = dump

    def _clear_leftovers(self) -> None:
        """Removes what a process left that was killed between the last rename and the end of its clearing up."""
        if self._one_file:
            remove_temporaries(self.path.parent, self.path.name, of_the_dead=True)
            if posix.exists(self._folder):
                self._require_merged()
                remove_dump(self._folder)
                remove_empty(self._folder)
        else:
            open_dump(self._folder, plan_of_manifest(read_manifest(self._folder), samples_known=False))

    def _require_merged(self) -> None:
        """The file is the one that the shards were merged into, and its name is on the disk: only then they may go."""
        plan, header = self._found_plan(posix.exists(self._folder / MANIFEST)), read_catalog(self.path).header
        if plan is not None and header is not None:
            require_same_file(header, replace(plan, samples=header.samples), where=str(self.path))
        with posix.translated("write", self.path):
            posix.fsync_folder(self.path.parent)

    def _found_plan(self, finished: bool) -> Plan | None:
        if finished:  # killed while the shards were merged into one file
            return plan_of_manifest(read_manifest(self._folder), samples_known=False)
        path = self._folder / PLAN
        return parse_plan(posix.read_file(path, MAX_JSON_BYTES), where=str(path)) if posix.exists(path) else None

    def _encoding(self, values: np.ndarray, *, has_labels: bool) -> Encoding:
        if self._dump is not None:
            return self._dump.plan.schema.encoding
        return self._choice.of(values.shape[1:], labels=int(has_labels))

    def _start(self, ids: np.ndarray, encoding: Encoding, *, has_labels: bool, has_digests: bool) -> DumpFolder:
        if self._dump is not None:
            return self._dump
        if ids.dtype.kind == "i":
            id_dtype = "<i8"
        else:
            longest = ids.dtype.itemsize
            id_dtype = f"|S{self._id_bytes or min(MAX_ID_BYTES, -(-2 * longest // _ID_ROUND) * _ID_ROUND)}"
        schema = RowSchema(encoding, id_dtype, has_labels, has_digests)
        rows = self._shard_rows or default_shard_rows(schema.row_bytes)
        if self._one_file:  # refuses now what would not fit into the header at the end
            FileHeader(schema, self._classes, MAX_ROWS, (0,), None, self._provenance).dump()
        dump = open_dump(self._folder, Plan(schema, self._classes, rows, None, self._provenance))
        dump.own()
        try:
            if dump.finished or dump.record(0, 0) is not None:  # another process was faster
                raise UsageError(f"{self.path} was written by another process meanwhile; choose another path")
        except BaseException:
            _give_back(dump)
            raise
        self._dump = dump
        return dump

    def _unseen(self, ids: np.ndarray) -> set[Any]:
        values = ids.tolist()
        fresh = set(values)
        if len(fresh) != len(values):
            twice = next(value for value, count in Counter(values).items() if count > 1)
            raise DataError(f"the sample id {show_id(twice)} stands twice in one batch; ids must be unique")
        both = self._seen & fresh
        if both:
            raise DataError(f"the sample id {show_id(next(iter(both)))} was written before; ids must be unique")
        return fresh

    def _append(self, dump: DumpFolder, rows: dict[str, np.ndarray], clamped: np.ndarray) -> None:
        count = len(rows["sample_id"])
        done = 0
        while done < count:
            start = len(self._records) * dump.plan.shard_rows
            if self._container is None:
                dump.clear_shard(0, len(self._records))
                self._container = dump.container(0, len(self._records), start, start + dump.plan.shard_rows)
            room = dump.plan.shard_rows - self._container.written
            piece = {n: a[done : done + room] for n, a in rows.items()}
            taken = len(piece["sample_id"])
            first = start + self._container.written
            positions = np.arange(first, first + taken)
            values = int(clamped[done : done + taken].sum())
            self._container.append(piece, view=0, positions=positions, clamped=values)
            done += taken
            if self._container.written == dump.plan.shard_rows:
                self._commit(dump)

    def _commit(self, dump: DumpFolder) -> None:
        container = self._container
        if container is None:
            return
        index = len(self._records)
        start = index * dump.plan.shard_rows
        if container.written < dump.plan.shard_rows:
            container = self._shortened(dump, container, index, start)
        record = container.record(view=0, start=start, ids=consecutive(container.read_array("sample_id")))
        dump.commit(container, record, index)
        self._container = None
        self._records.append(record)

    def _shortened(self, dump: DumpFolder, full: ContainerWriter, index: int, start: int) -> ContainerWriter:
        """The last shard has fewer rows than its file was laid out for: copies them into one that fits."""
        short = dump.container(0, index, start, start + full.written)
        try:
            short.copy_from(full, view=0, start=start)
        except BaseException:
            short.abandon()
            raise
        full.abandon()
        self._container = short
        return short


def dump_folder_of(path: Path) -> tuple[Path, bool]:
    """(the folder that shards are written to, whether they are merged into one file at the end)."""
    if path.suffix == ".h5":
        return path.with_name(f"{path.name}.parts"), True
    return path, False


def _give_back(dump: DumpFolder) -> None:
    """Ends this process's part in a dump that it owns."""
    try:
        dump.disown()
    finally:
        dump.leave()
