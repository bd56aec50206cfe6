"""R4, "a full disk": a real one ends a command with exit code 1 and one sentence, and loses nothing committed.

The file systems are mounted for the test (tmpfs, and ext4 in a file with `--long`), the commands run in processes of
their own, and room grows block by block, so that every write is once the first that does not fit. Where this process
may not mount, a limit on the size of a file stands in.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdcache


@pytest.fixture(scope="module", autouse=True)
def _preloaded(request: pytest.FixtureRequest) -> None:
    """torch imports its compiler when an optimiser takes its first step: 1 s, which 40 runs need not pay each."""
    from full_disk_runs import PRELOAD

    if request.config.getoption("--long"):
        PRELOAD.append("torch._dynamo")


FOLDER_TOO = [pytest.param("", marks=pytest.mark.long, id="folder"), pytest.param(".h5", id="file")]


def shards_of(out: Path) -> Path:
    return out if out.suffix != ".h5" else out.with_name(f"{out.name}.parts")


def sweep_dumps(
    disk: Any, out: Path, expected: dict[str, bytes], room: Iterable[int], *, what: str = "blocks", processes: int = 1
) -> Counter[str]:
    """Dumps whose disk is filled by another process after their checks; everything committed is read and compared."""
    from full_disk_runs import Ended, command, committed_shards, contents, precompute_line, refusals, started

    def attempt(left: int) -> Ended:
        fate = {"FULL_DISK_FILL": f"{disk.path}:{what}:{left}"}
        running = [started(*precompute_line(out), **fate) for _ in range(processes)]
        ended = [wait() for wait in running]
        assert {end.code for end in ended} <= {0, 1}
        return max(ended, key=lambda end: end.code)

    def after() -> None:
        for name in committed_shards(shards_of(out)):
            raw = (shards_of(out) / "shards" / f"{name}.h5").read_bytes()
            assert out.suffix == ".h5" or raw == expected[f"shards/{name}.h5"]

    def finished() -> bool:
        return contents(out) == expected and (out.suffix != ".h5" or not shards_of(out).exists())

    def again() -> Ended:
        return command(*precompute_line(out))

    races = processes > 1
    return refusals(disk, attempt, again, room=room, after=after, finished=finished, to_the_end=races)


@pytest.mark.parametrize("suffix", FOLDER_TOO)
def test_a_dump_on_a_full_disk_keeps_what_is_committed_and_goes_on(
    disk: Any, whole: Any, count: Any, proved: Any, suffix: str
) -> None:
    """Another process takes the disk between the checks of the dump and its first row."""
    room = count(range(3, 100, 4), range(100))
    refused = sweep_dumps(disk, disk.path / f"teacher{suffix}", whole(suffix), room)
    proved("R4", **{f"full disks under a dump to teacher{suffix}": refused.total()})
    assert refused["manifest.json"] == 1
    assert refused["teacher.h5"] >= (count(1, 4) if suffix else 0)
    if count(False, True):
        assert refused.total() >= 12
        for shard in ("v000-00000", "v000-00001", "v000-00002"):
            assert refused[f"{shard}.h5"] >= 2
            assert refused[f"{shard}.json"] == 1  # its commit record


@pytest.mark.parametrize("suffix", FOLDER_TOO)
def test_a_dump_on_a_disk_without_room_for_another_file_does_the_same(
    disk: Any, whole: Any, count: Any, proved: Any, suffix: str
) -> None:
    room = count((4, 99), range(100))
    refused = sweep_dumps(disk, disk.path / f"teacher{suffix}", whole(suffix), room, what="files")
    proved("R4", **{f"disks out of inodes under a dump to teacher{suffix}": refused.total()})
    assert refused.total() >= count(1, 6)


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["", ".h5"])
def test_two_processes_of_one_dump_on_a_full_disk_do_the_same(disk: Any, whole: Any, proved: Any, suffix: str) -> None:
    refused = sweep_dumps(disk, disk.path / f"teacher{suffix}", whole(suffix), range(40), processes=2)
    proved("R4", **{f"full disks under two processes of a dump to teacher{suffix}": refused.total()})
    assert refused.total() >= 8


@pytest.mark.long
@pytest.mark.parametrize("suffix", FOLDER_TOO)
def test_a_dump_on_a_full_ext4_does_the_same(tmp_path: Path, whole: Any, proved: Any, suffix: str) -> None:
    """Blocks of 1,024 bytes, a journal, and data that gets its blocks long after it was written."""
    from full_disk_runs import MIB, ext4

    with ext4(tmp_path / "disk", size=32 * MIB) as disk:
        refused = sweep_dumps(disk, disk.path / f"teacher{suffix}", whole(suffix), range(200))
    proved("R4", **{f"full ext4 disks under a dump to teacher{suffix}": refused.total()})
    assert refused.total() >= 8


def dumped(out: Path, cache: Path) -> list[object]:
    """20 shards, so that the manifest is larger than a shard and the one file larger than the manifest."""
    from full_disk_runs import precompute_line

    return precompute_line(out, "--shard-rows", 5)


def written(out: Path, cache: Path) -> list[object]:
    return ["write", out]


def merged(out: Path, cache: Path) -> list[object]:
    return ["merge", cache, out]


def exported(out: Path, cache: Path) -> list[object]:
    return ["export", cache, out, "--overwrite", *(["--compress", "gzip"] if "gzip" in out.name else [])]


def distilled(out: Path, cache: Path) -> list[object]:
    from full_disk_runs import distill_line

    return distill_line(out, cache)


COMMANDS = {
    "dumped.h5": dumped,
    "written": written,
    "written.h5": written,
    "merged.h5": merged,
    "rows.npz": exported,
    "rows-gzip.h5": exported,
    "run": distilled,
}


def names(*usual: str) -> list[Any]:
    """The names of all commands; those that are not `usual` run with --long."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.long) for name in COMMANDS]


