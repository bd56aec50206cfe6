from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, StackDataset, Subset

from kdcache.errors import DataError, UsageError
from kdcache.train import ids


class Plain(Dataset[Any]):
    def __init__(self, size: int = 6) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return (index * 10, 0)


class Named(Plain):
    @property
    def sample_ids(self) -> list[str]:
        return [f"image/{index}.png" for index in range(self.size)]


class Dicts(Plain):
    def __getitem__(self, index: int) -> Any:
        return {"x": index, "key": np.int64(100 + index)}


class Columns(Dicts):
    """As a Hugging Face data set: whole columns by name."""

    column_names = ("x", "key")
    loaded = 0

    def __getitem__(self, index: Any) -> Any:
        if index == "key":
            return [100 + i for i in range(self.size)]
        self.loaded += 1
        return super().__getitem__(index)


class Wrapper(Dataset[Any]):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return index


def test_a_plain_data_set_is_numbered_by_its_index() -> None:
    assert ids.resolve(Plain()).tolist() == [0, 1, 2, 3, 4, 5]
    assert ids.resolve(Plain(0)).tolist() == []
    assert ids.resolve([(1, 2), (3, 4)]).dtype == np.int64


def test_ids_that_are_given_come_before_those_of_the_data_set() -> None:
    assert ids.resolve(Named(2), sample_ids=[7, 9]).tolist() == [7, 9]
    assert ids.resolve(Named(2)).tolist() == [b"image/0.png", b"image/1.png"]
    assert ids.resolve(Dicts(2), sample_ids=["a", "b"]).tolist() == [b"a", b"b"]


def test_the_index_of_a_subset_never_poses_as_an_id() -> None:
    inner = Subset(Plain(), [5, 3, 1])
    assert ids.resolve(inner).tolist() == [5, 3, 1]
    assert ids.resolve(Subset(inner, [2, 0, 0])).tolist() == [1, 5, 5]
    assert ids.resolve(Subset(Named(), [4])).tolist() == [b"image/4.png"]
    assert ids.resolve(Subset(Plain(), [])).tolist() == []


def test_a_key_of_dict_items_is_read_from_each_item() -> None:
    assert ids.resolve(Dicts(3), id_key="key").tolist() == [100, 101, 102]
    assert ids.resolve(Subset(Dicts(), [4, 0]), id_key="key").tolist() == [104, 100]
    assert ids.resolve(Wrapper(Dicts(2)), id_key="key").tolist() == [100, 101]


def test_a_column_is_read_without_loading_items() -> None:
    data = Columns()
    assert ids.resolve(data, id_key="key").tolist() == [100, 101, 102, 103, 104, 105]
    assert ids.resolve(Subset(data, [5, 0]), id_key="key").tolist() == [105, 100]
    assert data.loaded == 0


def test_parts_of_a_concatenation_keep_their_ids() -> None:
    data, other = Plain(), Named(2)
    parts = ConcatDataset([Subset(data, [0, 1]), Subset(data, [1, 5])])
    assert ids.resolve(parts).tolist() == [0, 1, 1, 5]
    assert ids.resolve(Subset(ConcatDataset([other, Subset(other, [1])]), [2, 0])).tolist() == [
        b"image/1.png",
        b"image/0.png",
    ]
    assert ids.resolve(ConcatDataset([Plain(2), Plain(2)]), sample_ids=range(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (ConcatDataset([Plain(2), Plain(3)]), {}, r"share 2 sample ids \(0, 1\)"),
        (ConcatDataset([Plain(2), Subset(Plain(9), [1, 8])]), {}, r"share 1 sample ids \(1\)"),
        (ConcatDataset([Plain(2), Named(2)]), {}, "integer and text ids"),
        (Wrapper(Plain()), {}, "attribute 'inner'"),
        (Subset(Wrapper(Plain()), [0]), {}, "wraps another data set"),
        (Wrapper(Columns()), {}, "wraps another data set"),
        (StackDataset(Plain(), Plain()), {}, "attribute 'datasets'"),
        (Endless(), {}, "IterableDataset"),
        (NoLength(), {}, "has no length"),
        (Plain(3), {"sample_ids": [1, 2]}, "holds 2 ids, the data set 3 items"),
        (Plain(2), {"sample_ids": [1, "a"]}, "found int, str"),
        (Plain(2), {"id_key": "key"}, "needs dict items, item 0 is a tuple"),
        (Dicts(2), {"id_key": "id"}, "no key 'id', its keys are x, key"),
    ],
)
def test_where_no_ids_can_be_had_the_error_says_what_to_pass(dataset: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ids.resolve(dataset, **options)


def test_two_sources_of_ids_are_refused() -> None:
    with pytest.raises(UsageError, match="both"):
        ids.resolve(Dicts(2), sample_ids=[1, 2], id_key="key")
    with pytest.raises(UsageError, match="comes first"):
        ids.resolve(Named(2), id_key="key")


def test_a_data_set_whose_attribute_is_none_has_no_ids_of_its_own() -> None:
    data = Plain(2)
    data.sample_ids = None  # type: ignore[attr-defined]
    assert ids.resolve(data).tolist() == [0, 1]
