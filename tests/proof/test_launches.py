"""R5: several launches on one path share the work and never collide; a launch with another plan is refused at once."""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.errors import MismatchError


@pytest.fixture
def finished(dumps: Any, tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """What one launch alone leaves, as a folder and as one file."""
    from precompute_runs import contents

    for suffix in ("", ".h5"):
        dumps.here(tmp_path / "alone" / f"teacher{suffix}")
    return {suffix: contents(tmp_path / "alone" / f"teacher{suffix}") for suffix in ("", ".h5")}


@pytest.mark.parametrize("launches", [2, 4])
def test_launches_of_one_plan_compute_each_shard_once_and_write_one_manifest(
    dumps: Any,
    finished: dict[str, dict[str, bytes]],
    tmp_path: Path,
    launches: int,
    count: Callable[[int, int], int],
    proved: Callable[..., None],
) -> None:
    from launch_runs import share

    rounds = count(2, 25)
    for attempt in range(10):  # on a busy machine one launch may do all of two rounds before the others have begun
        tally = share(dumps, tmp_path / f"shared{attempt}", finished, launches=launches, rounds=rounds)
        if tally["shared"]:
            break
    assert tally["rounds"] == rounds
    assert tally["shared"] > 0
    assert tally["kills"] == rounds // 2
    proved("R5", launches_at_once=launches, **tally)


@pytest.mark.long
@pytest.mark.parametrize(
    "parts",
    [([], []), (["--shard", "0/2"], ["--shard", "1/2"]), (["--shard", "0/3"], ["--shard", "1/3"], ["--workers", "1"])],
    ids=["same", "halves", "parts_and_all"],
)
@pytest.mark.parametrize(("kill", "suffix"), [(None, ""), ("0", ".h5")], ids=["none_killed", "one_killed"])
def test_launches_of_the_command_share_the_shards_too(
    dumps: Any,
    finished: dict[str, dict[str, bytes]],
    tmp_path: Path,
    parts: tuple[list[str], ...],
    kill: str | None,
    suffix: str,
    proved: Callable[..., None],
) -> None:
    from launch_runs import check, run_commands

    out = tmp_path / "shared" / f"teacher{suffix}"
    out.parent.mkdir()
    lines = {str(n): [*dumps.arguments(out), *part] for n, part in enumerate(parts)}
    killed = run_commands(out, lines, kill=kill, item_seconds=0.005)
    if killed:
        run_commands(out, {"again": dumps.arguments(out)}, item_seconds=0)
    check(out, finished, killed=killed)
    proved("R5", launches_of_the_command=len(parts), kills=len(killed))


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["", ".h5"])
def test_launches_by_torchrun_share_the_shards_too(
    dumps: Any, finished: dict[str, dict[str, bytes]], tmp_path: Path, suffix: str, proved: Callable[..., None]
) -> None:
    from launch_runs import TORCHRUN, check, run_commands

    out = tmp_path / "shared" / f"teacher{suffix}"
    out.parent.mkdir()
    lines = {name: [*TORCHRUN, *dumps.arguments(out)] for name in ("first", "second")}
    run_commands(out, lines, item_seconds=0.02)
    assert check(out, finished, killed=set()) > 1
    proved("R5", launches_by_torchrun=2, of_ranks=2)


OPTIONS = [
    ({"dtype": "float32"}, "encoding.dtype"),
    ({"shard_rows": 50}, "shard_rows"),
    ({"batch_size": 14}, "provenance.precision.batch_size"),
    ({"threads": 2}, "provenance.precision.threads"),
    ({"amp": "bf16"}, "provenance.precision.amp"),
    ({"limit": 100}, "provenance.data.dumped"),
    ({"teacher_saw": "yes"}, "provenance.teacher_seen"),
    ({"licence": "none"}, "provenance.licence"),
    ({"output_key": "logits"}, "provenance.output_key"),
    ({"teacher": "precompute_task:other_teacher"}, "provenance.teacher.spec"),
    ({"weights": Path("other.safetensors")}, "provenance.teacher.weights"),
]
"""What a command says itself: known before torch is imported."""
DATA = [({"data": "precompute_task:Other"}, "provenance.data.factory")]


def refusal(field: str, pid: int | None) -> str:
    return rf"{re.escape(field)} is .* there and .* in this command.*process {pid} is at work on it"


