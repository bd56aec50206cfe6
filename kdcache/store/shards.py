"""Writes one container (a shard or a one-file cache) with plain POSIX calls, in constant memory.

h5py builds only the header, in memory; the rows are spliced in at their offsets as they come. The first
array, by far the largest, is hashed on its way to the disk; the few bytes a row behind it are read back
from the page cache at the end.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from kdcache.format.checksums import header_digest, row_crcs, rows_digest
from kdcache.format.hdf5_header import FileLayout, build_layout
from kdcache.format.manifest import ShardRecord
from kdcache.format.schema import CRC_ARRAY, RowSchema
from kdcache.store import posix
from kdcache.store.hashing import OverlappedHash
from kdcache.store.posix import TEMPORARY_PREFIX

_BLOCK_BYTES = 4 << 20
_WRITEBACK_BYTES = 8 << 20  # begun early, the disk works while rows are still coming; the fsync is then short


class ContainerWriter:
    """A file under a temporary name that takes rows in order; `close` or `abandon` ends its life.

    Args:
        final: the name that `publish` gives it.
        schema: of its rows.
        rows: exactly how many will be written.
        header: the text of the root attribute.
        hash_file: hash the whole file (a shard); else the payload alone (a one-file cache).
    """

    def __init__(self, final: Path, schema: RowSchema, rows: int, header: str, *, hash_file: bool = True) -> None:
        self._final = final
        self._schema = schema
        self._rows = rows
        self._written = 0
        self._clamped = 0
        self._handed_over = 0
        self._layout = build_layout(schema.specs, rows, header)
        self._first = next(iter(self._layout.arrays.values()))
        self._hash = OverlappedHash()
        self._temporary = posix.new_temporary(final)
        self._fd = -1
        try:
            with posix.translated("create", self._temporary):
                self._fd = posix.create(self._temporary)
            with posix.translated("write", final):
                posix.truncate(self._fd, self._layout.size)
                for offset, data in self._layout.metadata:
                    posix.pwrite_all(self._fd, data, offset)
            if hash_file:
                self._hash_file(0, self._first.offset)
        except BaseException:
            self.abandon()
            raise

    @property
    def written(self) -> int:
        """Rows written so far."""
        return self._written

    @property
    def layout(self) -> FileLayout:
        """Where everything lies."""
        return self._layout

    def append(self, arrays: Mapping[str, np.ndarray], *, view: int, positions: np.ndarray, clamped: int = 0) -> None:
        """Writes the next rows.

        Args:
            arrays: all arrays of the schema but `view` and `row_crc`, each (n, ...).
            view: the view the rows belong to.
            positions: (n,) positions of the samples, which seed the row checksums.
            clamped: how many values the encoding clamped in these rows.
        """
        count = len(positions)
        blocks = {n: self._bytes_of(n, array, count) for n, array in arrays.items()}
        with self._hash.hashing(blocks[self._first.name]), posix.translated("write", self._final):
            for name, block in blocks.items():  # first, since a write lets the hash's thread begin; checksums do not
                self._write_rows(name, block)
            crcs = row_crcs([arrays[n] for n in self._schema.crc_names], view=view, positions=positions)
            self._write_rows(CRC_ARRAY, self._bytes_of(CRC_ARRAY, crcs, count))
            self._write_rows("view", self._bytes_of("view", np.full(count, view), count))
        self._written += count
        self._clamped += clamped
        self._begin_writeback()

    def finish(self) -> tuple[str, str]:
        """Hashes what was not hashed on the way and fsyncs; returns (sha256 of the file, header digest)."""
        self._hash_file(self._first.stop, self._layout.size)
        digest = header_digest(self._read, self._layout.arrays, self._layout.size)
        self._sync()
        return self._hash.hexdigest(), digest

    def finish_with_digests(self, header_of: Callable[[str, str], str]) -> str:
        """Ends a one-file cache (`hash_file=False`): writes the header again, now with the digests of its rows.

        Args:
            header_of: from the payload's sha256 and the rows' digest to the attribute text, of the same length as
                before.

        Returns:
            The header digest, which is the root hash of a one-file cache.
        """
        for array in self._layout.arrays.values():
            if array is not self._first:
                self._hash_file(array.offset, array.stop)
        text = header_of(self._hash.hexdigest(), rows_digest(self._read, self._layout.arrays))
        layout = build_layout(self._schema.specs, self._rows, text)
        if layout.arrays != self._layout.arrays or layout.size != self._layout.size:
            raise AssertionError("a header of equal length moved the arrays")
        with posix.translated("write", self._final):
            for offset, data in layout.metadata:
                posix.pwrite_all(self._fd, data, offset)
        digest = header_digest(self._read, layout.arrays, layout.size)
        self._sync()
        return digest

    def read_array(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of an array as written so far."""
        layout = self._layout.arrays[name]
        width = layout.spec.row_bytes
        count = (self._written if stop is None else stop) - start
        raw = self._read(layout.offset + start * width, count * width)
        return np.frombuffer(raw, layout.dtype).reshape(layout.spec.shape(count))

    def copy_from(self, other: ContainerWriter, *, view: int, start: int) -> None:
        """Appends all rows of another container of the same schema; `start` is its first position."""
        names = [s.name for s in self._schema.specs if s.name not in ("view", CRC_ARRAY)]
        step = max(1, _BLOCK_BYTES // self._schema.row_bytes)
        for first in range(0, other.written, step):
            stop = min(first + step, other.written)
            rows = {n: other.read_array(n, first, stop) for n in names}
            self.append(rows, view=view, positions=np.arange(start + first, start + stop))
        self._clamped = other._clamped

    def record(self, *, view: int, start: int, ids: tuple[int, int] | None) -> ShardRecord:
        """Finishes a shard and describes it; `publish` gives it its name."""
        sha256, digest = self.finish()
        return ShardRecord(
            file=self._final.name,
            view=view,
            start=start,
            stop=start + self._rows,
            size=self._layout.size,
            sha256=sha256,
            header_blake2b=digest,
            arrays=self._layout.arrays,
            ids=ids,
            clamped=self._clamped,
        )

    def publish(self, *, replace: bool = False) -> bool:
        """Closes the file and gives it its final name; False if that name was taken (see `posix.publish`)."""
        with posix.translated("publish", self._final):
            try:
                fd, self._fd = self._fd, -1  # closed even where `close` reports an error
                os.close(fd)
                self._hash.close()
                if not replace:
                    return posix.publish(self._temporary, self._final)
                posix.rename(self._temporary, self._final)
                posix.fsync_folder(self._final.parent)
                return True
            except BaseException:
                self.abandon()
                raise

    def abandon(self) -> None:
        """Closes and removes the temporary file; safe to call at any time."""
        self._hash.close()
        if self._fd >= 0:
            posix.close_reader(self._fd)
            self._fd = -1
        posix.drop(self._temporary)

    def _bytes_of(self, name: str, array: np.ndarray, count: int) -> memoryview:
        layout = self._layout.arrays[name]
        data = np.ascontiguousarray(array, layout.dtype)
        if data.shape != layout.spec.shape(count):
            raise AssertionError(f"array {name} has shape {data.shape}, not {layout.spec.shape(count)}")
        return data.reshape(-1).view(np.uint8).data

    def _write_rows(self, name: str, block: memoryview) -> None:
        layout = self._layout.arrays[name]
        posix.pwrite_all(self._fd, block, layout.offset + self._written * layout.spec.row_bytes)

    def _begin_writeback(self) -> None:
        pending = self._written * self._first.spec.row_bytes - self._handed_over
        if pending >= _WRITEBACK_BYTES:
            posix.start_writeback(self._fd, self._first.offset + self._handed_over, pending)
            self._handed_over += pending

    def _sync(self) -> None:
        if self._written != self._rows:
            raise AssertionError(f"{self._written} of {self._rows} rows were written")
        with posix.translated("write", self._final):
            posix.make_read_only(self._fd)
            posix.fsync(self._fd)

    def _hash_file(self, start: int, stop: int) -> None:
        for offset in range(start, stop, _BLOCK_BYTES):
            self._hash.update(self._read(offset, min(_BLOCK_BYTES, stop - offset)))

    def _read(self, offset: int, length: int) -> bytes:
        return posix.read_exactly(self._fd, offset, length, self._temporary)


def remove_temporaries(folder: Path, name: str = "", *, of_the_dead: bool = False) -> None:
    """Removes temporary files that a killed process left.

    Args:
        folder: where they are.
        name: the final name of the file; any if empty.
        of_the_dead: leave those whose process is alive on this machine. Where False, the caller holds a lock.
    """
    pattern = re.compile(rf"{re.escape(TEMPORARY_PREFIX + name)}{'' if name else '.*'}-(\d+)-[0-9a-f]{{8}}")
    with posix.translated("clean", folder), contextlib.suppress(FileNotFoundError):
        for found in os.listdir(folder):
            match = pattern.fullmatch(found)
            if match is not None and not (of_the_dead and posix.is_in_hand(found, int(match[1]))):
                posix.unlink(folder / found)
