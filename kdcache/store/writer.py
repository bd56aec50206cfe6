"""`kdcache.Writer`: a cache from your own loop, any batch size, rows on disk as soon as a shard is full.

The number of rows need not be known. Shards fill to `shard_rows` and are committed one by one; an
exception or a kill loses the shard in hand, and `resume=True` tells which samples are there already.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kdcache.errors import DataError, LogitsError, MismatchError, UsageError
from kdcache.format.encodings import Encoding, bad_rows, encode
from kdcache.format.identity import as_sample_ids, show_id
from kdcache.format.manifest import ClassList, ShardRecord
from kdcache.format.schema import RowSchema
from kdcache.store import posix
from kdcache.store.dump import DumpFolder, open_dump, refuse_foreign, remove_dump, remove_empty
from kdcache.store.merge import merge
from kdcache.store.plan import Plan, default_shard_rows, parse_plan
from kdcache.store.shards import ContainerWriter
from kdcache.store.versions import versions

_ID_ROUND = 16


class Writer:
    """Writes a cache in a `with` block; leaving it without an exception publishes the manifest.

    Args:
        path: a folder, or a name ending in `.h5` for a one-file cache.
        classes: their number, or the ordered names.
        dtype: `float16` (row maximum kept apart) or `float32`.
        shard_rows: rows of a shard; up to 256 MiB by default.
        resume: go on with an unfinished dump; `done` lists the ids that are committed.
        overwrite: remove a cache that is there.
        provenance: what to say about the teacher and the data: nested plain values, no paths.
        id_bytes: room for text ids; by default twice the longest of the first batch.

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
        shard_rows: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
        provenance: dict[str, Any] | None = None,
        id_bytes: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._folder, self._one_file = dump_folder_of(self.path)
        names = None if isinstance(classes, int) else tuple(str(c) for c in classes)
        count = classes if isinstance(classes, int) else len(classes)
        self._classes = ClassList.of(count, names)
        Encoding(dtype, (count,))  # refuses a wrong dtype or class count before anything is touched
        self._dtype = dtype
        self._shard_rows = shard_rows
        self._id_bytes = id_bytes
        self._provenance = {**(provenance or {}), "writer": "kdcache.Writer", "versions": versions()}
        self._resume = resume
        self._dump: DumpFolder | None = None
        self._records: list[ShardRecord] = []
        self._container: ContainerWriter | None = None
        self._seen: set[Any] = set()
        self._done = np.empty(0, np.int64)
        self._closed = False
        self._prepare(overwrite=overwrite)

    def _prepare(self, *, overwrite: bool) -> None:
        if overwrite:
            remove_dump(self._folder)
            if self._one_file:
                with posix.translated("remove", self.path):
                    posix.unlink(self.path)
        elif not self._resume and (self.path.exists() or self._folder.exists()):
            refuse_foreign(self._folder)
            if self.path.is_file() or any(self._folder.iterdir()):
                raise UsageError(
                    f"{self.path} exists; pass resume=True to go on, overwrite=True to replace it, or another path"
                )
        if self._resume:
            self._read_back()

    @property
    def done(self) -> np.ndarray:
        """(n,) ids of the samples that are committed already, in stored order; skip them when resuming."""
        return self._done

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
        bad = bad_rows(values)
        if bad.size:
            raise LogitsError(f"the logits of sample {show_id(ids[bad[0]])} hold NaN, +inf or -inf alone")
        label = check_labels(labels, ids, self._classes.count)
        digests = None if input_digests is None else np.asarray(input_digests, np.uint64)
        dump = self._start(ids, values, has_labels=label is not None, has_digests=digests is not None)
        self._remember(ids)
        schema = dump.plan.schema
        rows: dict[str, np.ndarray] = {"sample_id": fit_ids(ids, schema)}
        if schema.has_labels:
            rows["label"] = label if label is not None else np.full(len(ids), -1, np.int64)
        if schema.has_digests:
            if digests is None or len(digests) != len(ids):
                raise DataError("input_digests must be given for every row, as in the first batch")
            rows["input_digest"] = digests
        encoded = encode(schema.encoding, values)
        self._append(dump, {**rows, **encoded.arrays}, encoded.clamped)

    def close(self) -> None:
        """Commits the last shard and publishes the manifest (and, for `.h5`, the one file).

        Raises:
            DataError: no rows were written.
        """
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
                merge(self._folder, self.path)
                remove_dump(self._folder)
                remove_empty(self._folder)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drops the shard in hand; committed shards stay for `resume=True`."""
        self._closed = True
        if self._container is not None:
            self._container.abandon()
            self._container = None
        if self._dump is not None:
            self._dump.release(0, self._index_in_hand)

    @property
    def _index_in_hand(self) -> int:
        return len(self._records)

    def _read_back(self) -> None:
        """Takes up the shards of an unfinished dump; its plan is compared at the first write."""
        if (self._folder / "manifest.json").exists() or self.path.is_file():
            raise UsageError(f"{self.path} is finished; pass overwrite=True to replace it, or another path")
        plan_path = self._folder / "plan.json"
        if not plan_path.exists():
            return
        found = parse_plan(posix.read_file(plan_path, 1 << 28), where=str(plan_path))
        wanted = replace(
            found,
            schema=replace(found.schema, encoding=replace(found.schema.encoding, dtype=self._dtype)),
            classes=self._classes,
            provenance=self._provenance,
            shard_rows=self._shard_rows or found.shard_rows,
        )
        dump = open_dump(self._folder, wanted)
        while (record := dump.record(0, len(self._records))) is not None:
            self._records.append(record)
        if self._records and self._records[-1].rows < found.shard_rows:
            raise MismatchError(f"{self.path} ends in a short shard; finish it with overwrite=True")
        self._done = read_ids(dump, self._records)
        self._seen = set(self._done.tolist())
        self._take(dump)

    def _start(self, ids: np.ndarray, values: np.ndarray, *, has_labels: bool, has_digests: bool) -> DumpFolder:
        if self._dump is not None:
            return self._dump
        if ids.dtype.kind == "i":
            id_dtype = "<i8"
        else:
            longest = ids.dtype.itemsize
            id_dtype = f"|S{self._id_bytes or min(1024, -(-2 * longest // _ID_ROUND) * _ID_ROUND)}"
        schema = RowSchema(Encoding(self._dtype, values.shape[1:]), id_dtype, has_labels, has_digests)
        rows = self._shard_rows or default_shard_rows(schema.row_bytes)
        dump = open_dump(self._folder, Plan(schema, self._classes, rows, None, self._provenance))
        self._take(dump)
        return dump

    def _take(self, dump: DumpFolder) -> None:
        if not dump.claim(0, self._index_in_hand):
            holder = dump.holder(0, self._index_in_hand)
            raise MismatchError(f"{self._folder} is being written by process {holder}; wait for it or stop it")
        self._dump = dump

    def _remember(self, ids: np.ndarray) -> None:
        values = ids.tolist()
        fresh = set(values)
        if len(fresh) != len(values):
            twice = next(v for i, v in enumerate(values) if v in values[:i])
            raise DataError(f"the sample id {show_id(twice)} stands twice in one batch; ids must be unique")
        both = self._seen & fresh
        if both:
            raise DataError(f"the sample id {show_id(next(iter(both)))} was written before; ids must be unique")
        self._seen |= fresh

    def _append(self, dump: DumpFolder, rows: dict[str, np.ndarray], clamped: int) -> None:
        count = len(rows["sample_id"])
        done = 0
        while done < count:
            start = self._index_in_hand * dump.plan.shard_rows
            if self._container is None:
                self._container = dump.container(0, self._index_in_hand, start, start + dump.plan.shard_rows)
            room = dump.plan.shard_rows - self._container.written
            piece = {n: a[done : done + room] for n, a in rows.items()}
            taken = len(piece["sample_id"])
            first = start + self._container.written
            positions = np.arange(first, first + taken)
            self._container.append(piece, view=0, positions=positions, clamped=clamped if done == 0 else 0)
            done += taken
            if self._container.written == dump.plan.shard_rows:
                self._commit(dump)
                self._take(dump)

    def _commit(self, dump: DumpFolder) -> None:
        container = self._container
        if container is None:
            return
        index = self._index_in_hand
        start = index * dump.plan.shard_rows
        if container.written < dump.plan.shard_rows:
            container = self._shortened(dump, container, index, start)
        record = container.record(view=0, start=start, ids=consecutive(container.read_array("sample_id")))
        dump.commit(container, record, index)
        self._container = None
        self._records.append(record)
        dump.release(0, index)

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


def as_float_array(logits: Any) -> np.ndarray:
    """Logits as a NumPy array of a type NumPy knows; tensors come to the CPU, bfloat16 becomes float32.

    Raises:
        LogitsError: not an array of floats.
    """
    if hasattr(logits, "detach"):  # a tensor, without importing torch
        tensor = logits.detach()
        logits = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).cpu().numpy()
    values = np.asarray(logits)
    if values.dtype.kind != "f":
        raise LogitsError(f"logits must be floating point, found {type(logits).__name__} of {values.dtype}")
    return values


def check_labels(labels: Any, ids: np.ndarray, classes: int) -> np.ndarray | None:
    """(N,) int64 labels in [-1, C), or None where none were given.

    Raises:
        DataError: another length, not integers, or out of range; the message names the sample.
    """
    if labels is None:
        return None
    values = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if values.shape != (len(ids),) or values.dtype.kind not in "iu":
        raise DataError(f"labels have shape {values.shape} and type {values.dtype}, expected ({len(ids)},) integers")
    wrong = np.flatnonzero((values < -1) | (values >= classes))
    if wrong.size:
        first = wrong[0]
        raise DataError(
            f"sample {show_id(ids[first])} has label {values[first]}, expected 0 to {classes - 1}, or -1 for none"
        )
    return values.astype(np.int64)


def fit_ids(ids: np.ndarray, schema: RowSchema) -> np.ndarray:
    """Ids in the stored type.

    Raises:
        DataError: of another kind, or text that is too long for it.
    """
    if (ids.dtype.kind == "i") != (schema.id_dtype == "<i8"):
        raise DataError(f"sample ids changed from {schema.id_dtype} to {ids.dtype}; use one kind")
    if ids.dtype.itemsize > np.dtype(schema.id_dtype).itemsize:
        lengths = np.char.str_len(ids)
        if int(lengths.max()) > np.dtype(schema.id_dtype).itemsize:
            raise DataError(
                f"the sample id {show_id(ids[int(lengths.argmax())])} is longer than the {schema.id_dtype[2:]} bytes "
                "that the first batch asked for; pass id_bytes= with the length of the longest id"
            )
    return ids.astype(schema.id_dtype)


def consecutive(ids: np.ndarray) -> tuple[int, int] | None:
    """(first, last) where ids are consecutive integers, else None."""
    if ids.dtype.kind != "i" or not len(ids):
        return None
    first, last = int(ids[0]), int(ids[-1])
    if last - first + 1 != len(ids) or not bool((np.diff(ids) == 1).all()):
        return None
    return first, last


def read_ids(dump: DumpFolder, records: list[ShardRecord]) -> np.ndarray:
    """(n,) sample ids of committed shards."""
    pieces = []
    for record in records:
        path = dump.folder / "shards" / record.file
        fd, _ = posix.open_regular(path)
        try:
            layout = record.arrays["sample_id"]
            raw = posix.read_exactly(fd, layout.offset, layout.nbytes, path)
        finally:
            os.close(fd)
        pieces.append(np.frombuffer(raw, layout.dtype))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)
