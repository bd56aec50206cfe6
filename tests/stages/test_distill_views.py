"""Runs on views: which views an epoch sees, bit for bit, however the run is computed, interrupted and shared."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdcache
from kdcache.errors import DataError, InterruptedRunError, MismatchError, UsageError
from kdcache.format.view_seed import view_seed
from kdcache.stages.distill import RunResult, distill
from kdcache.stages.distill_options import DistillOptions, resolve
from kdcache.stages.optim import Schedule
from kdcache.stages.order import Order
from kdcache.train.losses import kd_loss
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.pipelines import named
from kdcache.train.replay import Replay
from kdcache.train.viewed import ViewedItems

HERE = Path(__file__).parent
ROWS, STEPS_PER_EPOCH = 37, 4


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the data set; one thread, as in child processes."""
    for folder in (HERE, HERE.parent / "train"):
        monkeypatch.syspath_prepend(str(folder))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    import views_task

    yield views_task
    torch.set_num_threads(before)


@pytest.fixture
def make_cache(tmp_path: Path, task: Any) -> Callable[..., str]:
    """Dumps views of the pictures; returns the cache's path."""
    from view_caches import write_views

    def make(augment: Replay | None, views: tuple[int, ...] = (0, 1, 2), **options: Any) -> str:
        path = tmp_path / f"teacher{len(list(tmp_path.glob('teacher*')))}"
        write_views(path, task.Pictures(), augment, views, shard_rows=20, **options).close()
        return str(path)

    return make


OPTIONS = DistillOptions(
    student="views_task:student",
    data="views_task:Pictures",
    epochs=4,
    batch_size=10,
    device="cpu",
    quiet=True,
    seed=11,
    check="full",
)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in module.state_dict().values()])


