"""The folder of a run: what is there at its start, after whatever ended the process before."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.errors import KDCacheError, StorageError, UsageError
from kdcache.stages import checkpoint
from kdcache.stages.run_record import RUN_FILES, check_folder, prepare_folder, read_record, write_record


def fill(out: Path, *names: str) -> None:
    out.mkdir(exist_ok=True)
    for name in names:
        (out / name).write_bytes(b"{}")


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a" / "run", overwrite=False)
    assert names(tmp_path / "a" / "run") == set()


def test_with_a_checkpoint_all_stays_but_temporary_files(tmp_path: Path) -> None:
    fill(tmp_path, *RUN_FILES, ".tmp-resume.pt-1-0123abcd", "notes.txt")
    prepare_folder(tmp_path, overwrite=False)
    assert names(tmp_path) == {*RUN_FILES, "notes.txt"}


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    """A `best.pt` of the run before would else stand beside a run that has none."""
    fill(tmp_path, "run.json", "metrics.jsonl", "best.pt", "notes.txt")
    prepare_folder(tmp_path, overwrite=False)
    assert names(tmp_path) == {"notes.txt"}


def test_a_finished_run_loses_only_a_checkpoint_that_was_left_over(tmp_path: Path) -> None:
    fill(tmp_path, "metrics.jsonl", "best.pt", "last.pt", "resume.pt")
    write_record(tmp_path, {"status": "done"})
    prepare_folder(tmp_path, overwrite=False)
    assert names(tmp_path) == {"run.json", "metrics.jsonl", "best.pt", "last.pt"}


def test_overwrite_removes_a_run_and_its_events(tmp_path: Path) -> None:
    fill(tmp_path, *RUN_FILES, "notes.txt")
    fill(tmp_path / "tensorboard", "events.out.tfevents.0000000000", "mine")
    prepare_folder(tmp_path, overwrite=True)
    assert names(tmp_path) == {"notes.txt", "tensorboard"}
    assert names(tmp_path / "tensorboard") == {"mine"}


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "notes.txt")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        check_folder(tmp_path, resume=False, overwrite=False)
    with pytest.raises(UsageError, match="is a file"):
        check_folder(tmp_path / "notes.txt", resume=False, overwrite=False)


def test_versions_that_no_run_made_are_not_removed_unasked(tmp_path: Path) -> None:
    (tmp_path / "teacher" / "v000001").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no run but a folder teacher"):
        check_folder(tmp_path, resume=False, overwrite=False)
    check_folder(tmp_path, resume=False, overwrite=True)
    (tmp_path / "run.json").write_text("{}")
    check_folder(tmp_path, resume=True, overwrite=False)


def test_a_record_that_cannot_be_read_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, length: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    write_record(tmp_path, {"status": "running"})
    assert read_record(tmp_path)["status"] == "running"
    with monkeypatch.context() as patch:
        patch.setattr("os.pread", refuse)
        with pytest.raises(StorageError, match=r"run\.json"):
            read_record(tmp_path)
        with pytest.raises(StorageError, match=r"run\.json"):
            checkpoint.load(tmp_path / "run.json")


def test_a_checkpoint_that_is_missing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KDCacheError, match=r"last\.pt .* is missing; bring it back, or start again"):
        checkpoint.load(tmp_path / "last.pt")
