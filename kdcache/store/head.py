"""`head.h5` of a folder cache: reads and checks the last layer of a factored teacher, in one pass over the file.

Every byte is hashed (8 MB in 15 ms, one core): `kdcache.open` does it at once, before any row is decoded, and the
workers that open the cache again leave it until they decode a row themselves, which they rarely do.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kdcache.errors import CorruptCacheError
from kdcache.format.arrays import ArrayLayout
from kdcache.format.factored import Factored
from kdcache.format.hdf5_parser import parse, refuse_slack
from kdcache.format.head import HEAD_FILE, HeadRecord, head_header
from kdcache.format.known_heads import Head, announce_head, keep_head
from kdcache.store import posix

_BLOCK_BYTES = 8 << 20
_HOLE_BYTES = 256 << 20  # a sparse file of that size is not read; smaller ones may be zeros that a file system dropped
AGAIN = "fetch it again, or run the dump's command again, which makes it anew"


@dataclass(frozen=True)
class StoredHead:
    """The head of a folder: where it is, and what the manifest says of it."""

    path: Path
    record: HeadRecord
    encoding: Factored

    @staticmethod
    def of(folder: Path, record: HeadRecord, encoding: Factored) -> StoredHead:
        """The head of this folder; whoever decodes its rows will find it."""
        head = StoredHead(folder / HEAD_FILE, record, encoding)
        announce_head(record.sha256, head.path, head.load)
        return head

    def load(self) -> Head:
        """Reads it, and checks its size, its sha256, its strict form and its values.

        Raises:
            IncompleteCacheError: the file is missing.
            CorruptCacheError: it is not the file that the manifest lists, or its values are not finite.
            StorageError: a read failed.
        """
        with self._opened() as fd:
            self._check_form(fd)  # before memory is taken for its arrays
            values = {name: np.empty(a.shape, a.dtype) for name, a in self.record.arrays.items()}
            for offset, block in self._blocks(fd):
                for name, layout in self.record.arrays.items():
                    _copy(layout, values[name], offset, block)
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise CorruptCacheError(f"{self.path}: {name} holds NaN or infinity, which no writer stores; {AGAIN}")
        return Head(values["weight"], values["bias"])

    def keep(self) -> None:
        """Reads it now, so that damage shows before any row is decoded; errors are those of `load`."""
        keep_head(self.record.sha256, self.load())

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the file in order; raises at the end if they are not those that the manifest lists.

        Raises:
            IncompleteCacheError, CorruptCacheError, StorageError: as in `load`.
        """
        with self._opened() as fd:
            for _, block in self._blocks(fd):
                yield block

    def _blocks(self, fd: int) -> Iterator[tuple[int, bytes]]:
        digest = hashlib.sha256()
        for offset in range(0, self.record.size, _BLOCK_BYTES):
            block = posix.read_exactly(fd, offset, min(_BLOCK_BYTES, self.record.size - offset), self.path)
            digest.update(block)
            yield offset, block
        if digest.hexdigest() != self.record.sha256:
            raise CorruptCacheError(f"{self.path}: its sha256 is not the manifest's; it is damaged or another; {AGAIN}")

    def _check_form(self, fd: int) -> None:
        parsed = parse(partial(_read, fd, self.path), self.record.size, name=str(self.path))
        if parsed.attribute != head_header(self.encoding.num_classes, self.encoding.features):
            raise CorruptCacheError(f"{self.path}: its header is not that of a head of this cache; {AGAIN}")
        if parsed.arrays != self.record.arrays:
            raise CorruptCacheError(f"{self.path}: its arrays are not where the manifest says; {AGAIN}")
        refuse_slack(partial(_read, fd, self.path), self.record.size, parsed, name=str(self.path))
        weight = parsed.arrays["weight"]
        if weight.nbytes >= _HOLE_BYTES and posix.has_hole(fd, weight.offset, weight.stop):
            raise CorruptCacheError(f"{self.path}: weights were never written (a hole in a sparse file); {AGAIN}")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        fd, size = posix.open_regular(self.path)
        try:
            if size != self.record.size:
                raise CorruptCacheError(
                    f"{self.path}: {size} bytes, the manifest says {self.record.size}; it is truncated, grown or "
                    f"another file; {AGAIN}"
                )
            yield fd
        finally:
            posix.close_reader(fd)


def _copy(layout: ArrayLayout, target: np.ndarray, offset: int, block: bytes) -> None:
    """The part of an array that a block of the file holds."""
    start, stop = max(layout.offset, offset), min(layout.stop, offset + len(block))
    if start < stop:
        raw = target.reshape(-1).view(np.uint8)
        raw[start - layout.offset : stop - layout.offset] = np.frombuffer(
            block, np.uint8, count=stop - start, offset=start - offset
        )


def _read(fd: int, path: Path, offset: int, length: int) -> bytes:
    return posix.read_exactly(fd, offset, length, path)
