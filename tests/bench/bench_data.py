"""The data of the measurements: 100,000 rows of 1000 classes in float16 (200 MB), as caches and as NumPy files.

Made once a session with a fixed seed; `KDCACHE_BENCH_DIR` keeps it for the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

import kdcache
from kdcache.store import posix

ROWS, CLASSES = 100_000, 1000
CHUNK = 4096
ARRAYS = ("logits", "row_max", "label", "sample_id")


@dataclass(frozen=True)
class BenchData:
    """Paths of the caches and of the folder of `.npy` files, all with the same rows in the same order."""

    folder: Path

    @property
    def one_file(self) -> Path:
        return self.folder / "one.h5"

    @property
    def numpy(self) -> Path:
        return self.folder / "numpy"

    def shards(self, count: int) -> Path:
        """The folder cache of 8 or 64 shards."""
        return self.folder / f"shards{count}"

    def array(self, name: str) -> np.ndarray:
        """One array of the `.npy` files, mapped."""
        mapped: np.ndarray = np.load(self.numpy / f"{name}.npy", mmap_mode="r")
        return mapped


def build(folder: Path) -> BenchData:
    """The data in a folder, made if it is not there."""
    data = BenchData(folder)
    done = folder / "done"
    if done.exists():
        return data
    targets = {data.one_file: None, data.shards(8): -(-ROWS // 8), data.shards(64): -(-ROWS // 64)}
    with contextlib.ExitStack() as stack, without_fsync():
        writers = [
            stack.enter_context(kdcache.Writer(path, classes=CLASSES, shard_rows=rows, overwrite=True))
            for path, rows in targets.items()
        ]
        for ids, logits, labels in random_rows(ROWS, CLASSES):
            for writer in writers:
                writer.write(ids, logits, labels)
    data.numpy.mkdir(exist_ok=True)
    with kdcache.open(data.one_file) as cache:
        for name in ARRAYS:
            np.save(data.numpy / f"{name}.npy", cache.stored(name))
    done.touch()
    return data


def random_rows(rows: int, classes: int, *, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Chunks of (ids (n,), float32 logits (n, C), labels (n,))."""
    rng = np.random.default_rng(seed)
    for start in range(0, rows, CHUNK):
        ids = np.arange(start, min(start + CHUNK, rows))
        logits = rng.standard_normal((len(ids), classes), dtype=np.float32) * np.float32(3)
        yield ids, logits, rng.integers(0, classes, len(ids))


@contextlib.contextmanager
def without_fsync() -> Iterator[None]:
    """Builds data without waiting for the disk (never around a measurement)."""
    with mock.patch.object(posix, "fsync"), mock.patch.object(posix, "fsync_folder"):
        yield


def files_of(path: Path) -> list[Path]:
    """A cache's `.h5` files."""
    return [path] if path.is_file() else sorted(path.glob("shards/*.h5"))


def evict(path: Path) -> None:
    """Drops a cache's files from the page cache; nobody may have their pages mapped."""
    for file in files_of(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident(path: Path) -> float:
    """The part of a cache's pages that is in the page cache, 0 to 1, asked of the kernel (`mincore`)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    found = pages = 0
    for file in files_of(path):
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            start = np.frombuffer(mapped, np.uint8)
            states = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
            if libc.mincore(start.ctypes.data, len(mapped), states.ctypes.data) != 0:
                raise OSError(ctypes.get_errno(), "mincore")
            del start
        found, pages = found + int((states & 1).sum()), pages + len(states)
    return found / pages