def comparable(path: Path) -> Any:
    """What a command leaves, without the times of a run."""
    from full_disk_runs import contents

    found: dict[str, Any] = contents(path)
    found.pop("run.json", None)
    if "metrics.jsonl" in found:
        lines = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
        found["metrics.jsonl"] = [{k: v for k, v in line.items() if k != "rows_per_second"} for line in lines]
    return found


@pytest.mark.parametrize("name", names("written.h5", "rows-gzip.h5")[1:])
def test_every_command_that_writes_survives_a_full_disk(
    disk: Any, tmp_path: Path, count: Any, proved: Any, name: str
) -> None:
    from full_disk_runs import Ended, command, committed_shards, refusals

    line, cache = COMMANDS[name], tmp_path / "cache"
    assert command("write", cache).code == 0
    assert command(*line(tmp_path / name, cache)).code == 0
    expected, out = comparable(tmp_path / name), disk.path / name

    def attempt(left: int) -> Ended:
        disk.fill("blocks", left)
        return command(*line(out, cache))

    def after() -> None:
        if line is written:
            committed_shards(shards_of(out))
        elif line is distilled:
            assert all(readable(path) for path in out.glob("*.pt"))
        else:
            assert not out.exists()

    def again() -> Ended:
        return command(*line(out, cache))

    refused = refusals(
        disk,
        attempt,
        again,
        room=count((1 + len(name) % 5, 100), range(100)),
        after=after,
        finished=lambda: comparable(out) == expected,
    )
    proved("R4", **{f"full disks under {name}": refused.total()})
    assert refused.total() >= count(1, 7)
    if line is distilled and count(False, True):
        assert refused["resume.pt"] >= 1
        assert refused["metrics.jsonl"] >= 1


def readable(path: Path) -> bool:
    import torch

    return isinstance(torch.load(path, weights_only=True), dict)


