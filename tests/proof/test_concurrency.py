"""C1, "concurrency": workers of every start method give the same rows, and readers never see what a writer does."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

READERS = 8
PRELOAD = ["pytest", "torch", "concurrency_data", "kdcache.store.writer"]
METHODS = [
    (0, None),
    (2, "fork"),
    (4, "fork"),
    (2, "forkserver"),
    *(pytest.param(*pair, marks=pytest.mark.long) for pair in ((4, "forkserver"), (2, "spawn"), (4, "spawn"))),
]


@pytest.fixture(autouse=True, scope="module")
def _preloaded_server() -> Iterator[None]:
    """Lets the fork server import torch and kdcache once for all of its workers."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    yield
    multiprocessing.set_forkserver_preload(["__main__"])


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same rows as a folder cache and as one file."""
    from concurrency_jobs import write

    root = tmp_path_factory.mktemp("caches")
    for name in ("stable", "stable.h5"):
        write(root / name)
    return root


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 4 workers on a machine with fewer cores
@pytest.mark.parametrize(("workers", "method"), METHODS)
def test_workers_of_every_kind_give_the_rows_of_one_process(
    caches: Path, count: Any, proved: Any, workers: int, method: str | None
) -> None:
    """In every epoch, whether the cache was opened before the workers started or by them, kept or started anew."""
    from concurrency_data import ORDER, assert_same, data, epochs
    from concurrency_jobs import logits_of

    expected = epochs(data(caches / "stable", "mmap", "fresh"), 2)
    taught = {name: np.concatenate([batch[name] for batch in expected[0]]) for name in expected[0][0]}
    np.testing.assert_array_equal(np.sort(taught["id"]), ORDER)
    np.testing.assert_array_equal(taught["logits"] + taught["row_max"][:, None], logits_of(taught["id"]))
    kinds = itertools.product(("stable", "stable.h5"), ("mmap", "pread"), ("touched", "fresh", "inside"), (True, False))
    chosen = list(kinds) if method != "spawn" else list(kinds)[::8]  # its workers import torch anew, 2 s each
    some = [("stable", "mmap", "touched", True), ("stable.h5", "pread", "inside", False)]
    rows = loaders = 0
    for name, access, opened, persistent in count(some, chosen):
        options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": method}
        options["persistent_workers"] = persistent and workers > 0
        rows += assert_same(epochs(data(caches / name, access, opened), 2, **options), expected)
        loaders += 1
    proved("C1", **{f"rows through {workers} workers by {method}": rows, "loaders": loaders})
    assert rows == loaders * 2 * len(ORDER)


def test_readers_do_not_see_what_a_writer_does_beside_them(caches: Path, count: Any, proved: Any) -> None:
    """Dumps are made, finished and merged, shards added, one cache is mended and two are replaced while 8 read."""
    from concurrency_jobs import Seen, compute, dump, publish, read, start, write

    dump(caches / "growing")
    for name in ("replaced", "replaced.h5"):
        write(caches / name)
    rounds = count(1, 25)
    numbers = {name: range(rounds + 1) for name in ("replaced", "replaced.h5")}
    context = multiprocessing.get_context("forkserver")
    readers = [start(context, read, caches, numbers, seed) for seed in range(READERS)]
    assert [answer() for answer in readers] == ["begun"] * READERS
    writers = [start(context, job, caches, rounds) for job in (publish, *count([compute], [compute] * 2))]
    assert {answer() for answer in writers} == {rounds}
    (caches / "end").touch()
    found = [answer() for answer in readers]
    assert [seen.wrong for seen in found if seen.wrong] == []
    allowed = {
        "stable": set(),
        "growing": {"IncompleteCacheError"},  # while a shard of it is being mended
        "new": {"IncompleteCacheError"},  # before it is finished
        "replaced": {"IncompleteCacheError", "CorruptCacheError"},  # it is gone
    }
    total = functools.reduce(Seen.plus, found)
    assert all(error in allowed[name.split("-")[0].split(".")[0]] for name, error in total.errors), total.errors
    assert all(seen.rows > 0 for seen in found)
    assert total.opened["stable"] >= READERS
    assert total.opened["stable.h5"] >= READERS
    assert any(name.startswith("new") for name in total.opened)
    proved(
        "C1",
        readers=READERS,
        **{f"rows beside {len(writers)} writers": total.rows, "opens": total.opened.total()},
        **{"dumps published": 6 * rounds, "shards added or mended": 2 * rounds},
        typed_errors=total.errors.total(),
    )
