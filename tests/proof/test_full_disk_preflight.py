"""R4, "a full disk": a dump that does not fit is refused before its teacher is loaded, and one that fits is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

SPARE = 16 << 20  # what a dump leaves free on its disk
BLOCK = 4096
DUMP_BLOCKS = 8  # 3 shards of 100 rows of 100 float16 classes: 31,000 bytes
FOLDER_TOO = [pytest.param("", marks=pytest.mark.long, id="folder"), pytest.param(".h5", id="file")]


def loaded(disk: Any, marker: Path, *line: object, **environment: str) -> tuple[Any, bool]:
    """How a dump ended, and whether its teacher was loaded."""
    from full_disk_runs import command

    marker.unlink(missing_ok=True)
    ended = command(*line, FULL_DISK_LOADED=str(marker), **environment)
    return ended, marker.exists()


@pytest.mark.parametrize("suffix", FOLDER_TOO)
def test_a_dump_that_does_not_fit_is_refused_before_the_teacher_is_loaded(
    disk: Any, tmp_path: Path, suffix: str
) -> None:
    """The data set says how many classes there are, so the size is known to the block."""
    from full_disk_runs import assert_refused, precompute_line

    blocks = 2 * DUMP_BLOCKS if suffix else DUMP_BLOCKS
    line = precompute_line(disk.path / f"teacher{suffix}", data="Named")
    disk.resize(SPARE + (blocks - (2 if suffix else 1)) * BLOCK)  # the teacher's name in the headers is not known yet
    ended, was_loaded = loaded(disk, tmp_path / "loaded", *line)
    assert_refused(ended, disk)
    assert not was_loaded
    assert not any(disk.path.iterdir())
    disk.resize(SPARE + blocks * BLOCK)
    ended, was_loaded = loaded(disk, tmp_path / "loaded", *line)
    assert ended.code == 0, ended
    assert was_loaded


def test_data_that_does_not_tell_its_classes_is_refused_as_soon_as_they_are_known(disk: Any, tmp_path: Path) -> None:
    from full_disk_runs import assert_refused, precompute_line

    line = precompute_line(disk.path / "teacher", data="Unnamed")
    for blocks, is_known_before in ((2, True), (DUMP_BLOCKS - 1, False)):
        disk.resize(SPARE + blocks * BLOCK)
        ended, was_loaded = loaded(disk, tmp_path / "loaded", *line)
        assert_refused(ended, disk)
        assert was_loaded is not is_known_before
        assert not any(disk.path.iterdir())  # not even a plan


def test_what_is_committed_counts_when_a_dump_goes_on(disk: Any, tmp_path: Path, whole: Any) -> None:
    from full_disk_runs import assert_refused, committed_shards, contents, precompute_line

    out = disk.path / "teacher"
    line = precompute_line(out)
    ended, _ = loaded(disk, tmp_path / "loaded", *line, FULL_DISK_FILL=f"{disk.path}:blocks:5")
    assert_refused(ended, disk)
    ended, was_loaded = loaded(disk, tmp_path / "loaded", *line)  # the other process has not made room
    assert_refused(ended, disk)
    assert not was_loaded
    assert committed_shards(out) == ["v000-00000"]
    disk.free()
    used = sum(-(-file.stat().st_size // BLOCK) for file in out.rglob("*") if file.is_file())
    disk.resize(SPARE + (used + DUMP_BLOCKS - 3) * BLOCK)  # a whole dump would not fit beside what is there
    assert loaded(disk, tmp_path / "loaded", *line)[0].code == 0
    assert contents(out) == whole("")


@pytest.mark.parametrize("suffix", FOLDER_TOO)
def test_a_finished_cache_needs_no_room(disk: Any, tmp_path: Path, suffix: str) -> None:
    from full_disk_runs import precompute_line

    line = precompute_line(disk.path / f"teacher{suffix}")
    assert loaded(disk, tmp_path / "loaded", *line)[0].code == 0
    disk.fill("blocks", 0)
    disk.fill("files", 3)
    ended, _ = loaded(disk, tmp_path / "loaded", *line)
    assert ended.code == 0, ended


@pytest.mark.parametrize("suffix", FOLDER_TOO)
def test_a_cache_is_not_overwritten_by_one_that_does_not_fit(
    disk: Any, tmp_path: Path, whole: Any, suffix: str
) -> None:
    """What goes counts as free, and it stays where that is not enough."""
    from full_disk_runs import assert_refused, contents, precompute_line

    out = disk.path / f"teacher{suffix}"
    assert loaded(disk, tmp_path / "loaded", *precompute_line(out))[0].code == 0
    line = precompute_line(out, "--dtype", "float32", "--overwrite", data="Named")
    needed = (2 if suffix else 1) * sum(
        len(raw) for name, raw in whole("", "--dtype", "float32").items() if "shard" in name
    )
    disk.resize((SPARE + needed - 8 * BLOCK) // BLOCK * BLOCK)
    ended, was_loaded = loaded(disk, tmp_path / "loaded", *line)
    assert_refused(ended, disk)
    assert not was_loaded
    assert contents(out) == whole(suffix)
    disk.resize((SPARE + needed + 8 * BLOCK) // BLOCK * BLOCK)
    status = os.statvfs(disk.path)
    assert status.f_bavail * status.f_frsize < SPARE + needed  # only without the old one
    ended, _ = loaded(disk, tmp_path / "loaded", *line)
    assert ended.code == 0, ended


def test_a_dump_of_more_files_than_the_disk_has_room_for_is_refused_before_the_teacher_is_loaded(
    disk: Any, tmp_path: Path
) -> None:
    from full_disk_runs import assert_refused, precompute_line

    out = disk.path / "teacher"
    disk.fill("files", 100)
    ended, was_loaded = loaded(disk, tmp_path / "loaded", *precompute_line(out, "--shard-rows", 2))
    assert_refused(ended, disk, advice="larger --shard-rows")
    assert not was_loaded
    assert not out.exists()
    assert loaded(disk, tmp_path / "loaded", *precompute_line(out, "--shard-rows", 4))[0].code == 0


def test_a_dry_run_tells_what_does_not_fit(disk: Any, tmp_path: Path) -> None:
    from full_disk_runs import precompute_line

    disk.resize(BLOCK)
    line = precompute_line(disk.path / "teacher", "--dry-run", data="Named")
    assert loaded(disk, tmp_path / "loaded", *line)[0].code == 0
