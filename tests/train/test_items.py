from __future__ import annotations

from collections import namedtuple
from types import MappingProxyType

import pytest

from kdcache.errors import DataError
from kdcache.train.items import NOT_INPUTS, first_input, label_of, load_items, with_part

Pair = namedtuple("Pair", "x y")


def test_the_first_input_is_the_first_part_that_is_neither_label_nor_id_nor_text() -> None:
    assert first_input((1, 2)) == 1
    assert first_input([1]) == 1
    assert first_input(5) == 5
    assert first_input({"label": 0, "sample_id": 3, "path": "a.png", "pixels": 7, "mask": 8}) == 7
    with pytest.raises(DataError, match="no input among the keys"):
        first_input({"label": 0})
    with pytest.raises(DataError, match="empty"):
        first_input(())


def test_the_label_is_the_second_part_or_the_value_of_a_label_key() -> None:
    assert label_of((1, 2, 3)) == 2
    assert label_of((1,)) is None
    assert label_of({"x": 1, "labels": 4}) == 4
    assert label_of({"x": 1}) is None
    assert label_of(1) is None


def test_everything_that_is_read_as_a_label_is_not_an_input() -> None:
    for key in ("label", "labels", "target", "targets"):
        assert label_of({"x": 1, key: 2}) == 2
        assert key in NOT_INPUTS
    assert {"teacher", "sample_id"} <= NOT_INPUTS


def test_a_part_is_added_without_changing_the_item() -> None:
    item = {"x": 1}
    assert with_part(item, 2, key="teacher") == {"x": 1, "teacher": 2}
    assert item == {"x": 1}
    assert with_part(MappingProxyType(item), 2, key="teacher") == {"x": 1, "teacher": 2}
    assert with_part(Pair(1, 2), 3, key="teacher") == (1, 2, 3)
    assert with_part([1], 2, key="teacher") == [1, 2]
    assert with_part("x", 2, key="teacher") == ("x", 2)
    with pytest.raises(DataError, match="key 'x'"):
        with_part(item, 2, key="x")


def test_getitems_must_return_one_item_per_index() -> None:
    class Short(list[int]):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return [1]

    assert load_items([5, 6, 7], [2, 0]) == [7, 5]
    assert load_items(Short(), [4]) == [1]
    with pytest.raises(DataError, match="expected a list of as many items"):
        load_items(Short(), [4, 5])
