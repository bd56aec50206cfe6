"""The process that reads a foreign file: takes its limits, opens what it was handed, sends rows, and ends.

A crash, a loop or a bomb in the library that parses the file ends this process and no other. It is a process with
limits, not a jail: it runs as the same user, but can write no file, open nothing beyond the file in hand, start no
process (unless it runs as root), load no plug-in, and take no more memory and time than it was given.
"""

from __future__ import annotations

import ast  # noqa: F401  NumPy's header parser wants it later, when nothing can be opened any more
import codecs
import fcntl
import importlib
import json
import os
import re
import resource
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdcache.errors import KDCacheError, UsageError
from kdcache.store.foreign_column import Column, Source, text_bytes, text_width
from kdcache.store.foreign_wire import CHANNEL_FD, DATA, FILE_FD, HEAD, JSON, MAX_LISTED, rows_at_once

# One module for each format, so that a process holds the parser of one format only.
FORMATS = {
    "HDF5": "kdcache.store.foreign_hdf5",
    "npz": "kdcache.store.foreign_numpy",
    "npy": "kdcache.store.foreign_numpy",
    "safetensors": "kdcache.store.foreign_safetensors",
}
_OUT_OF_MEMORY = re.compile("memory allocation failed|(unable to|can't) allocate", re.IGNORECASE)  # of libhdf5
_TEXT_ROWS = 1 << 14
_STATM = "/proc/self/statm"


def main() -> None:
    """Reads the request from stdin and answers on stdout."""
    request = json.loads(sys.stdin.buffer.read())
    settle_descriptors(int(request["file"]))
    try:
        module = importlib.import_module(FORMATS[request["format"]])
        codecs.lookup("cp437")  # of names in zip files; loaded while files can be opened
        set_limits(request["memory_bytes"], request["cpu_seconds"], descriptors=module.DESCRIPTORS)
        source = module.open_source(FILE_FD, request["format"], memory_bytes=request["memory_bytes"])
        answer(source, request["arrays"])
    except MemoryError as error:
        send_json({"error": "memory", "message": str(error)})
    except UsageError as error:
        send_json({"error": "usage", "message": str(error)})
    except KDCacheError as error:
        send_json({"error": "data", "message": str(error)})
    except Exception as error:  # of a damaged file each library raises a dozen types
        what = f"{type(error).__name__}: {error}"
        if _OUT_OF_MEMORY.search(what):
            send_json({"error": "memory", "message": what})
        else:
            damaged = "it is damaged, or of a kind that is not known here"
            send_json({"error": "data", "message": f"not readable as {request['format']} ({what}); {damaged}"})


def settle_descriptors(file: int) -> None:
    """The file becomes descriptor 3, the way back 4; stdout and stderr take what libraries print; no other is open."""
    file, channel = (fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in (file, 1))
    os.dup2(file, FILE_FD, inheritable=False)
    os.dup2(channel, CHANNEL_FD, inheritable=False)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(CHANNEL_FD + 1, 1024)


def set_limits(memory_bytes: int, cpu_seconds: int, *, descriptors: int) -> None:
    """From now on: so much memory beyond what is in use, so much time, no new files, no writing, no processes.

    Args:
        memory_bytes: address space beyond that of the interpreter and its libraries (Linux).
        cpu_seconds: after which the process ends; the waiting parent looks at the clock as well.
        descriptors: how many more may be opened.
    """
    limits = {
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: CHANNEL_FD + 1 + descriptors,
    }
    if os.path.exists(_STATM):  # elsewhere the limit is not enforced
        with open(_STATM, encoding="ascii") as file:
            limits[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + memory_bytes
    for kind, value in limits.items():
        _lower(kind, value, value)
    _lower(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 5)  # SIGXCPU first, which tells why; then SIGKILL


def _lower(kind: int, soft: int, hard: int) -> None:
    ceiling = resource.getrlimit(kind)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def answer(source: Source, wanted: dict[str, str]) -> None:
    """Sends what the file holds, or the layout of the wanted arrays and then their rows."""
    if not wanted:
        send_json({"listing": source.listing(MAX_LISTED)})
        return
    columns: dict[str, Column] = {}
    for role, name in wanted.items():
        column = source.column(name)
        if column is None:
            send_json({"missing": name, "listing": source.listing(MAX_LISTED)})
            return
        columns[role] = column
    is_usable = _fit_together(columns)
    types = {role: _wire_dtype(role, column, is_usable) for role, column in columns.items()}
    row_bytes = sum(types[role].itemsize if column.is_text else column.row_bytes for role, column in columns.items())
    step = rows_at_once(row_bytes, [column.chunk_rows for column in columns.values()]) if is_usable else 0
    arrays = {
        role: {"name": column.name, "shape": list(column.shape), "dtype": types[role].str}
        for role, column in columns.items()
    }
    send_json({"arrays": arrays, "step": step})
    if step:
        for blocks in zip(*(_sent(columns[role], types[role], step) for role in columns), strict=True):
            for block in blocks:
                _send(DATA, block)
        send_json({"done": True})


def _fit_together(columns: dict[str, Column]) -> bool:
    """Whether rows can be sent at all; the asking side says what is wrong."""
    rows = {column.shape[0] if column.shape else 0 for column in columns.values()}
    text = {role for role, column in columns.items() if column.is_text}
    return len(rows) == 1 and min(rows) > 0 and text <= {"ids"} and all(min(c.shape) > 0 for c in columns.values())


def _wire_dtype(role: str, column: Column, is_usable: bool) -> np.dtype[Any]:
    if column.is_text:
        return np.dtype(f"S{text_width(column, _TEXT_ROWS) if is_usable and column.shape[1:] == () else 1}")
    plain: np.dtype[Any] = column.dtype.newbyteorder("<")
    return plain


def _sent(column: Column, dtype: np.dtype[Any], step: int) -> Iterator[memoryview]:
    for block in column.blocks(step):
        plain = text_bytes(column.name, block) if column.is_text else block
        if plain.dtype.itemsize > dtype.itemsize:
            plain = plain.astype(dtype)
        yield np.ascontiguousarray(plain, dtype).reshape(-1).view(np.uint8).data


def send_json(value: dict[str, Any]) -> None:
    """Sends a JSON frame."""
    _send(JSON, memoryview(json.dumps(value).encode()))


def _send(kind: bytes, payload: memoryview) -> None:
    for part in (memoryview(HEAD.pack(kind, payload.nbytes)), payload):
        left = part
        while left.nbytes:
            left = left[os.write(CHANNEL_FD, left) :]
