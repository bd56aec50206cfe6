from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kdcache
from kdcache.errors import MismatchError, UsageError
from kdcache.train.checks import FIRST_ITEMS, ONE_IN, InputCheck, check_labels, in_sample, label_array


def test_the_sample_is_1_in_64_of_the_ids_whatever_their_kind() -> None:
    numbers = np.arange(64_000)
    names = np.array([f"n01440764/{index}.JPEG".encode() for index in numbers])
    for ids in (numbers, numbers * 64, -numbers, names):
        share = in_sample(ids)
        assert share.shape == (64_000,)
        assert share.dtype == bool
        # A binomial count of mean 1000 and standard deviation 31; five of these.
        assert abs(int(share.sum()) - 64_000 // ONE_IN) < 157
        assert (in_sample(ids[::-1]) == share[::-1]).all()


def test_the_first_items_are_all_compared_and_then_a_sample(cache: kdcache.Cache) -> None:
    check = InputCheck(cache, "sample")
    ids = np.arange(10_000, 10_200)
    assert len(check.choose(ids)) == 200
    assert set(range(FIRST_ITEMS - 200)) <= set(check.choose(ids).tolist())
    assert check.choose(ids).tolist() == np.flatnonzero(in_sample(ids)).tolist()


def test_the_levels_compare_all_or_none(cache: kdcache.Cache) -> None:
    ids = np.arange(10_000)
    full = InputCheck(cache, "full")
    assert [len(full.choose(ids)) for _ in range(2)] == [10_000, 10_000]
    assert len(InputCheck(cache, "ids").choose(ids)) == 0
    with pytest.raises(UsageError, match="check must be"):
        InputCheck(cache, "none")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "level", "note"),
    [
        (
            {},
            "sample",
            "ids and labels, inputs (the first 256 of each process, then 1 in 64: a fault in 1 % of the samples is "
            "found with 92 % in the first 256)",
        ),
        ({}, "full", "ids and labels, inputs (all)"),
        ({}, "ids", "ids and labels"),
        ({"digest_point": None}, "full", "ids and labels; no inputs: the cache holds no input digests"),
        (
            {"digest_point": "view"},
            "sample",
            "ids and labels; no inputs: the dump took its digests at another point (view) than the data set's items",
        ),
        ({"with_labels": False}, "ids", "ids (the cache holds no labels)"),
    ],
)
def test_what_is_compared_is_stated(make_cache: Any, options: dict[str, Any], level: Any, note: str) -> None:
    assert InputCheck(make_cache(**options), level).note == note


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([3, -1]),
        np.array([3, -1], np.int32),
        [3, -1],
        [torch.tensor(3), torch.tensor(-1)],
        (np.int8(3), -1),
    ],
)
def test_labels_are_read_in_every_usual_form(labels: Any) -> None:
    found = label_array(labels)
    assert found is not None
    assert found.tolist() == [3, -1]


@pytest.mark.parametrize(
    "labels",
    [
        None,
        [],
        "ab",
        [1.5, 2.5],
        torch.zeros(2),
        torch.zeros(2, 2).long(),
        [None, None],
        [True, False],
        torch.zeros(2).bfloat16(),
    ],
)
def test_other_labels_are_not_compared(labels: Any) -> None:
    assert label_array(labels) is None


def test_labels_are_compared_where_both_sides_have_one(cache: kdcache.Cache) -> None:
    stored = cache.gather([0, 1, 2, -1])
    check_labels([0, 1, 2, 4], stored, "teacher.h5")
    check_labels([-1, -1, -1, -1], stored, "teacher.h5")
    check_labels([0, 1], stored, "teacher.h5")  # not one label per row
    with pytest.raises(MismatchError, match=r"sample 1 has the label 4 in the data set and 1 in teacher\.h5; 2 of"):
        check_labels(torch.tensor([0, 4, 3, 4]), stored, "teacher.h5")
    with pytest.raises(MismatchError, match=r"differ, sample 2: 3 and 2\. .*`kdcache convert teacher\.h5 NEW --labels"):
        check_labels(torch.tensor([0, 4, 3, 4]), stored, "teacher.h5")
