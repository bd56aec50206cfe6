"""The Writer: the same bytes however the rows come, and nothing half-done published."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.errors import (
    UsageError,
)
from kdcache.store import cache as caches
from kdcache.store.verify import verify
from kdcache.store.writer import Writer

CLASSES = 5


def batches(table: Any, sizes: list[int]) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    start = 0
    for size in sizes:
        yield table.ids[start : start + size], table.logits[start : start + size], table.labels[start : start + size]
        start += size


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_what_is_written_is_read(make_cache: Any, table: Any, dtype: str, name: str) -> None:
    path = make_cache(name, dtype=dtype)
    cache = caches.open(path)
    rows = cache.gather(cache.rows(table.ids))
    np.testing.assert_array_equal(rows.dense(), table.logits)
    np.testing.assert_array_equal(rows.label, table.labels)
    np.testing.assert_array_equal(rows.sample_id, table.ids)
    assert verify(path).ok


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 45), max_size=8))
def test_any_batch_size_gives_the_same_bytes(
    tmp_path: Path, table: Any, content: Any, folder: Path, sizes: list[int]
) -> None:
    left = 100 - sum(sizes)
    with Writer(tmp_path / "other", classes=CLASSES, shard_rows=40, overwrite=True) as writer:
        for batch in batches(table, sizes if left <= 0 else [*sizes, left]):
            writer.write(*batch)
    assert content(tmp_path / "other") == content(folder)


def test_the_last_shard_may_be_short(folder: Path, table: Any) -> None:
    assert [p.name for p in sorted((folder / "shards").iterdir())] == [f"v000-0000{n}.h5" for n in range(3)]
    assert [r.rows for r in caches.open(folder).catalog.shards] == [40, 40, 20]


def test_rows_that_fill_the_last_shard_leave_no_empty_one(make_cache: Any, make_table: Any) -> None:
    assert [r.rows for r in caches.open(make_cache(table=make_table(80))).catalog.shards] == [40, 40]


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_a_finished_cache_leaves_nothing_else_behind(make_cache: Any, tmp_path: Path, content: Any, name: str) -> None:
    make_cache(name)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    shards = [f"teacher/shards/v000-0000{n}.h5" for n in range(3)]
    assert files == (["teacher.h5"] if name.endswith(".h5") else ["teacher/.lock", "teacher/manifest.json", *shards])


def test_published_files_are_read_only(folder: Path) -> None:
    assert {p.stat().st_mode & 0o777 for p in [folder / "manifest.json", *(folder / "shards").iterdir()]} == {0o444}


def test_a_closed_writer_takes_no_rows_and_closes_twice(tmp_path: Path, table: Any) -> None:
    writer = Writer(tmp_path / "teacher", classes=CLASSES)
    writer.write(table.ids, table.logits)
    writer.close()
    writer.close()
    with pytest.raises(UsageError, match="closed"):
        writer.write([1000], table.logits[:1])


def test_memory_does_not_grow_with_the_size_of_a_shard(tmp_path: Path) -> None:
    logits = np.zeros((500, 1000), np.float32)
    peaks: dict[int, int] = {}

    def measure(rows: int) -> None:
        tracemalloc.start()
        with Writer(tmp_path / str(rows), classes=1000, shard_rows=rows) as writer:
            for start in range(0, rows - 1000, 500):  # a short last shard: it is copied into a smaller one
                writer.write(np.arange(start, start + 500), logits)
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    measure(2000)
    measure(10_000)
    # 20 MB a shard against 4; the ids that were seen cost about 100 bytes a row.
    assert peaks[10_000] < peaks[2000] + 8000 * 200 + (9 << 20)


def test_writing_needs_no_torch(python: Callable[..., Any], tmp_path: Path) -> None:
    script = """
import sys, numpy as np, kdcache
with kdcache.Writer(sys.argv[1], classes=2) as writer:
    writer.write([1, 2], np.zeros((2, 2), np.float32), [0, 1])
kdcache.open(sys.argv[1]).gather([1, 0]).dense()
assert "torch" not in sys.modules
"""
    python(script, tmp_path / "teacher")