def by_hand(task: Any, replay: Replay | None, view_of: Callable[[int, int], int], *, alpha: float) -> Tensor:
    """The weights after the same run as a plain loop; `view_of` takes epoch and sample."""
    from view_caches import logits_of

    torch.manual_seed(5)
    student = task.student()
    items = ViewedItems(task.Pictures(), np.arange(ROWS), replay)
    order = Order(np.arange(ROWS), 10, OPTIONS.seed)
    schedule = Schedule("cosine", 0.1, 4 * STEPS_PER_EPOCH, 0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    torch.manual_seed(OPTIONS.seed)
    for step in range(4 * STEPS_PER_EPOCH):
        rows = order.rows(step).tolist()
        viewed = items.load(rows, [view_of(order.epoch(step), row) for row in rows])
        x = torch.stack([one.item[0] for one in viewed])
        labels: Any = torch.tensor([one.item[1] for one in viewed])
        if items.is_mixed:
            second = torch.tensor([one.label_b for one in viewed])
            labels = MixedLabels(labels, second, torch.tensor([one.mix_ratio for one in viewed]))
        teacher = torch.from_numpy(np.stack([logits_of(value) for value in x]))
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.zero_grad()
        logits = student(x)
        kd_loss(logits, teacher if alpha else None, labels, alpha=alpha, temperature=4.0).backward()
        optimizer.step()
    return weights(student)


def run(task: Any, options: DistillOptions, **given: Any) -> Tensor:
    torch.manual_seed(5)
    return weights(distill(options, student=task.student(), **given).student)


@pytest.mark.parametrize("text", ["shift,noise", "shift,mixup1", "cutmix"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_epoch_e_learns_from_view_e_mod_k_of_the_cache(task: Any, make_cache: Any, text: str, alpha: float) -> None:
    cache = make_cache(named(text, seed=6), (0, 2, 5))
    expected = by_hand(task, named(text, seed=6), lambda epoch, _: (0, 2, 5)[epoch % 3], alpha=alpha)
    assert torch.equal(run(task, replace(OPTIONS, cache=cache, alpha=alpha)), expected)


@pytest.mark.parametrize("text", ["shift,noise", "shift,mixup1"])
@pytest.mark.parametrize(
    ("views", "view_of"), [(None, lambda epoch, _: epoch), (3, lambda epoch, _: epoch % 3), (1, lambda *_: 0)]
)
def test_labels_alone_learn_from_fresh_views_or_k_of_them(task: Any, text: str, views: Any, view_of: Any) -> None:
    options = replace(OPTIONS, alpha=0.0, augment=text, views=views, view_seed=6)
    expected = by_hand(task, named(text, seed=6), view_of, alpha=0.0)
    assert torch.equal(run(task, options), expected)


def test_labels_alone_see_the_views_that_a_cache_of_that_seed_has(task: Any, make_cache: Any) -> None:
    cache = make_cache(named("shift,cutmix", seed=6))
    beside = run(task, replace(OPTIONS, cache=cache, alpha=0.0))
    alone = run(task, replace(OPTIONS, augment="shift,cutmix", views=3, view_seed=6, alpha=0.0))
    assert torch.equal(beside, alone)


@pytest.mark.parametrize("views", [(0, 2, 5), None])
def test_a_random_order_is_a_function_of_seed_epoch_and_sample(task: Any, make_cache: Any, views: Any) -> None:
    def view_of(epoch: int, sample: int) -> int:
        word = int.from_bytes(view_seed(OPTIONS.seed, sample, epoch, purpose="choice")[:8], "little")
        return word >> 32 if views is None else views[word * 3 >> 64]

    alpha = 0.0 if views is None else 0.9
    options = replace(OPTIONS, view_order="random", alpha=alpha)
    options = (
        replace(options, augment="noise")
        if views is None
        else replace(options, cache=make_cache(named("noise"), views))
    )
    expected = by_hand(task, named("noise"), view_of, alpha=alpha)
    assert torch.equal(run(task, options), expected)
    assert torch.equal(run(task, replace(options, workers=2)), expected)


def test_fewer_views_than_the_cache_has_can_be_taken(task: Any, make_cache: Any) -> None:
    cache = make_cache(named("shift"))
    expected = by_hand(task, named("shift"), lambda epoch, _: epoch % 2, alpha=0.9)
    assert torch.equal(run(task, replace(OPTIONS, cache=cache, views=2)), expected)


def test_a_transform_of_ones_own_is_given_as_a_spec_or_an_object(task: Any, make_cache: Any) -> None:
    replay = kdcache.views.replayable(task.dim, seed=6)
    cache = make_cache(replay)
    expected = by_hand(task, replay, lambda epoch, _: epoch % 3, alpha=0.9)
    assert torch.equal(run(task, replace(OPTIONS, cache=cache, augment="views_task:dimming")), expected)
    for augment in (task.dim, replay):
        assert torch.equal(run(task, replace(OPTIONS, cache=cache), augment=augment), expected)
    with pytest.raises(UsageError, match="code of its maker"):
        run(task, replace(OPTIONS, cache=cache))


@pytest.mark.parametrize("text", ["shift,noise", "shift,mixup1"])
def test_workers_that_live_on_and_pieces_change_nothing(task: Any, make_cache: Any, text: str) -> None:
    options = replace(OPTIONS, cache=make_cache(named(text)))
    alone = run(task, options)
    assert torch.equal(run(task, replace(options, workers=2)), alone)
    plain = replace(options, student="views_task:plain_student")
    whole = weights(distill(plain).student)
    parts = weights(distill(replace(plain, grad_accumulation=3)).student)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_the_student_is_built_for_the_view_not_for_the_item(task: Any) -> None:
    def corner(image: Tensor) -> Tensor:
        return image[..., :6, :6]

    result = distill(replace(OPTIONS, student="mlp:36-8-5", alpha=0.0, epochs=1), augment=corner)
    assert result.steps == STEPS_PER_EPOCH


def test_validation_data_are_never_augmented(task: Any, make_cache: Any) -> None:
    options = replace(OPTIONS, val="views_task:HeldOut", cache=make_cache(named("noise5,cutmix")), epochs=1)
    result = distill(options)
    inputs, labels = task.Pictures().inputs, torch.tensor(task.Pictures().labels)
    with torch.no_grad():
        right = (result.student(inputs).argmax(1) == labels).float().mean().item()
    assert result.last["val_accuracy"] == pytest.approx(right)
    measured = distill(replace(options, val_cache=make_cache(None, (0,))))
    assert "agreement" in measured.last
    with pytest.raises(UsageError, match=r"the pipeline 'noise5,cutmix1' .* validation data are never augmented"):
        distill(replace(options, val_cache=options.cache))


def test_hard_targets_of_a_mixed_view_are_the_teachers_argmax(task: Any, make_cache: Any) -> None:
    mixed = replace(OPTIONS, cache=make_cache(named("mixup1")), hard_targets=True)
    unlabelled = replace(mixed, alpha=1.0)
    assert torch.equal(run(task, mixed), run(task, unlabelled))


def test_samples_that_the_cache_lacks_learn_the_labels_of_their_mixed_views(task: Any, make_cache: Any) -> None:
    cache = make_cache(named("mixup1"), (0, 1), samples=range(20))
    both = distill(replace(OPTIONS, cache=cache, missing="ce", epochs=1))
    assert both.steps == STEPS_PER_EPOCH
    assert distill(replace(OPTIONS, cache=cache, missing="skip", epochs=1)).steps == 2


def test_the_record_says_which_views_were_seen(make_cache: Any, tmp_path: Path, capsys: Any) -> None:
    options = replace(OPTIONS, cache=make_cache(named("shift,mixup", seed=6)), views=2, out=str(tmp_path / "run"))
    distill(replace(options, quiet=False, epochs=1))
    expected = {
        "augment": "shift2,mixup0.2",
        "named": True,
        "seed": 6,
        "mix": "mixup0.2",
        "views": [0, 1],
        "order": "epoch",
    }
    found = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["views"]
    assert {key: value for key, value in found.items() if key != "versions"} == expected
    assert found["versions"]["torch"] == torch.__version__
    assert (
        "inputs in views of shift2,mixup0.2 (seed 6): 2 view(s) of the 3 in teacher0, epoch order"
        in capsys.readouterr().err
    )


def stop_at(item: int, options: DistillOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILL_AT_ITEM", str(item))
    monkeypatch.setenv("KILL_PID", str(os.getpid()))
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT"):
        distill(options)
    monkeypatch.delenv("KILL_AT_ITEM")


def same_run(one: RunResult, other: RunResult) -> None:
    assert torch.equal(weights(one.student), weights(other.student))
    assert one.last == other.last


@pytest.mark.parametrize(
    ("changes", "workers"),
    [
        ({"augment": "shift,mixup1", "alpha": 0.0}, 0),
        ({"augment": "noise", "alpha": 0.0, "view_order": "random"}, 0),
        ({"cached": "shift,cutmix"}, 0),
        ({"cached": "shift,noise", "view_order": "random"}, 0),
        ({"cached": "shift,mixup1"}, 2),
    ],
)
def test_a_run_stopped_within_an_epoch_goes_on_with_the_same_views(
    make_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, workers: int
) -> None:
    text = changes.pop("cached", None)
    cache = None if text is None else make_cache(named(text))
    options = replace(OPTIONS, cache=cache, workers=workers, out=str(tmp_path / "run"), **changes)
    expected = distill(replace(options, out=str(tmp_path / "uninterrupted")))
    stop_at(60, options, monkeypatch)
    stopped = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["step"]
    assert stopped % STEPS_PER_EPOCH
    same_run(distill(replace(options, resume=True)), expected)


def test_a_run_is_not_resumed_with_other_views(
    make_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, augment="shift", alpha=0.0, out=str(tmp_path / "run"))
    stop_at(30, options, monkeypatch)
    changes = [{"augment": "noise"}, {"augment": None}, {"views": 3}, {"view_order": "random"}, {"view_seed": 1}]
    for change in changes:
        with pytest.raises(MismatchError, match=rf"has (views of the data|{next(iter(change))}) = "):
            distill(replace(options, resume=True, **change))
    with pytest.raises(MismatchError, match=r"views of the data = .*'seed': 4"):
        distill(replace(options, resume=True), augment=named("shift", seed=4))
    distill(replace(options, resume=True))


def test_two_processes_give_the_losses_of_one(make_cache: Any, tmp_path: Path) -> None:
    options = replace(
        OPTIONS,
        student="views_task:plain_student",
        cache=make_cache(named("shift,mixup1")),
        val="views_task:HeldOut",
        workers=1,
        epochs=2,
        log_steps=1,
        out=str(tmp_path / "shared"),
    )
    changed = {
        field.name: value
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) != field.default
    }
    path = os.pathsep.join([str(HERE), *sys.path])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "distill_task.py"), json.dumps(changed)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    distill(replace(options, out=str(tmp_path / "alone"), workers=0))
    shared, alone = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("shared", "alone")
    )
    assert len(shared) == len(alone) == 2 * STEPS_PER_EPOCH + 2
    for mine, theirs in zip(shared, alone, strict=True):
        assert mine.pop("event") == theirs.pop("event")
        mine.pop("rows_per_second", None), theirs.pop("rows_per_second", None)
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"view_seed": 1, "cache": "x"}, UsageError, "--view-seed is for runs without a cache"),
        ({"view_seed": 1}, UsageError, "--view-seed without --augment"),
        ({"view_seed": -1, "augment": "shift"}, UsageError, "--view-seed must be at least 0"),
        ({"views": 0}, UsageError, "--views must be 1 to 65536, found 0"),
        ({"view_order": "sorted"}, UsageError, "choose one of epoch, random"),
    ],
)
def test_view_options_that_cannot_be_meant_are_refused_before_anything_is_loaded(
    changes: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve(replace(OPTIONS, **changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"views": 2}, UsageError, "--views without a cache needs a pipeline"),
        ({"augment": "blur"}, UsageError, "no part is called 'blur'"),
        ({"augment": "views_task:blurring"}, UsageError, "has no 'blurring'"),
        ({"augment": "views_task:number"}, UsageError, "returned an int; expected a transform"),
        ({"augment": "views_task:Counting"}, DataError, r"the transform .*Counting.* is not replayed"),
        ({"augment": "noise0.1", "data": "views_task:number"}, UsageError, "expected a data set"),
    ],
)
def test_views_that_cannot_be_had_are_refused_before_the_first_step(changes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        distill(replace(OPTIONS, alpha=0.0, **changes))


def test_views_that_make_no_batches_are_refused_before_the_first_step(task: Any) -> None:
    def cut(image: Tensor) -> Tensor:
        return image[..., : int(torch.randint(2, 8, ()))]

    with pytest.raises(DataError, match="need one dtype and shape"):
        distill(replace(OPTIONS, alpha=0.0), augment=cut)


def test_a_cache_refuses_what_it_was_not_dumped_with(task: Any, make_cache: Any) -> None:
    cache = make_cache(named("shift", seed=6))
    with pytest.raises(MismatchError, match="4 views are asked for and teacher0 holds 3"):
        distill(replace(OPTIONS, cache=cache, views=4))
    with pytest.raises(MismatchError, match="augment= is 'shift3' with seed 6"):
        distill(replace(OPTIONS, cache=cache, augment="shift3"))
    with pytest.raises(UsageError, match="--view-seed is for runs without a cache"):
        distill(replace(OPTIONS, view_seed=3, augment="shift"), cache=cache)
    with pytest.raises(MismatchError, match="dumped from the items as they are"):
        distill(replace(OPTIONS, cache=make_cache(None, (0,)), augment="shift"))


def test_a_cache_without_view_0_serves(task: Any, make_cache: Any) -> None:
    expected = by_hand(task, named("shift"), lambda *_: 3, alpha=0.9)
    assert torch.equal(run(task, replace(OPTIONS, cache=make_cache(named("shift"), (3,)))), expected)
