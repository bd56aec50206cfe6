"""R3: a power cut at any moment loses no committed shard, and no bad one is taken for good."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from disk_calls import Disk
from disk_faults import KINDS, Fault
from disk_jobs import JOBS, REFUSED, Job, contents, end_locks, rows_of, start_afresh
from power_loss import Tape

from kdcache.errors import KDCacheError
from kdcache.stages import checkpoint
from kdcache.store import posix
from kdcache.store.dump import DumpFolder
from kdcache.store.shards import ContainerWriter
from kdcache.store.verify import verify

BROKEN = next(kind for kind in KINDS if kind.name == "EIO for good")
FINISHED = "finished"
NAMING = ("link", "replace", "unlink", "mkdir", "rmdir")
BY_JOB = pytest.mark.parametrize("job", [job for job in JOBS if job.name != "read"], ids=lambda job: job.name)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    start_afresh(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a recording notes them, and no power is cut for real
    yield
    end_locks()


class Case:
    """A job, what it leaves undisturbed, and recordings of it.

    A belief is what the job takes for granted from some moment on: a shard whose `commit` has returned, a checkpoint
    whose `save` has, the whole cache when the call has.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self._folder, self.gaps = job, folder, list[int]()
        self._beliefs: list[tuple[str, str]] = []
        self.begins_anew = job.name.startswith("overwrite")  # what to do after a cut, too
        self._template = folder / "template"
        self._template.mkdir()
        job.prepare(self._template)
        end_locks()
        self.old_rows = self._rows(self._template)
        tape = self.record()
        self.contents = contents(folder / "recorded")
        self.new_rows = self._rows(folder / "recorded")
        tape.whole(folder / "whole")
        assert contents(folder / "whole") == self.contents  # every change went through the recording
        shutil.rmtree(folder / "whole")
        self._kept = {
            name: data
            for name, data in contents(self._template).items()
            if name.endswith(".h5") and self.contents.get(name) == data
        }

    def record(self, fault: Fault | None = None) -> Tape:
        """Runs the job; with a fault as far as that, and then what a user does next."""
        root = self._folder / "recorded"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self._template, root)
        tape = Tape(root)
        try:
            calls = self._run(tape, root, self.job.run, fault)
            # Where a process can end between a change to a name and the fsync that makes it last.
            self.gaps = [n for n, (last, call) in enumerate(pairwise(calls), 2) if last in NAMING or call == "fsync"]
        except KDCacheError:
            assert fault is not None
        if fault is not None:
            tape.begun = tape.length
            if self.begins_anew:
                tape.marks.clear()
            self._run(tape, root, self.job.again)
        return tape

    def _run(self, tape: Tape, root: Path, call: Callable[[Path], Any], fault: Fault | None = None) -> list[str]:
        try:
            with believing(tape), Disk(root, fault or (lambda call: None), tape.record) as disk:
                result = call(root)
            if result != REFUSED:
                tape.mark((FINISHED, ""))
        finally:
            end_locks()
        assert disk.missed == []
        return disk.calls

    def cut_and_go_on(self, tape: Tape, rng: random.Random, *, cuts: int = 1) -> tuple[int, int]:
        """Power cuts at random moments, the later ones of the run that mends the damage; and all that must hold.

        Returns:
            What `Tape.cut` returns, of the first.
        """
        root = self._folder / "cut"
        fates = self._cut(tape, root, rng)
        for number in range(1, cuts):
            later, after = Tape(root), self._folder / f"cut-{number}"
            later.marks = [] if self.begins_anew else [(0, belief) for belief in self._beliefs]
            self._run(later, root, self.job.again)
            self._cut(later, after, rng)
            shutil.rmtree(root)
            root = after
        done: set[str] = set()
        with committing(done.add):
            self.job.again(root)
        end_locks()
        assert contents(root) == self.contents
        if not self.begins_anew:
            assert not done & {name for kind, name in self._beliefs if kind == "shard"}, "a committed shard was redone"
        shutil.rmtree(root)
        return fates

    def _cut(self, tape: Tape, root: Path, rng: random.Random) -> tuple[int, int]:
        at = rng.randint(tape.begun, tape.length)
        fates = tape.cut(at, root, rng)
        self._beliefs = [belief for number, belief in tape.marks if number <= at]
        self._check(root, self._beliefs)
        return fates

    def _check(self, root: Path, beliefs: list[tuple[str, str]]) -> None:
        rows = self._rows(root)
        if (FINISHED, "") in beliefs:
            assert rows == self.new_rows
            found = contents(root)
            assert {name: found.get(name) for name in self.contents} == self.contents
        assert rows in (None, self.new_rows, self.old_rows)
        assert rows is None or verify(root / self.job.out).ok
        for name, data in self._kept.items():
            assert (root / name).read_bytes() == data, f"{name} was not touched"
        for kind, name in beliefs:
            if kind == "shard" and (rows is None or rows != self.new_rows):
                assert list(root.rglob(f"shards/{name}")), f"{name} was committed"
            if kind == "checkpoint":
                self._check_checkpoint(root / self.job.out, int(name))

    def _check_checkpoint(self, run: Path, step: int) -> None:
        """The run goes on from this step or a later one."""
        if (run / checkpoint.RESUME_NAME).exists():
            assert checkpoint.load(run / checkpoint.RESUME_NAME)["step"] >= step
        else:
            assert b'"status": "done"' in (run / "run.json").read_bytes()

    def _rows(self, root: Path) -> bytes | None:
        return rows_of(root / self.job.out) if self.job.is_cache else None


