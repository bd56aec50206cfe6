"""Small caches of 100 rows, and ways to damage them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.format.dense import Dense
from kdcache.format.identity import as_sample_ids
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store import posix
from kdcache.store.dump import open_dump
from kdcache.store.incoming import consecutive
from kdcache.store.plan import Plan
from kdcache.store.writer import Writer

sys.path.insert(0, str(Path(__file__).parent))  # foreign_files

ROWS, CLASSES, SHARD_ROWS = 100, 5, 40


@dataclass(frozen=True)
class Table:
    """What goes into a cache: (N,) ids, (N, C, ...) float32 logits, (N,) labels."""

    ids: Any
    logits: np.ndarray
    labels: np.ndarray


@pytest.fixture(autouse=True)
def fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal dates, and no waiting for the disk: half of the time of these tests (tests/store/test_posix.py looks at
    the order of the calls)."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(posix, "fsync", lambda fd: None)
    monkeypatch.setattr(posix, "fsync_folder", lambda folder: None)


@pytest.fixture
def make_table() -> Callable[..., Table]:
    """Random rows; multiples of 1/64, so that float16 keeps them exactly."""

    def make(rows: int = ROWS, *, classes: int = CLASSES, ids: Any = None, trailing: tuple[int, ...] = ()) -> Table:
        rng = np.random.default_rng(rows)
        logits = rng.integers(-600, 600, (rows, classes, *trailing)).astype(np.float32) / 64
        return Table(np.arange(rows) if ids is None else ids, logits, rng.integers(-1, classes, rows))

    return make


@pytest.fixture
def table(make_table: Callable[..., Table]) -> Table:
    return make_table()


@pytest.fixture
def make_cache(tmp_path: Path, make_table: Callable[..., Table]) -> Callable[..., Path]:
    """Writes a table (100 rows by default) in one batch; returns the path of the cache."""

    def make(
        name: str = "teacher",
        table: Table | None = None,
        *,
        labels: bool = True,
        digests: bool = False,
        **settings: Any,
    ) -> Path:
        table = make_table() if table is None else table
        settings = {"classes": table.logits.shape[1], "shard_rows": SHARD_ROWS, **settings}
        with Writer(tmp_path / name, **settings) as writer:
            codes = np.arange(len(table.logits), dtype=np.uint64) * 0x0101010101 if digests else None
            writer.write(table.ids, table.logits, table.labels if labels else None, input_digests=codes)
        return tmp_path / name

    return make


@pytest.fixture
def folder(make_cache: Callable[..., Path]) -> Path:
    """A folder cache of 100 rows in shards of 40, 40 and 20."""
    return make_cache()


@pytest.fixture
def one_file(make_cache: Callable[..., Path]) -> Path:
    """A one-file cache of the same rows."""
    return make_cache("teacher.h5")


@pytest.fixture
def content() -> Callable[[Path], dict[str, bytes]]:
    """All files under a path with their bytes, the lock file left out."""

    def read(path: Path) -> dict[str, bytes]:
        if path.is_file():
            return {path.name: path.read_bytes()}
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != ".lock")
        return {str(p.relative_to(path)): p.read_bytes() for p in files}

    return read


@pytest.fixture
def flip() -> Callable[..., None]:
    """Flips bits of one byte of a file, in a new file of the same name (a published one is never modified)."""

    def change(path: Path, position: int, mask: int = 1) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= mask
        replacement = path.with_name(f".flip-{os.getpid()}")
        replacement.write_bytes(data)
        replacement.replace(path)

    return change


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in another process, warnings on stderr."""

    def run(script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=check)

    return run


@pytest.fixture
def make_views(tmp_path: Path, make_table: Callable[..., Table]) -> Callable[..., tuple[Path, dict[int, np.ndarray]]]:
    """A folder with several views of 100 samples, in shards of 40, built as `precompute` builds one; and its logits."""

    def make(
        name: str = "views", *, views: tuple[int, ...] = (0, 3), ids: Any = None
    ) -> tuple[Path, dict[int, np.ndarray]]:
        table = make_table(ids=np.arange(ROWS) if ids is None else ids)
        stored_ids = as_sample_ids(table.ids)
        id_dtype = "<i8" if stored_ids.dtype.kind == "i" else f"|S{stored_ids.dtype.itemsize}"
        encoding = Dense((CLASSES,), "float16")
        schema = RowSchema(encoding, id_dtype, has_labels=True, has_digests=False)
        plan = Plan(schema, ClassList.of(CLASSES, None), SHARD_ROWS, ROWS, {}, views)
        dump = open_dump(tmp_path / name, plan)
        logits = {view: table.logits + view for view in views}
        for number in range(plan.shard_count):
            view, start, stop = plan.span(number)
            index = number % plan.shards_per_view
            assert dump.claim(view, index)
            container = dump.container(view, index, start, stop)
            arrays = encoding.encode(logits[view][start:stop]).arrays
            rows = {"sample_id": stored_ids[start:stop], "label": table.labels[start:stop], **arrays}
            container.append(rows, view=view, positions=np.arange(start, stop))
            record = container.record(view=view, start=start, ids=consecutive(stored_ids[start:stop]))
            dump.commit(container, record, index)
            dump.release(view, index)
        records = dump.all_records()
        assert records is not None
        dump.finish(records, samples=ROWS)
        return tmp_path / name, logits

    return make