def test_rows_are_read_from_a_disk_that_is_full(disk: Any) -> None:
    """A page that a map asks for and a full disk in memory cannot give would end the process with SIGBUS."""
    from full_disk_runs import command

    for name in ("written", "written.h5"):
        assert command("write", disk.path / name).code == 0
    disk.fill("blocks", 0)
    for name in ("written", "written.h5"):
        assert command("verify", disk.path / name).code == 0
        for access in ("mmap", "pread"):
            with kdcache.open(disk.path / name, access=access) as cache:
                assert len(cache.gather(np.arange(100)).dense()) == 100


@pytest.mark.parametrize("name", names("dumped.h5"))
def test_a_limit_on_the_size_of_files_is_no_signal_either(tmp_path: Path, count: Any, proved: Any, name: str) -> None:
    """Without any right to mount: the kernel ends a write above the limit with SIGXFSZ where that is not refused."""
    from full_disk_runs import Disk, Ended, command, refusals

    line, cache, place = COMMANDS[name], tmp_path / "cache", Disk(tmp_path / "limited")
    place.path.mkdir()
    assert command("write", cache).code == 0

    def run(out: Path, file_bytes: int | None = None) -> Ended:
        return command(*line(out, cache), file_bytes=file_bytes)

    assert run(tmp_path / name).code == 0
    expected, out = comparable(tmp_path / name), place.path / name
    limits = [int(1.25**n) for n in range(20, 80)]
    refused = refusals(
        place,
        lambda limit: run(out, limit),
        lambda: run(out),
        room=count((2500, 1 << 30), limits),
        after=lambda: None,
        finished=lambda: comparable(out) == expected,
        reason="file-size limit",
        advice="ulimit -f",
    )
    proved("R4", **{f"file size limits under {name}": refused.total()})
    assert refused.total() >= count(1, 8)


def test_a_result_that_cannot_be_printed_is_one_sentence(tmp_path: Path) -> None:
    from full_disk_runs import command

    assert command("write", tmp_path / "cache").code == 0
    line = [sys.executable, "-m", "kdcache", "inspect"]
    with open("/dev/full", "w") as full:
        shown = subprocess.run([*line, tmp_path / "cache"], stdout=full, stderr=subprocess.PIPE, text=True)
        silent = subprocess.run([*line, tmp_path / "none"], stdout=full, stderr=full)
    assert shown.returncode == 1
    assert "could not print the result on stdout: No space left on device; what was asked for is done" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert silent.returncode == 4  # nobody reads the message, the exit code tells


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_log_on_a_full_disk_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    from kdcache.stages import progress

    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 (closing it fails as well)
    monkeypatch.setattr(sys, "stderr", full)
    monkeypatch.setattr(full, "isatty", lambda: is_terminal, raising=False)
    with pytest.raises(OSError, match="No space left"):
        print("a line", file=sys.stderr, flush=True)
    with progress.Progress(3, what="precompute", unit=" rows") as bar:
        for _ in range(3):
            bar.advance()
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["", ".h5"])
def test_python_m_kdcache_ends_with_exit_code_1_too(disk: Any, whole: Any, proved: Any, suffix: str) -> None:
    """Not in a fork: the process that a shell starts, its interpreter's end included."""
    from full_disk_runs import assert_refused, committed_shards, contents, precompute_line, real_command

    out, expected = disk.path / f"teacher{suffix}", whole(suffix)
    for left in (5, 13):
        ended = real_command(*precompute_line(out), FULL_DISK_FILL=f"{disk.path}:blocks:{left}")
        if left == 13 and not suffix:
            assert ended.code == 0
        else:
            assert_refused(ended, disk)
            committed_shards(shards_of(out))
        disk.free()
        assert real_command(*precompute_line(out)).code == 0
        assert contents(out) == expected
        disk.clear()
    proved("R4", **{f"full disks under python -m kdcache precompute to teacher{suffix}": 1 + bool(suffix)})