@contextlib.contextmanager
def committing(note: Callable[[str], None]) -> Iterator[None]:
    """Calls `note` with the name of each shard whose `commit` returns.

    Not the short last one of a `Writer`, which does it again when it goes on: more rows may follow.
    """

    def commit(self: DumpFolder, writer: Any, record: Any, index: int) -> None:
        real(self, writer, record, index)
        if self.plan.samples is not None or record.rows == self.plan.shard_rows:
            note(record.file)

    real = DumpFolder.commit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DumpFolder, "commit", commit)
        yield


@contextlib.contextmanager
def believing(tape: Tape) -> Iterator[None]:
    """Notes what a job believes to be on the disk."""

    def save(path: Path, content: Any) -> None:
        real(path, content)
        if path.name == checkpoint.RESUME_NAME:
            tape.mark(("checkpoint", str(content["step"])))

    real = checkpoint.save
    with pytest.MonkeyPatch.context() as patch, committing(lambda name: tape.mark(("shard", name))):
        patch.setattr(checkpoint, "save", save)
        yield


@BY_JOB
def test_a_power_cut_loses_nothing_that_was_committed(
    job: Job, tmp_path: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    case, rng = Case(job, tmp_path), random.Random(job.name)
    kept = lost = cuts = 0
    tape = case.record()
    for _ in range(count(4, 200)):
        found = case.cut_and_go_on(tape, rng)
        kept, lost, cuts = kept + found[0], lost + found[1], cuts + 1
    assert cuts >= count(4, 200)
    assert (kept and lost) or cuts < 100
    proved("R3", power_cuts=cuts, changes_lost=lost, changes_kept=kept)


@BY_JOB
def test_a_power_cut_after_a_failure_loses_nothing_either(
    job: Job, tmp_path: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """The run that goes on finds files whose process ended between giving them a name and the fsync of the folder."""
    case, rng = Case(job, tmp_path), random.Random(job.name)
    chosen = rng.sample(case.gaps, min(len(case.gaps), count(1, len(case.gaps))))
    assert chosen
    for number in chosen:
        tape = case.record(Fault(BROKEN, number))  # to the disk no different from a kill
        for _ in range(count(1, 3)):
            case.cut_and_go_on(tape, rng)
    proved("R3", power_cuts=len(chosen) * count(1, 3), failures=len(chosen))


@BY_JOB
def test_power_cuts_one_after_another_lose_nothing_either(
    job: Job, tmp_path: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    case, rng = Case(job, tmp_path), random.Random(job.name)
    tape = case.record()
    repeats = count(1, 20)
    for _ in range(repeats):
        case.cut_and_go_on(tape, rng, cuts=3)
    proved("R3", power_cuts=3 * repeats)


@pytest.mark.parametrize(
    ("target", "name", "without"),
    [
        (posix, "fsync", lambda fd: None),
        (posix, "fsync_folder", lambda folder: None),
        (ContainerWriter, "_sync", lambda self: None),
    ],
    ids=["fsync", "fsync of folders", "fsync of shards"],
)
@pytest.mark.parametrize(
    "job", [job for job in JOBS if job.name in ("writer", "writer-file")], ids=lambda job: job.name
)
def test_a_missing_fsync_is_noticed(
    job: Job, target: Any, name: str, without: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, rng = Case(job, tmp_path), random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, without)
        tape = case.record()

    def cut_often() -> None:
        for _ in range(300):
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            case.cut_and_go_on(tape, rng)

    with pytest.raises((AssertionError, KDCacheError)):
        cut_often()
