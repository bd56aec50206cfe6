"""A row that is not the item's is refused before it is handed out, and no other: seeded faults of a student's data."""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import alignment
import numpy as np
import pytest
import torch
from alignment import FAULTS, PIPELINES, SAMPLES, VIEW_FAULTS, Recipe, Samples, Student, Truth, recipe
from torch import nn
from torch.utils.data import DataLoader, Subset, default_collate

import kdcache
from kdcache.errors import CorruptCacheError, DataError, MismatchError
from kdcache.stages.verify_teacher import verify_teacher
from kdcache.train.checks import FIRST_ITEMS, detection_probability, in_sample
from kdcache.train.with_ids import SampleIds

ORDERS = ["sorted", "shuffled"]
Truths = Callable[..., Truth]
Count = Callable[[int, int], int]
Proved = Callable[..., None]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Truths:
    """`truths(order, kind, has_names)`: a cache and what its rows mean, made once."""
    made: dict[tuple[str, str, bool], Truth] = {}

    def get(order: str, kind: str, has_names: bool) -> Truth:
        key = order, kind, has_names
        if key not in made:
            folder = tmp_path_factory.mktemp("alignment") / "teacher"
            made[key] = alignment.make_truth(folder, order, kind, has_names=has_names)
        return made[key]

    return get


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def batches_of(size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    order, batch_size = rng.permutation(size).tolist(), int(rng.integers(1, 65))
    for start in range(0, size, batch_size):
        yield order[start : start + batch_size]


def clean_student(truth: Truth) -> Student:
    return Student(truth.data.images, truth.data.labels, np.arange(SAMPLES))


def serve(truth: Truth, joined: Any, data: Samples, rng: np.random.Generator) -> Iterator[tuple[int, list[int], bool]]:
    """(view, indices, whether it was refused) of each batch of each epoch; one that is handed out is right."""
    for view in truth.views:
        joined.set_epoch(view)
        for indices in batches_of(len(data), rng):
            try:
                batch = default_collate(joined.__getitems__(indices))
            except MismatchError:
                yield view, indices, True
                continue
            assert truth.wrong_rows(batch, [data.id_at(n) for n in indices]) == 0
            assert set(batch[-1].view.tolist()) == {view}
            yield view, indices, False


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_exactly_the_batches_with_a_wrong_row_are_refused(
    fault: str, order: str, truths: Truths, count: Count, proved: Proved
) -> None:
    trials, wrong_rows, refused_batches = count(3, 100), 0, 0
    for trial in range(trials):
        rng = generator(fault, order, trial)
        kind = "recipe" if fault in VIEW_FAULTS else list(PIPELINES)[trial % 3]
        truth = truths(order, kind, trial % 2 == 1)
        student = FAULTS[fault](clean_student(truth), rng)
        data = student.data(has_names=trial % 2 == 1)
        changed = None if student.recipe is None else recipe(student.recipe)
        wrong = truth.wrong_items(data, changed)
        assert wrong, f"trial {trial} is no fault"
        joined = truth.join(data, changed, check="full")
        for view, indices, is_refused in serve(truth, joined, data, rng):
            assert is_refused == any((n, view) in wrong for n in indices), f"trial {trial}"
            refused_batches += is_refused
        wrong_rows += len(wrong)
    proved("A1", trials=trials, wrong_rows=wrong_rows, refused_batches=refused_batches, escaped=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", ["rank_indexed", "step_indexed"])
def test_a_loader_that_counts_its_own_batches_is_refused(
    fault: str, order: str, truths: Truths, count: Count, proved: Proved
) -> None:
    truth = truths(order, "plain", False)
    for trial in range(count(3, 100)):
        rng = generator("loader", fault, order, trial)
        student = FAULTS[fault](clean_student(truth), rng)
        data = student.data(has_names=False)
        size = int(rng.integers(1, 65))
        for start in range(0, len(data), size):
            ids = np.arange(start, min(start + size, len(data)))
            batch = [data.images[ids], data.labels[ids], SampleIds(ids)]
            if any(truth.is_wrong(data.images[n], int(data.labels[n]), int(n), 0) for n in ids):
                with pytest.raises(MismatchError):
                    next(iter(kdcache.attach([batch], truth.cache, check="full")))
            else:
                handed = next(iter(kdcache.attach([batch], truth.cache, check="full")))
                assert truth.wrong_rows(handed, ids.tolist()) == 0
    proved("A1", loaders=count(3, 100))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", ["removed", "reshuffled", "reshuffled_inside_classes", "subset_by_its_own_index"])
def test_items_that_take_their_ids_along_raise_no_alarm(
    fault: str, order: str, truths: Truths, count: Count, proved: Proved
) -> None:
    for trial in range(count(3, 100)):
        rng = generator("travel", fault, order, trial)
        truth = truths(order, list(PIPELINES)[trial % 3], True)
        data = FAULTS[fault](clean_student(truth), rng).data(has_names=True, names_travel=True)
        assert not any(refused for *_, refused in serve(truth, truth.join(data, check="full"), data, rng))
    proved("A1", moved_with_their_ids=count(3, 100))


def test_clean_runs_raise_no_false_alarm(truths: Truths, count: Count, proved: Proved) -> None:
    rows = 0
    for run in range(count(10, 200)):
        rng = generator("clean", run)
        truth = truths(ORDERS[run % 2], list(PIPELINES)[run % 3], bool(rng.integers(2)))
        settings: dict[str, Any] = {"check": ["full", "sample"][int(rng.integers(2))]}
        if truth.kind != "plain":
            settings |= [{"view": 1}, {"views": 1}, {"view_order": "random"}, {"view_order": "epoch"}][rng.integers(4)]
        data: Any = truth.data
        indices = list(range(SAMPLES))
        if rng.random() < 0.3:  # a real Subset says whose its items are
            indices = rng.permutation(SAMPLES)[: SAMPLES // 2].tolist()
            data = Subset(truth.data, indices)
        joined = truth.join(data, **settings)
        for epoch in range(int(rng.integers(1, 4))):
            if settings.get("view_order") != "random":
                joined.set_epoch(epoch)
            batches = list(batches_of(len(data), rng))
            loader = DataLoader(joined, batch_sampler=batches, collate_fn=default_collate)
            for taken, batch in zip(batches, loader, strict=True):
                assert truth.wrong_rows(batch, [truth.data.id_at(indices[n]) for n in taken]) == 0
                rows += len(taken)
    proved("A1", clean_runs=count(10, 200), rows=rows, false_alarms=0)


def test_the_truth_of_these_tests_sees_what_a_student_without_checks_gets(truths: Truths) -> None:
    truth, rng = truths("sorted", "plain", False), generator("ids alone")
    data = FAULTS["reshuffled_inside_classes"](clean_student(truth), rng).data(has_names=False)
    batch = default_collate(truth.join(data, check="ids").__getitems__(list(range(SAMPLES))))
    assert truth.wrong_rows(batch, range(SAMPLES)) == len(truth.wrong_items(data)) > SAMPLES // 2


def test_a_wrapper_with_an_index_of_its_own_has_to_say_ids(truths: Truths) -> None:
    class Half(torch.utils.data.Dataset[Any]):
        def __init__(self, whole: Samples) -> None:
            self.whole = whole

        def __len__(self) -> int:
            return len(self.whole) // 2

        def __getitem__(self, index: int) -> Any:
            return self.whole[2 * index]

    truth = truths("sorted", "plain", False)
    with pytest.raises(DataError, match=r"wraps another data set .* pass sample_ids="):
        truth.join(Half(truth.data))


@pytest.mark.parametrize("has_names", [False, True])
@pytest.mark.parametrize("per_cent", [0.1, 0.3, 1.0])
def test_the_level_sample_finds_a_fault_as_often_as_it_says(
    per_cent: float, has_names: bool, tmp_path: Path, count: Count, proved: Proved
) -> None:
    samples, share = 1500, per_cent / 100
    names = [alignment.name_of(n) for n in range(samples)] if has_names else None
    images, labels = alignment.make_items("shuffled", samples)
    alignment.dump(tmp_path / "teacher", Samples(images, labels, names))
    cache = kdcache.open(tmp_path / "teacher")
    stored = np.array(names, "S") if names else np.arange(samples)
    first: list[bool] = []
    both: list[tuple[float, int]] = []
    for trial in range(count(10, 300)):
        rng = generator("power", per_cent, has_names, trial)
        faulty = rng.random(samples) < share
        changed = torch.where(torch.from_numpy(faulty)[:, None, None, None], images + 1, images)
        joined = kdcache.join(Samples(changed, labels, names), cache, check="sample")
        order = rng.permutation(samples)
        served = [order[:100], order[100:FIRST_ITEMS], order[FIRST_ITEMS:]]
        refused = [_is_refused(joined, part.tolist()) for part in served]
        compared = FIRST_ITEMS + int(in_sample(stored[served[2]]).sum())
        assert compared > FIRST_ITEMS
        first.append(refused[0] or refused[1])
        assert first[-1] == faulty[order[:FIRST_ITEMS]].any()
        both.append((detection_probability(compared, share), any(refused)))
    expected = detection_probability(FIRST_ITEMS, share)
    _assert_binomial(sum(first), [expected] * len(first))
    _assert_binomial(sum(found for _, found in both), [probability for probability, _ in both])
    assert "92 % in the first 256" in joined.checked
    assert round(detection_probability(FIRST_ITEMS, 0.01), 2) == 0.92
    proved("A1", per_cent=per_cent, runs=len(first), found=sum(first), expected=round(expected * len(first)))


def _is_refused(joined: Any, indices: list[int]) -> bool:
    try:
        joined.__getitems__(indices)
    except MismatchError:
        return True
    return False


def _assert_binomial(found: int, probabilities: list[float]) -> None:
    """Within 4 standard deviations (and 1, where these are small) of what is expected."""
    spread = math.sqrt(sum(p * (1 - p) for p in probabilities))
    assert abs(found - sum(probabilities)) <= 4 * spread + 1


def test_one_bit_of_any_sample_is_found_at_the_level_full(truths: Truths, proved: Proved) -> None:
    truth = truths("sorted", "plain", False)
    for place in range(SAMPLES):
        images = truth.data.images.clone()
        images[place, 0, 0, 0] = torch.nextafter(images[place, 0, 0, 0], torch.tensor(9.0))
        assert _is_refused(truth.join(Samples(images, truth.data.labels), check="full"), list(range(SAMPLES)))
    proved("A1", samples_with_one_bit_changed=SAMPLES)


class Scaled(nn.Module):
    """A teacher's own preprocessing."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.parametrize("order", ORDERS)
def test_another_teacher_and_another_preprocessing_are_found_by_verify(
    order: str, truths: Truths, count: Count, proved: Proved
) -> None:
    for trial in range(count(3, 100)):
        rng = generator("teacher", order, trial)
        truth = truths(order, list(PIPELINES)[trial % 3], False)
        settings: dict[str, Any] = {"device": "cpu", "sample": 16, "seed": trial}
        if truth.kind == "recipe":
            settings["augment"] = recipe(Recipe())
        path = truth.cache.path
        same = verify_teacher(path, alignment.make_teacher(), truth.data, **settings)
        assert same.ok, trial
        other = verify_teacher(path, alignment.make_teacher(trial + 1), truth.data, **settings)
        with pytest.raises(MismatchError, match="another teacher"):
            other.raise_on_error()
        scaled = Scaled(1 + float(rng.choice([-1, 1])) * float(rng.uniform(0.02, 0.5)))
        again = verify_teacher(path, alignment.make_teacher(), truth.data, transform=scaled, **settings)
        with pytest.raises(MismatchError, match="the weights are too: another transform"):
            again.raise_on_error()
    proved("A1", other_teachers=count(3, 100), other_preprocessings=count(3, 100), same_teachers=count(3, 100))


@pytest.mark.parametrize("order", ORDERS)
def test_another_teacher_and_another_preprocessing_are_refused_by_provenance(
    order: str, tmp_path: Path, count: Count, proved: Proved
) -> None:
    data = Samples(*alignment.make_items(order))
    out = tmp_path / "teacher"
    alignment.dump(out, data)
    for trial in range(count(3, 100)):
        with pytest.raises(
            MismatchError, match=r"provenance\.teacher\.state_sha256 is .* there and .* in this command"
        ):
            alignment.dump(out, data, teacher=alignment.make_teacher(trial + 1))
        with pytest.raises(MismatchError, match=r"provenance\.transform is .* there and .* in this command"):
            alignment.dump(out, data, transform=Scaled(1.5 + trial))
    assert np.array_equal(kdcache.open(out).gather(np.arange(SAMPLES)).sample_id, np.arange(SAMPLES))
    proved("A1", refused_dumps=2 * count(3, 100))


def test_a_shard_of_another_teachers_dump_is_refused(tmp_path: Path) -> None:
    data = Samples(*alignment.make_items("sorted"))
    for name, seed in (("one", 0), ("two", 1)):
        alignment.dump(tmp_path / name, data, teacher=alignment.make_teacher(seed), shard_rows=25)
    shards = sorted((tmp_path / "one").rglob("*.h5"))
    assert len(shards) == 4
    for shard in shards:
        own = shard.read_bytes()
        shutil.copyfile(tmp_path / "two" / shard.relative_to(tmp_path / "one"), shard)
        with pytest.raises((CorruptCacheError, MismatchError)):
            kdcache.join(data, kdcache.open(tmp_path / "one"), check="full").__getitems__(list(range(SAMPLES)))
        shard.write_bytes(own)
    assert kdcache.open(tmp_path / "one").num_samples == SAMPLES
