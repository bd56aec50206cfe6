from __future__ import annotations

import pickle
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import kdcache
from kdcache.errors import CoverageError, DataError, MismatchError, UsageError
from kdcache.train.rows import TeacherRow

HALF = {"rtol": 0.0, "atol": 2e-3}  # float16 rows below 4 in magnitude: 11 bits


def test_a_batch_carries_the_rows_of_its_samples(
    dataset: TensorDataset, cache: kdcache.Cache, logits: np.ndarray
) -> None:
    seen = []
    for x, y, teacher in DataLoader(kdcache.join(dataset, cache), batch_size=5, shuffle=True):
        rows = (x[:, 0] // 3).long()
        assert isinstance(teacher, kdcache.TeacherRows)
        assert teacher.sample_id.tolist() == rows.tolist()
        assert torch.equal(teacher.label, y)
        torch.testing.assert_close(teacher.dense(), torch.from_numpy(logits)[rows], **HALF)
        seen += rows.tolist()
    assert sorted(seen) == list(range(12))


def test_joined_batches_train_a_student(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    student = torch.nn.Linear(3, 5)
    criterion = kdcache.DistillationLoss(alpha=0.9, temperature=4.0)
    for x, y, teacher in DataLoader(kdcache.join(dataset, cache), batch_size=12):
        criterion(student(x), teacher, y).backward()
    assert student.weight.grad is not None


Item = namedtuple("Item", "x y")


@pytest.mark.parametrize(
    ("items", "kind"),
    [
        ([(torch.zeros(3), 0), (torch.ones(3), 1)], tuple),
        ([[torch.zeros(3), 0], [torch.ones(3), 1]], list),
        ([Item(torch.zeros(3), 0), Item(torch.ones(3), 1)], tuple),
        ([{"x": torch.zeros(3), "label": 0}, {"x": torch.ones(3), "label": 1}], dict),
        ([torch.zeros(3), torch.ones(3)], tuple),
    ],
)
def test_items_of_every_form_get_their_row(make_cache: Any, items: list[Any], kind: type) -> None:
    joined = kdcache.join(items, make_cache(digest_point=None))
    item = joined[1]
    assert type(item) is kind
    row = item["teacher"] if kind is dict else item[-1]
    assert isinstance(row, TeacherRow)
    assert row.sample_id == 1
    batch = next(iter(DataLoader(joined, batch_size=2)))
    teacher = batch["teacher"] if kind is dict else batch[-1]
    assert teacher.dense().shape == (2, 5)


def test_a_subset_and_a_subset_of_the_joined_set_keep_ids(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    part = Subset(dataset, [7, 2, 9])
    for data in (kdcache.join(part, cache), Subset(kdcache.join(dataset, cache), [7, 2, 9])):
        x, _, teacher = next(iter(DataLoader(data, batch_size=3)))
        assert teacher.sample_id.tolist() == [7, 2, 9] == (x[:, 0] // 3).long().tolist()


def test_joined_sets_can_be_concatenated(dataset: TensorDataset, make_cache: Any) -> None:
    first = kdcache.join(Subset(dataset, [0, 1, 2]), make_cache("a.h5", keep=slice(0, 3)))
    second = kdcache.join(Subset(dataset, [3, 4]), make_cache("b.h5", keep=slice(3, 5), dtype="float32"))
    x, y, teacher = next(iter(DataLoader(ConcatDataset([first, second]), batch_size=5)))
    assert teacher.sample_id.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(teacher.label, y)
    assert len(x) == 5


def test_text_ids_are_joined(dataset: TensorDataset, make_cache: Any, logits: np.ndarray) -> None:
    names = [f"class/{index}.png" for index in range(12)]
    joined = kdcache.join(dataset, make_cache(ids=names), sample_ids=names)
    row = joined[10][2]
    assert row.sample_id == b"class/10.png"
    torch.testing.assert_close(row.dense(), torch.from_numpy(logits[10]), **HALF)


def test_a_joined_set_is_a_sequence(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    joined = kdcache.join(dataset, cache)
    assert len(joined) == 12
    assert joined[-1][2].sample_id == 11
    assert sum(1 for _ in joined) == 12  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        joined[12]


def test_a_joined_set_pickles_small_and_whole(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    joined = pickle.loads(pickle.dumps(kdcache.join(dataset, cache)))
    assert [row.sample_id for _, _, row in joined] == list(range(12))


def test_missing_samples_are_an_error_when_the_join_is_made(dataset: TensorDataset, make_cache: Any) -> None:
    cache = make_cache(keep=[0, 1, 2, 4, 7])
    message = r"7 of the 12 samples .* not in teacher\.h5: 3, 5, 6, 8, 9, \.\.\.\. .*missing='skip'.*--missing"
    with pytest.raises(CoverageError, match=message):
        kdcache.join(dataset, cache)


def test_missing_samples_can_be_skipped(dataset: TensorDataset, make_cache: Any) -> None:
    joined = kdcache.join(dataset, make_cache(keep=[1, 4, 7]), missing="skip")
    assert len(joined) == 3
    assert joined.sample_ids.tolist() == [1, 4, 7]
    assert [(int(x[0]), row.sample_id) for x, _, row in joined] == [(3, 1), (12, 4), (21, 7)]


def test_missing_samples_can_train_on_their_labels(dataset: TensorDataset, make_cache: Any) -> None:
    joined = kdcache.join(dataset, make_cache(keep=[1, 4, 7]), missing="ce")
    _, y, teacher = next(iter(DataLoader(joined, batch_size=12)))
    assert len(joined) == 12
    assert teacher.has_teacher.nonzero()[:, 0].tolist() == [1, 4, 7]
    assert teacher.sample_id.tolist() == list(range(12))
    assert (teacher.dense()[0] == 0).all()
    student = torch.zeros(12, 5)
    loss = kdcache.losses.kd_loss(student, teacher, y, alpha=1.0, temperature=1.0, reduction="none")
    assert loss[0].item() == pytest.approx(np.log(5))


@pytest.mark.parametrize("missing", ["error", "skip", "ce"])
def test_a_cache_of_another_data_set_is_refused_whatever_is_said_of_missing_samples(
    dataset: TensorDataset, make_cache: Any, missing: Any
) -> None:
    with pytest.raises(CoverageError, match="none of the 12 samples"):
        kdcache.join(dataset, make_cache(ids=np.arange(100, 112)), missing=missing)


def test_ids_of_another_kind_and_unknown_views_are_refused(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    with pytest.raises(MismatchError, match="integers"):
        kdcache.join(dataset, cache, sample_ids=[f"{index}" for index in range(12)])
    with pytest.raises(MismatchError, match="views"):
        kdcache.join(dataset, cache, view=3)
    with pytest.raises(UsageError, match="missing must be"):
        kdcache.join(dataset, cache, missing="drop")  # type: ignore[arg-type]


def test_arguments_in_another_order_are_refused_by_name(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    with pytest.raises(UsageError, match=r"the cache is a TensorDataset.*kdcache\.join\(dataset, cache\)"):
        kdcache.join(cache, dataset)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"the cache is a list.*kdcache\.attach\(loader, cache\)"):
        kdcache.attach(cache, [])  # type: ignore[arg-type]
    rows = cache.gather(np.arange(12)).tensors()
    with pytest.raises(UsageError, match=r"student's logits are TeacherRows.*come first, the teacher second"):
        kdcache.losses.kd_loss(rows, rows.dense(), None, alpha=1.0, temperature=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("check", ["ids", "sample", "full"])
def test_labels_that_disagree_are_an_error_at_every_level(
    inputs: torch.Tensor, labels: torch.Tensor, cache: kdcache.Cache, check: Any
) -> None:
    wrong = labels.clone()
    wrong[7] = 0
    joined = kdcache.join(TensorDataset(inputs, wrong), cache, check=check)
    with pytest.raises(
        MismatchError, match=r"sample 7 has the label 0 in the data set and 2 in teacher.h5; 1 of the 12"
    ):
        next(iter(DataLoader(joined, batch_size=12)))


def test_an_item_without_a_label_is_not_compared(inputs: torch.Tensor, cache: kdcache.Cache) -> None:
    unlabelled = TensorDataset(inputs, torch.full((12,), -1))
    for data in (unlabelled, TensorDataset(inputs)):
        assert len(next(iter(DataLoader(kdcache.join(data, cache), batch_size=12)))[-1]) == 12


def test_another_order_behind_the_same_ids_is_noticed(
    inputs: torch.Tensor, labels: torch.Tensor, make_cache: Any
) -> None:
    cache = make_cache(with_labels=False)
    swapped = inputs[[1, 0, *range(2, 12)]]
    joined = kdcache.join(TensorDataset(swapped, labels), cache)
    with pytest.raises(MismatchError, match=r"sample 0: its input is not the one .* check='ids'"):
        joined[0]
    assert joined[5][2].sample_id == 5
    assert kdcache.join(TensorDataset(swapped, labels), cache, check="ids")[0][2].sample_id == 0


def test_another_transform_is_noticed(inputs: torch.Tensor, labels: torch.Tensor, cache: kdcache.Cache) -> None:
    joined = kdcache.join(TensorDataset(inputs * 2, labels), cache, check="full")
    with pytest.raises(MismatchError, match="random augmentation"):
        next(iter(DataLoader(joined, batch_size=4, shuffle=True)))


def test_digests_of_another_point_are_left_alone_and_that_is_stated(
    inputs: torch.Tensor, labels: torch.Tensor, make_cache: Any
) -> None:
    joined = kdcache.join(TensorDataset(inputs * 2, labels), make_cache(digest_point="view"), check="full")
    assert "another point (view)" in joined.checked
    assert joined[3][2].sample_id == 3


def test_the_data_sets_own_getitems_is_used(cache: kdcache.Cache) -> None:
    calls: list[list[int]] = []

    class Batched(list[Any]):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            calls.append(indices)
            return [(index, index % 5) for index in indices]

    joined = kdcache.join(Batched(range(12)), cache, check="ids")
    next(iter(DataLoader(joined, batch_size=4)))
    assert calls == [[0, 1, 2, 3]]


def test_dict_items_with_a_teacher_key_are_refused(cache: kdcache.Cache) -> None:
    with pytest.raises(DataError, match="key 'teacher'"):
        kdcache.join([{"x": 0, "teacher": 1}] * 2, cache, check="ids")[0]


def test_a_sample_drawn_twice_gets_its_row_twice(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    _, _, teacher = next(iter(DataLoader(kdcache.join(Subset(dataset, [3, 3, 1]), cache), batch_size=3)))
    assert teacher.sample_id.tolist() == [3, 3, 1]
