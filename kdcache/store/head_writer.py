"""Makes `head.h5` and puts it into a folder, durably: temporary name, fsync, rename, fsync of the folder.

Equal layers make equal files, so any number of processes may put it there, and a file that is damaged, or left by a
try that failed, is replaced by one of the right bytes. That is under the lock of the manifest, since whoever finishes
the dump clears temporary files away.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from kdcache.errors import KDCacheError, LogitsError
from kdcache.format.factored import Factored
from kdcache.format.hdf5_header import FileLayout, build_layout
from kdcache.format.head import HEAD_FILE, HeadRecord, head_header, head_specs
from kdcache.format.known_heads import Head, keep_head
from kdcache.store import posix
from kdcache.store.dump import DumpFolder
from kdcache.store.head import StoredHead
from kdcache.store.locks import FINISH

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class HeadContent:
    """A head to be written: its record, and its bytes from the first to the last."""

    record: HeadRecord
    blocks: Callable[[], Iterator[bytes]]


def head_content(weight: np.ndarray, bias: np.ndarray) -> HeadContent:
    """The file of a layer, which is known in this process from now on.

    Args:
        weight: (C, D) float32.
        bias: (C,) float32.

    Raises:
        LogitsError: NaN or infinite weights.
    """
    arrays = {"weight": np.array(weight, "<f4", order="C"), "bias": np.array(bias, "<f4", order="C")}  # copies
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise LogitsError(f"the {name} of the teacher's last layer holds NaN or infinity; check its weights")
    classes, features = arrays["weight"].shape
    layout = build_layout(head_specs(features), classes, head_header(classes, features))
    digest = hashlib.sha256()
    for block in _blocks(layout, arrays):
        digest.update(block)
    record = HeadRecord(layout.size, digest.hexdigest(), layout.arrays)
    keep_head(record.sha256, Head(arrays["weight"], arrays["bias"]))
    return HeadContent(record, partial(_blocks, layout, arrays))


def copied_head(source: StoredHead) -> HeadContent:
    """The head of another folder, byte by byte, checked on the way."""
    return HeadContent(source.record, source.blocks)


def place_head(dump: DumpFolder, content: HeadContent) -> None:
    """Makes sure that the folder of a dump holds this head; to be called before its first shard.

    Raises:
        StorageError: the disk refused; no part of the file is left.
        CorruptCacheError, IncompleteCacheError: of the cache that it is copied from.
    """
    path = dump.folder / HEAD_FILE
    encoding = dump.plan.schema.encoding
    if not isinstance(encoding, Factored) or encoding.head != content.record.sha256:
        raise AssertionError("the head of another plan")
    with dump.exclusive(FINISH):
        if _is_whole(StoredHead(path, content.record, encoding)):
            with posix.translated("write", path):
                posix.fsync_folder(path.parent)  # whoever put it there may have been killed before this
            return
        temporary = posix.new_temporary(path)
        try:
            with posix.translated("write", path):
                fd = posix.create(temporary)
                try:
                    offset = 0
                    for block in content.blocks():
                        posix.pwrite_all(fd, memoryview(block), offset)
                        offset += len(block)
                    posix.make_read_only(fd)
                    posix.fsync(fd)
                finally:
                    os.close(fd)
                posix.rename(temporary, path)
                posix.fsync_folder(path.parent)
        except BaseException:
            posix.drop(temporary)
            raise


def _is_whole(head: StoredHead) -> bool:
    try:
        for _ in head.blocks():
            pass
    except KDCacheError:
        return False
    return True


def _blocks(layout: FileLayout, arrays: dict[str, np.ndarray]) -> Iterator[bytes]:
    """The bytes of a file in order: headers and rows, and the zeros between them."""
    pieces: list[tuple[int, memoryview]] = [(offset, memoryview(data)) for offset, data in layout.metadata]
    pieces += [(layout.arrays[n].offset, a.reshape(-1).view(np.uint8).data) for n, a in arrays.items()]
    cursor = 0
    for offset, data in [*sorted(pieces, key=lambda piece: piece[0]), (layout.size, memoryview(b""))]:
        if offset > cursor:
            yield bytes(offset - cursor)
        for start in range(0, len(data), _BLOCK_BYTES):
            yield bytes(data[start : start + _BLOCK_BYTES])
        cursor = offset + len(data)
