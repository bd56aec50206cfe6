"""Disks that are really full, commands on them in processes of their own, and what must hold after a refusal."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import full_disk_task as task
import h5py
import numpy as np
import pytest

from kdcache.format.checksums import file_sha256, header_digest, row_crcs
from kdcache.format.hdf5_parser import parse
from kdcache.format.manifest import parse_shard
from kdcache.format.sealed import load_sealed
from kdcache.store.plan import parse_plan

HERE = str(Path(__file__).parent)
DATE = {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1"}
FORKS = multiprocessing.get_context("forkserver")
PRELOAD = ["pytest", "kdcache.stages.precompute", "kdcache.stages.distill", "kdcache.store.export", "kdcache_cli.main"]
MIB = 1 << 20
FILES = 400
FULL = "the disk is full|to spare, and its disk has|files and its disk has"


@dataclass(frozen=True)
class Ended:
    """How a command ended; the code is negative where a signal killed it."""

    code: int
    errors: str


class Disk:
    """A small file system of its own.

    Attributes:
        path: where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, size: int) -> None:
        """Gives a tmpfs another size in bytes."""
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)

    def fill(self, what: str, left: int) -> None:
        """Another process takes all but so many `blocks` or `files`."""
        task.fill(self.path, what, left)

    def free(self) -> None:
        """Removes what the other process wrote."""
        for path in self.path.glob("filler*"):
            path.unlink()

    def clear(self) -> None:
        """Removes everything."""
        for path in self.path.iterdir():
            if path.name != "lost+found":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def temporaries(self) -> list[Path]:
        """What should not be left of a command that has ended."""
        return [path for path in self.path.rglob("*") if path.name.startswith(".tmp-")]


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[Disk]:
    """A file system at `place` while the block runs; skips the test where this process may not mount."""
    place.mkdir()
    done = subprocess.run(["mount", *options, place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this process may not mount a file system of its own ({done.stderr.strip()})")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def tmpfs(place: Path, *, size: int) -> Iterator[Disk]:
    """A disk of `size` bytes in memory."""
    with mounted(place, "-t", "tmpfs", "-o", f"size={size},nr_inodes={FILES}", "kdcache-test") as disk:
        yield disk


@contextmanager
def ext4(place: Path, *, size: int) -> Iterator[Disk]:
    """A disk of `size` bytes with ext4 in a file, whose data gets its blocks long after it was written."""
    image = place.with_name(f"{place.name}.img")
    with image.open("wb") as file:
        file.truncate(size)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-b", "1024", image], check=True)
    with mounted(place, "-o", "loop", str(image)) as disk:
        yield disk
    image.unlink()


def command(*arguments: object, file_bytes: int | None = None, **environment: str) -> Ended:
    """Runs `kdcache ARGUMENTS` in a fork of a process that has imported torch; `file_bytes` is `ulimit -f`."""
    return started(*arguments, file_bytes=file_bytes, **environment)()


def started(*arguments: object, file_bytes: int | None = None, **environment: str) -> Any:
    """Starts the command; the call of what it returns waits for its end."""
    FORKS.set_forkserver_preload(PRELOAD)
    answer, other = FORKS.Pipe(duplex=False)
    given = (list(map(str, arguments)), {**DATE, **environment}, file_bytes, other)
    process = FORKS.Process(target=task.run_command, args=given)
    process.start()
    other.close()

    def ended() -> Ended:
        with answer:
            try:
                code, errors = answer.recv()
            except EOFError:
                code, errors = 0, ""
        process.join()
        return Ended(process.exitcode or code, errors)

    return ended


def real_command(*arguments: object, **environment: str) -> Ended:
    """`python -m kdcache ARGUMENTS`."""
    done = subprocess.run(
        [sys.executable, "-m", "kdcache", *map(str, arguments)],
        env={**os.environ, **DATE, "PYTHONPATH": os.pathsep.join([HERE, *sys.path]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Ended(done.returncode, done.stderr)


def precompute_line(out: Path, *more: object, data: str = "Unnamed") -> list[object]:
    """A dump of 100 rows in 3 shards; 25 rows a batch."""
    specs = ["--teacher", "full_disk_task:teacher", "--data", f"full_disk_task:{data}", "--out", out]
    return ["precompute", *specs, "--shard-rows", 40, "--batch-size", 25, "--threads", 1, "--device", "cpu", *more]


def distill_line(out: Path, cache: Path) -> list[object]:
    """A run of 8 steps with checkpoints, evaluations and lines; the same line starts it and goes on with it."""
    specs = ["--student", "full_disk_task:student", "--data", "full_disk_task:Unnamed", "--cache", cache, "--out", out]
    often = ["--log-steps", 1, "--eval-steps", 3, "--checkpoint-steps", 2, "--resume", "--threads", 1]
    return ["distill", *specs, "--val", "full_disk_task:Unnamed", "--epochs", 2, "--batch-size", 25, *often]


def contents(path: Path) -> dict[str, bytes]:
    """All files of a cache or a run by name but the lock, which is empty."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = [file for file in path.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def assert_refused(ended: Ended, disk: Disk, *, reason: str = FULL, advice: str = "free some space") -> None:
    """Exit code 1 and no signal, one sentence with what, where and what to do, and no temporary file."""
    assert ended.code == 1, ended
    assert re.search(reason, ended.errors), ended
    assert advice in ended.errors, ended
    assert str(disk.path) in ended.errors, ended
    assert "Traceback" not in ended.errors, ended
    assert "internal error" not in ended.errors, ended
    assert disk.temporaries() == []


def refusals(
    disk: Disk,
    attempt: Callable[[int], Ended],
    again: Callable[[], Ended],
    *,
    room: Iterable[int],
    after: Callable[[], object],
    finished: Callable[[], bool],
    to_the_end: bool = False,
    **expected: str,
) -> Counter[str]:
    """Runs a command with more and more room until there is enough; what was refused must finish when room is made.

    Args:
        disk: it writes to; emptied after each try.
        attempt: the command with so many blocks or files left to it.
        again: the same command with room enough.
        room: ascending numbers to try.
        after: raises if what a refused command left is not sound.
        finished: whether the result is that of a command that was never refused.
        to_the_end: try all of `room`: where processes race, the first success is not the last refusal.
        expected: `reason` and `advice` of `assert_refused`.

    Returns:
        How often each file could not be written, by name.
    """
    refused: Counter[str] = Counter()
    for left in room:
        ended = attempt(left)
        if ended.code != 0:
            assert_refused(ended, disk, **expected)
            found = re.search(r"could not \w+ (\S+): No space", ended.errors)
            refused[re.sub(r"\.tmp-|-\d+-[0-9a-f]{8}$", "", Path(found[1]).name) if found else ended.errors] += 1
            after()
        disk.free()
        if ended.code != 0:
            second = again()
            assert second.code == 0, (left, ended, second)
        assert finished(), (left, ended)
        assert disk.temporaries() == []
        disk.clear()
        if ended.code == 0 and not to_the_end:
            break
    assert ended.code == 0, f"refused with up to {left} left: {refused}"
    return refused


def committed_shards(folder: Path) -> list[str]:
    """The shards of an unfinished dump that have a commit record; every one is read and checked in full."""
    names = sorted(path.stem for path in (folder / "shards").glob("*.json"))
    if not names:
        return []
    plan = parse_plan((folder / "plan.json").read_bytes(), where="plan.json")
    for name in names:
        raw, text = (folder / "shards" / f"{name}.h5").read_bytes(), (folder / "shards" / f"{name}.json").read_bytes()
        record = parse_shard(load_sealed(text, where=name, advice=""), plan.schema, where=name)
        view = memoryview(raw)

        def read(offset: int, length: int, view: memoryview = view) -> bytes:
            return bytes(view[offset : offset + length])

        assert (len(raw), file_sha256(read, len(raw))) == (record.size, record.sha256)
        assert header_digest(read, record.arrays, len(raw)) == record.header_blake2b
        assert parse(read, len(raw), name=name).arrays == record.arrays
        with h5py.File(folder / "shards" / f"{name}.h5", "r") as file:
            arrays = {array: file[array][:] for array in record.arrays}
        positions = np.arange(record.start, record.stop)
        crcs = row_crcs([arrays[array] for array in plan.schema.crc_names], view=record.view, positions=positions)
        np.testing.assert_array_equal(crcs, arrays["row_crc"])
        np.testing.assert_array_equal(arrays["sample_id"], positions)
    return names
