"""A run whose teacher changes: at an epoch's beginning, bit for bit the same after a kill, and never silently."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import kdcache
from kdcache.errors import KDCacheError, MismatchError, UsageError
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.moving_teacher import Ema, MovingTeacher
from kdcache.store.version_folder import listed_versions


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the child processes; one thread, as there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    import refresh_task

    yield refresh_task
    torch.set_num_threads(before)


def start(target: Any, *arguments: Any, **named: Any) -> Any:
    from precompute_runs import FORKS

    process = FORKS.Process(target=target, args=arguments, kwargs=named)
    process.start()
    return process


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def options() -> DistillOptions:
    return DistillOptions(
        epochs=4, batch_size=12, alpha=0.5, optimizer="adamw", device="cpu", quiet=True, seed=5, threads=1
    )


@given(st.floats(0, 0.999), st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=8))
def test_the_average_is_that_of_its_formula(decay: float, values: list[float]) -> None:
    net, average = nn.Linear(1, 1), Ema(decay)
    average.begin(net)
    expected = 0.0
    for step, value in enumerate(values, start=1):
        nn.init.constant_(net.weight, value)
        average.update(net)
        share = min(decay, 1 - 1 / step)
        expected = share * expected + (1 - share) * value
    assert float(average.module.weight) == pytest.approx(expected, abs=1e-5)
    assert net.weight.requires_grad
    assert not average.module.weight.requires_grad


def test_the_average_holds_buffers_and_is_a_module_of_its_own() -> None:
    net, average = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), Ema(0.5)
    average.begin(net)
    for seed in range(3):
        net(torch.randn(8, 2, generator=torch.Generator().manual_seed(seed)))
        average.update(net)
    assert int(average.module[1].num_batches_tracked) == 3
    assert not torch.equal(average.module[1].running_mean, net[1].running_mean)
    assert not average.module.training
    saved, other = average.state_dict(), Ema(0.5)
    other.begin(net)
    other.load_state_dict(saved)
    assert same(other.module, average.module)
    assert other.steps == 3
    third = Ema(0.5)
    third.begin(nn.Linear(2, 2))
    with pytest.raises(MismatchError, match="other tensors"):
        third.load_state_dict(saved)


def test_a_pruned_student_has_an_average_with_its_masks() -> None:
    net, average = nn.Linear(4, 4), Ema(0.5)
    prune.l1_unstructured(net, "weight", amount=0.5)
    net(torch.ones(1, 4)).sum().backward()
    average.begin(net)
    average.update(net)
    assert torch.equal(average.module(torch.eye(4)), net(torch.eye(4)))
    assert torch.equal(average.module.weight_mask, net.weight_mask)


def test_a_teacher_that_stays_the_same_changes_nothing(tmp_path: Path, task: Any, options: DistillOptions) -> None:
    """Every version is the same cache, so the run is that without a refresh, bit for bit."""
    teacher, data = task.network(9), task.Task()
    kdcache.precompute(teacher, data, tmp_path / "teacher", batch_size=16, threads=1, quiet=True)
    plain = kdcache.distill(options, student=task.network(1), data=data, cache=tmp_path / "teacher")
    moving = MovingTeacher(tmp_path / "versions", data, teacher=lambda student: teacher, batch_size=16)
    result = kdcache.distill(options, student=task.network(1), data=data, cache=tmp_path / "teacher", refresh=moving)
    assert same(plain.student, result.student)
    assert [version["epoch"] for version in result.record["refresh"]["versions"]] == [1, 2, 3]


def test_labels_teach_alone_until_the_first_version(tmp_path: Path, task: Any, options: DistillOptions) -> None:
    data = task.Task()
    labels = kdcache.distill(replace(options, alpha=0.0), student=task.network(1), data=data)
    late = MovingTeacher(tmp_path / "late", data, every=3, decay=0.9)
    assert not same(labels.student, kdcache.distill(options, student=task.network(1), data=data, refresh=late).student)
    assert [version.step for version in listed_versions(tmp_path / "late")] == [15]


def test_the_teacher_is_the_average_of_the_student_so_far(tmp_path: Path, task: Any, options: DistillOptions) -> None:
    data, student = task.Task(), task.network(1)
    moving = MovingTeacher(tmp_path / "versions", data, every=2, decay=0.0, dtype="float32")
    with pytest.raises(UsageError, match=r"comes after 2 epochs .* the run ends after 2 \(10 steps\)"):
        kdcache.distill(
            replace(options, epochs=None, steps=10), student=copy.deepcopy(student), data=data, refresh=moving
        )
    kdcache.distill(
        replace(options, epochs=None, steps=11, schedule="constant"),
        student=copy.deepcopy(student),
        data=data,
        refresh=moving,
    )
    half = kdcache.distill(
        replace(options, epochs=None, steps=10, schedule="constant", alpha=0.0), student=student, data=data
    )
    cache = kdcache.open(tmp_path / "versions" / "v000001")
    with torch.no_grad():
        expected = half.student(data.inputs).numpy()
    assert np.array_equal(cache.gather(np.arange(len(cache))).dense(), expected)
    assert cache.provenance["teacher_seen"] == "yes"


# 60 items an epoch and a dump: the first dump follows epoch 2, the second epoch 4.
@pytest.mark.parametrize(
    ("kill_at", "by"), [(150, signal.SIGKILL), (200, signal.SIGKILL), (330, signal.SIGKILL), (150, signal.SIGTERM)]
)
def test_a_run_that_is_killed_resumes_bit_for_bit(
    tmp_path: Path, task: Any, kill_at: int, by: signal.Signals, undisturbed: Any
) -> None:
    """While the first version is written, after the switch, and while the second is written."""
    process = start(task.killed_run, tmp_path, kill_at, by)
    process.join(60)
    assert process.exitcode == (75 if by == signal.SIGTERM else -signal.SIGKILL)
    result = task.run(tmp_path, resume=True)
    assert same(result.student, undisturbed.student)
    assert result.best == undisturbed.best
    assert result.record["refresh"] == undisturbed.record["refresh"]
    assert len(listed_versions(tmp_path / "teacher")) == 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sys.path.insert(0, str(Path(__file__).parent))
    import refresh_task

    sys.path.pop(0)
    torch.set_num_threads(1)
    return refresh_task.run(tmp_path_factory.mktemp("undisturbed"))


def test_a_run_goes_on_only_with_the_same_refresh(tmp_path: Path, task: Any) -> None:
    process = start(task.killed_run, tmp_path, 400, signal.SIGKILL)
    process.join(60)
    options = DistillOptions(out=str(tmp_path / "run"), resume=True, epochs=8, batch_size=12, alpha=0.5, quiet=True,
                             optimizer="adamw", device="cpu", seed=5, threads=1)  # fmt: skip
    data = task.Task()
    other = MovingTeacher(tmp_path / "teacher", data, every=3, decay=0.8)
    with pytest.raises(MismatchError, match="refresh every = 2"):
        kdcache.distill(options, student=task.network(1), data=data, val=data, refresh=other)
    with pytest.raises(UsageError, match="needs the teacher's logits"):
        kdcache.distill(options, student=task.network(1), data=data, val=data)


def test_two_students_teach_each_other_and_either_may_be_killed(tmp_path: Path, task: Any) -> None:
    for folder, kill_at in ((tmp_path / "undisturbed", 0), (tmp_path / "killed", 200)):
        first = start(task.peer, folder, "a", "b", 1, kill_at)
        second = start(task.peer, folder, "b", "a", 2)
        first.join(60)
        if kill_at:
            assert first.exitcode == -signal.SIGKILL
            first = start(task.peer, folder, "a", "b", 1, resume=True)
            first.join(60)
        second.join(60)
        assert (first.exitcode, second.exitcode) == (0, 0)
    for mine, other in (("a", "b"), ("b", "a")):
        last = [
            torch.load(tmp_path / kind / f"run-{mine}" / "last.pt", weights_only=True)
            for kind in ("undisturbed", "killed")
        ]
        assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
        versions = kdcache_record(tmp_path / "killed" / f"run-{mine}")["refresh"]["versions"]
        roots = [version.root for version in listed_versions(tmp_path / "killed" / other)]
        assert [version["root"] for version in versions] == roots
        assert [version["step"] for version in versions] == [10, 20]


def kdcache_record(folder: Path) -> dict[str, Any]:
    from kdcache.stages.run_record import read_record

    return read_record(folder)


@pytest.mark.long
def test_two_ranks_share_the_versions_and_resume_bit_for_bit(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    last = []
    for folder, launches in (("undisturbed", ("0",)), ("killed", ("110", "0"))):
        for kill_at in launches:
            arguments = [*command, str(here / "refresh_task.py"), str(tmp_path / folder), kill_at]
            done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
            assert (done.returncode == 0) == (kill_at == "0"), done.stderr
        last.append(torch.load(tmp_path / folder / "run" / "last.pt", weights_only=True))
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    assert len(listed_versions(tmp_path / "killed" / "teacher")) == 2


def test_a_student_whose_peer_never_comes_says_so(tmp_path: Path, task: Any, options: DistillOptions) -> None:
    from kdcache.stages.peer import Peer

    data = task.Task()
    alone = Peer(tmp_path / "a", tmp_path / "b", data, wait_seconds=0.2)
    with pytest.raises(KDCacheError, match=r"wrote no version for step 5 in b within 0.2 s"):
        kdcache.distill(options, student=task.network(1), data=data, refresh=alone)


def test_what_cannot_be_meant_is_refused_before_the_first_step(
    tmp_path: Path, task: Any, options: DistillOptions
) -> None:
    data, out = task.Task(), tmp_path / "versions"
    kdcache.precompute(task.network(9), data, tmp_path / "teacher", quiet=True)

    def refused(match: str, moving: MovingTeacher, **changed: Any) -> None:
        objects = {name: changed.pop(name) for name in ("cache", "augment") if name in changed}
        with pytest.raises(UsageError, match=match):
            kdcache.distill(replace(options, **changed), student=task.network(1), data=data, refresh=moving, **objects)

    average = MovingTeacher(out, data, decay=0.9)
    refused("teaches nothing with --alpha 0", average, alpha=0.0)
    refused(
        r"the first version of the refreshed teacher comes after 4 epochs", MovingTeacher(out, data, every=4, decay=0)
    )
    average.every = 0
    refused(r"every n epochs \(every=\), n at least 1; found 0", average)
    average.every = 1
    kdcache.precompute(task.network(8), data, tmp_path / "other", quiet=True)
    refused("2 caches are given", average, cache=[tmp_path / "teacher", tmp_path / "other"])
    refused("--classes maps the classes of one teacher", average, cache=tmp_path / "teacher", classes="names")
    refused("--hard-targets needs the teacher", average, hard_targets=True, alpha=0.5)
    refused("leave one of them out", average, refresh_every=2, out=str(tmp_path / "run"))
    for wrong, match in (
        ({}, "average of its student"),
        ({"every": 0}, r"\(every=\), n at least 1; found 0"),
        ({"decay": 0.9, "teacher": nn.Identity}, "average of its student"),
        ({"decay": 1.0}, "below 1, found 1.0"),
        ({"decay": 0.9, "keep": 1}, "keep must be at least 2"),
    ):
        with pytest.raises(UsageError, match=match):
            MovingTeacher(out, data, **wrong)
    assert not out.exists()


def test_a_version_of_other_classes_or_fewer_samples_ends_the_run(
    tmp_path: Path, task: Any, options: DistillOptions
) -> None:
    data = task.Task()
    wide = MovingTeacher(tmp_path / "wide", data, teacher=lambda student: nn.Linear(task.WIDTH, 5))
    with pytest.raises(MismatchError, match="5 classes, the student 4"):
        kdcache.distill(options, student=task.network(1), data=data, refresh=wide)
    few = MovingTeacher(tmp_path / "few", data, decay=0.9, limit=50)
    with pytest.raises(MismatchError, match="does not hold 10 of the 60"):
        kdcache.distill(options, student=task.network(1), data=data, refresh=few)
    kdcache.distill(replace(options, missing="ce"), student=task.network(1), data=data, refresh=few)
