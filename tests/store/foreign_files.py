"""Arrays of a foreign file as the reading process sees them, read in the process of the test."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from kdcache.store.foreign_child import FORMATS
from kdcache.store.foreign_column import Column, Source

STEP = 7


@contextmanager
def opened(path: Path, format: str) -> Iterator[Source]:
    """The source that reads a file, closed at the end."""
    fd = os.open(path, os.O_RDONLY)
    try:
        source = importlib.import_module(FORMATS[format]).open_source(fd, format, memory_bytes=1 << 28)
        yield source
        if format == "HDF5":
            source._file.close()
    finally:
        os.close(fd)


def rows_of(column: Column | None) -> np.ndarray:
    """All rows of an array, collected from blocks of seven."""
    assert column is not None
    blocks = list(column.blocks(STEP))
    assert all(len(block) == STEP for block in blocks[:-1])
    return np.concatenate(blocks)


def read(path: Path, format: str, name: str) -> np.ndarray:
    """All rows of one array."""
    with opened(path, format) as source:
        return rows_of(source.column(name))


def crashing_file(path: Path) -> Path:
    """A chunk of 3 bytes that is said to end in a checksum of 4: libhdf5 2.0.0 reads beyond it and dies of SIGSEGV.

    Written by h5py through its documented interface.
    """
    with h5py.File(path, "w") as file:
        logits = file.create_dataset("logits", (16, 5), "f4", chunks=(16, 5), fletcher32=True)
        logits.id.write_direct_chunk((0, 0), b"abc")
    return path


def endless_file(path: Path) -> Path:
    """Text ids whose heap has an object that is smaller than it says: libhdf5 2.0.0 looks through it for ever."""
    with h5py.File(path, "w") as file:
        file["logits"] = np.zeros((64, 5), np.float32)
        file["ids"] = [f"img{number:03d}" for number in range(64)]
    data = bytearray(path.read_bytes())
    free_space = data.rindex(b"img000\0\0") + 8  # the object behind the last text: index, count, reserved, size
    data[free_space + 8] = 32
    path.write_bytes(data)
    return path