@pytest.mark.parametrize("batches", [0, 7], ids=["nothing_stored", "shards_stored"])
@pytest.mark.parametrize("name", ["teacher", "teacher.h5"])
def test_another_plan_is_refused_by_field_and_process_within_a_second_and_without_its_teacher(
    dumps: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    batches: int,
    count: Callable[[int, int], int],
    proved: Callable[..., None],
) -> None:
    """The second counts from the call, the data set is loaded in it; the best of three where the machine is busy."""
    import precompute_task
    from launch_runs import at_work

    def loads_no_teacher() -> None:
        raise AssertionError("the teacher was loaded")

    out, slowest, refused = tmp_path / name, 0.0, 0
    with at_work(dumps, out, batches=batches) as holder, monkeypatch.context() as patch:
        patch.setattr(precompute_task, "teacher", loads_no_teacher)
        patch.setattr(precompute_task, "other_teacher", loads_no_teacher)
        for changes, field in (OPTIONS + DATA) * count(1, 4):
            seconds: list[float] = []
            while len(seconds) < 3 and min(seconds, default=1) >= 1:
                begun = time.perf_counter()
                with pytest.raises(MismatchError, match=refusal(field, holder.pid)) as raised:
                    dumps.here(out, **changes)
                seconds.append(time.perf_counter() - begun)
            assert raised.value.exit_code == 5
            slowest, refused = max(slowest, min(seconds)), refused + 1
    assert slowest < 1
    assert dumps.here(out).finished
    proved("R5", other_plans_refused=refused, ms_at_most=round(1000 * slowest, 1))


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"dtype": "float32"}, "encoding.dtype"), ({"batch_size": 14}, "provenance.precision.batch_size")],
)
def test_the_command_is_refused_within_a_second_of_its_start_for_it_imports_no_torch(
    dumps: Any, tmp_path: Path, changes: dict[str, Any], field: str, proved: Callable[..., None]
) -> None:
    """What its options say of the plan. Counted is the time of processors: a machine that is busy stretches the other
    by as much as it likes, and `seconds` of a call, above, show that nothing waits."""
    from launch_runs import at_work
    from precompute_runs import HERE

    out = tmp_path / "teacher.h5"
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(tmp_path), HERE, *sys.path])
    seconds: list[float] = []
    with at_work(dumps, out, batches=0) as holder:
        while len(seconds) < 3 and min(seconds, default=1) >= 1:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(
                [sys.executable, *dumps.arguments(out, **changes)],
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=120,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert done.returncode == 5, done.stderr
            assert re.search(refusal(field, holder.pid), " ".join(done.stderr.split()))
    assert min(seconds) < 1
    proved("R5", commands_refused=1, processor_ms_from_start=round(1000 * min(seconds)))


@pytest.mark.parametrize(
    ("classes", "field"), [(7, "provenance.teacher.state_sha256"), (8, "classes.count")], ids=["weights", "classes"]
)
def test_what_only_the_loaded_teacher_shows_is_refused_when_it_is_loaded(
    dumps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, field: str
) -> None:
    import precompute_task
    from launch_runs import at_work

    with at_work(dumps, tmp_path / "teacher", batches=0) as holder:
        monkeypatch.setattr(precompute_task, "teacher", lambda: precompute_task.network(5, classes=classes))
        with pytest.raises(MismatchError, match=refusal(field, holder.pid)):
            dumps.here(tmp_path / "teacher")


def test_of_two_plans_that_start_at_once_one_is_dumped_and_the_other_refused(
    dumps: Any,
    finished: dict[str, dict[str, bytes]],
    tmp_path: Path,
    count: Callable[[int, int], int],
    proved: Callable[..., None],
) -> None:
    from dump_history import read_events
    from launch_runs import start_both
    from precompute_runs import contents

    dumps.here(tmp_path / "alone" / "other", dtype="float32")
    expected = [finished[""], contents(tmp_path / "alone" / "other")]
    rounds, rng = count(1, 12), random.Random(5)
    for number in range(rounds):
        out = tmp_path / str(number) / "teacher"
        out.parent.mkdir()
        codes = start_both(dumps, out, [{}, {"dtype": "float32"}], rng)
        winner = codes.index({0})
        assert codes[1 - winner] == {5}
        assert contents(out) == expected[winner]
        assert {e.who for e in read_events(out.with_name("trace")) if e.what == "computed"} == {f"{winner}:0"}
    proved("R5", pairs_of_plans_at_once=rounds, launches_refused=2 * rounds)
