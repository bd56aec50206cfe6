"""One cache in many processes: DataLoader workers of every start method, forks, read-only places, other writers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import kdcache
from kdcache.store import cache as caches
from kdcache.store.verify import verify


class Rows(Dataset[tuple[int, np.ndarray]]):
    """Items (id, logits) gathered one by one, in whichever process asks."""

    def __init__(self, cache: caches.Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return self.cache.num_samples

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        return index, self.cache.gather(self.cache.rows([index])).dense()[0]


def collected(loader: DataLoader[Any]) -> np.ndarray:
    logits = np.full((100, 5), np.nan, np.float32)
    for index, rows in loader:
        logits[index.numpy()] = rows.numpy()
    return logits


@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_forked_workers_read_every_row(make_cache: Any, table: Any, name: str, workers: int) -> None:
    cache = caches.open(make_cache(name))
    cache.gather([3])  # the parent has maps already, the workers inherit them
    context = "fork" if workers else None
    loader = DataLoader(Rows(cache), batch_size=9, num_workers=workers, multiprocessing_context=context)
    np.testing.assert_array_equal(collected(loader), table.logits)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_processes_of_other_start_methods_open_it_anew(make_cache: Any, table: Any, method: str, name: str) -> None:
    cache = caches.open(make_cache(name))
    cache.gather(np.arange(100))
    # The function is the method of the cache itself: without this module the processes start without torch.
    with multiprocessing.get_context(method).Pool(4) as pool:
        parts = pool.map(cache.gather, np.array_split(np.arange(100), 8))
    np.testing.assert_array_equal(np.concatenate([p.dense() for p in parts]), table.logits)


@contextlib.contextmanager
def read_only_mount(path: Path, place: Path) -> Iterator[Path]:
    place.mkdir()
    for command in (["mount", "--bind", path, place], ["mount", "-o", "remount,ro,bind", place]):
        if subprocess.run(list(map(str, command)), capture_output=True).returncode != 0:
            subprocess.run(["umount", str(place)], capture_output=True)
            pytest.skip("this process may not mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_a_read_only_file_system_is_enough(folder: Path, table: Any, tmp_path: Path, access: str) -> None:
    with read_only_mount(folder, tmp_path / "mounted") as place:
        with pytest.raises(OSError, match="Read-only"):
            (place / "x").write_text("")
        with caches.open(place, access=access) as cache:
            np.testing.assert_array_equal(cache.gather(cache.rows(table.ids)).dense(), table.logits)
        assert verify(place).ok


def test_a_folder_without_write_permission_is_enough(folder: Path, table: Any) -> None:
    for path in (folder, folder / "shards"):
        path.chmod(0o555)
    try:
        cache = caches.open(folder)
        np.testing.assert_array_equal(cache.gather(cache.rows(table.ids)).dense(), table.logits)
        assert verify(folder).ok
    finally:
        for path in (folder, folder / "shards"):
            path.chmod(0o755)


WRITE = """
import sys, numpy as np, kdcache
for turn in range(1, 9):
    with kdcache.Writer(sys.argv[1], classes=5, shard_rows=40, overwrite=True) as writer:
        writer.write(np.arange(100), np.full((100, 5), turn, np.float32))
    print(turn, flush=True)
"""


def test_a_reader_sees_one_dump_or_another_and_never_a_mixture(tmp_path: Path) -> None:
    """While another process replaces the cache again and again, each open gives rows of one dump or a typed error."""
    path = tmp_path / "teacher"
    seen = set()
    with subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        while other.poll() is None:
            try:
                values = kdcache.open(path).gather(np.arange(100)).dense()
            except kdcache.KDCacheError as error:
                seen.add(type(error).__name__)
            else:
                seen.add(float(values[0, 0]))
                assert len(np.unique(values)) == 1
        assert other.returncode == 0
    assert kdcache.open(path).gather([0]).dense()[0, 0] == 8
    assert any(isinstance(s, float) for s in seen)
    assert {s for s in seen if isinstance(s, str)} <= {"IncompleteCacheError", "CorruptCacheError"}


def test_a_reader_is_not_disturbed_by_shards_that_another_process_adds(folder: Path, table: Any, python: Any) -> None:
    reader = caches.open(folder)
    reader.gather([0])
    script = "import sys; [open(f'{sys.argv[1]}/shards/v001-{n:05d}.h5', 'wb').write(b'x') for n in range(50)]"
    python(script, folder)
    np.testing.assert_array_equal(reader.gather(np.arange(100)).dense(), table.logits)
    np.testing.assert_array_equal(caches.open(folder).gather(np.arange(100)).dense(), table.logits)


def test_a_fork_while_a_thread_holds_the_guard_does_not_hang(folder: Path, table: Any) -> None:
    cache = caches.open(folder)
    with cache._grid._lock():
        child = os.fork()
        if child == 0:  # a lock that was copied while held would wait for ever here
            good = np.array_equal(cache.gather(np.arange(100)).dense(), table.logits)
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_daemon_thread_may_read_until_the_process_ends(folder: Path, python: Any) -> None:
    script = """
import sys, threading, numpy as np, kdcache
cache, started = kdcache.open(sys.argv[1]), threading.Event()
def read():
    while True:
        cache.gather(np.arange(100))
        started.set()
threading.Thread(target=read, daemon=True).start()
started.wait()
"""
    assert python(script, folder).returncode == 0


def test_torch_tensors_of_a_batch_share_its_memory(folder: Path) -> None:
    rows = caches.open(folder).gather([1, 2])
    tensors = rows.tensors()
    assert tensors.arrays["logits"].dtype == torch.float16
    assert tensors.arrays["logits"].data_ptr() == rows.arrays["logits"].ctypes.data
