from __future__ import annotations

from collections import UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import kdcache
from kdcache.errors import CoverageError, DataError, MismatchError
from kdcache.train.with_ids import SampleId, SampleIds


def loader_of(dataset: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(kdcache.with_ids(dataset), **{"batch_size": 5, **options})


def test_attach_gives_the_batches_of_join(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    def order() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    joined = DataLoader(kdcache.join(dataset, cache), batch_size=5, shuffle=True, generator=order())
    attached = kdcache.attach(loader_of(dataset, shuffle=True, generator=order()), cache)
    assert len(attached) == len(joined) == 3
    for ours, theirs in zip(attached, joined, strict=True):
        assert type(ours) is type(theirs) is list
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2].dense(), theirs[2].dense())
        assert ours[2].sample_id.tolist() == theirs[2].sample_id.tolist()


def test_a_loader_can_be_gone_through_again_and_keeps_its_attributes(
    dataset: TensorDataset, cache: kdcache.Cache
) -> None:
    loader = loader_of(dataset)
    attached = kdcache.attach(loader, cache)
    assert [len(batch[0]) for _ in range(2) for batch in attached] == [5, 5, 2] * 2
    assert attached.batch_size == 5
    assert attached.dataset is loader.dataset
    with pytest.raises(AttributeError):
        attached.no_such_attribute  # noqa: B018


def test_the_epoch_reaches_each_part_that_wants_it_once(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    attached = kdcache.attach(loader_of(dataset, sampler=Sampler(dataset)), cache)
    attached.set_epoch(4)
    assert Sampler.epochs == [4]
    kdcache.attach(loader_of(dataset), cache).set_epoch(4)  # nobody wants it


def test_dict_batches_get_the_rows_under_teacher(inputs: torch.Tensor, cache: kdcache.Cache) -> None:
    items = [{"x": x, "label": index % 5, "sample_id": "old"} for index, x in enumerate(inputs)]
    batch = next(iter(kdcache.attach(loader_of(items), cache)))
    assert list(batch) == ["x", "label", "teacher"]
    assert batch["teacher"].sample_id.tolist() == [0, 1, 2, 3, 4]


def test_bare_inputs_get_their_row_beside_them(inputs: torch.Tensor, cache: kdcache.Cache) -> None:
    x, teacher = next(iter(kdcache.attach(loader_of(list(inputs)), cache, check="full")))
    assert torch.equal(x, inputs[:5])
    assert teacher.sample_id.tolist() == [0, 1, 2, 3, 4]


class Encoded(UserDict):  # type: ignore[type-arg]
    """As the batches of tokenizers: a mutable mapping of its own class."""


Batch = namedtuple("Batch", "x y ids")


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(2, 3), torch.tensor([4, 1]), SampleIds(np.array([4, 1]))),
        (torch.zeros(2, 3), torch.tensor([4, 1]), [SampleId(4), SampleId(1)]),
        (SampleIds(np.array([4, 1])), torch.tensor([4, 1])),
        Batch(torch.zeros(2, 3), torch.tensor([4, 1]), SampleIds(np.array([4, 1]))),
        {"x": torch.zeros(2, 3), "sample_id": torch.tensor([4, 1])},
        {"x": torch.zeros(2, 3), "sample_id": [4, 1]},
        MappingProxyType({"x": torch.zeros(2, 3), "sample_id": (SampleId(4), SampleId(1))}),
        Encoded({"x": torch.zeros(2, 3), "sample_id": np.array([4, 1])}),
    ],
)
def test_loaders_of_any_make_are_attached(cache: kdcache.Cache, batch: Any) -> None:
    (found,) = kdcache.attach([batch], cache, check="ids")
    if not isinstance(batch, MappingProxyType):
        assert type(found) is type(batch)
    parts = list(found.values()) if hasattr(found, "values") else list(found)
    (teacher,) = (part for part in parts if isinstance(part, kdcache.TeacherRows))
    assert teacher.sample_id.tolist() == [4, 1]
    assert len(parts) == len(batch)
    assert not any(isinstance(part, SampleIds) for part in parts)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([torch.zeros(2, 3), torch.tensor([4, 1])], "found a list of Tensor, Tensor"),
        ({"x": torch.zeros(2)}, "a dict with the keys x"),
        (torch.zeros(2), "found a Tensor"),
        ({"teacher": 0, "sample_id": [1, 2]}, "key 'teacher'"),
    ],
)
def test_batches_without_ids_are_refused(cache: kdcache.Cache, batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(kdcache.attach([batch], cache, check="ids"))


def test_missing_samples_are_an_error_when_attached(dataset: TensorDataset, make_cache: Any) -> None:
    cache = make_cache(keep=slice(0, 9))
    with pytest.raises(CoverageError, match="3 of the 12 samples of the data set"):
        kdcache.attach(loader_of(dataset), cache)
    part = Subset(kdcache.with_ids(dataset), [3, 10])
    with pytest.raises(CoverageError, match="1 of the 2 samples"):
        kdcache.attach(DataLoader(part), cache)


def test_missing_samples_of_an_unknown_loader_are_an_error_in_their_batch(make_cache: Any) -> None:
    batches = [{"sample_id": [1, 2]}, {"sample_id": [1, 11]}]
    attached = iter(kdcache.attach(batches, make_cache(keep=slice(0, 9)), check="ids"))
    next(attached)
    with pytest.raises(CoverageError, match=r"1 of the 2 samples of a batch are not in teacher\.h5: 11"):
        next(attached)


def test_missing_samples_can_train_on_their_labels(dataset: TensorDataset, make_cache: Any) -> None:
    attached = kdcache.attach(loader_of(dataset, batch_size=12), make_cache(keep=[1, 4, 7]), missing="ce")
    ((_, _, teacher),) = attached
    assert teacher.has_teacher.nonzero()[:, 0].tolist() == [1, 4, 7]
    assert teacher.sample_id.tolist() == list(range(12))


def test_missing_samples_can_be_taken_out_of_their_batches(inputs: torch.Tensor, make_cache: Any) -> None:
    items = [
        {"x": x, "label": index % 5, "name": f"item {index}", "more": {"y": [x, x]}, "text": ("a", index)}
        for index, x in enumerate(inputs)
    ]
    attached = kdcache.attach(loader_of(items, batch_size=4), make_cache(keep=[1, 2, 8]), missing="skip")
    batches = list(attached)
    assert [batch["teacher"].sample_id.tolist() for batch in batches] == [[1, 2], [8]]
    first = batches[0]
    assert torch.equal(first["x"], inputs[[1, 2]])
    assert first["name"] == ["item 1", "item 2"]
    assert torch.equal(first["more"]["y"][1], inputs[[1, 2]])
    assert list(first["text"][0]) == ["a", "a"]
    assert first["text"][1].tolist() == [1, 2]


def test_taking_out_keeps_the_types_of_a_batch(make_cache: Any) -> None:
    batch = Batch(torch.arange(3), ("a", "b", "c"), SampleIds(np.array([1, 9, 2])))
    encoded = Encoded({"x": torch.arange(3), "scale": 2.0, "sample_id": [9, 1, 2]})
    cache = make_cache(keep=[1, 2])
    first, second = kdcache.attach([batch, encoded], cache, missing="skip", check="ids")
    assert type(first) is Batch
    assert first.x.tolist() == [0, 2]
    assert first.y == ("a", "c")
    assert type(second) is Encoded
    assert second["x"].tolist() == [1, 2]
    assert second["scale"] == 2.0
    assert encoded["x"].tolist() == [0, 1, 2]


def test_labels_and_inputs_are_compared_as_in_a_join(
    inputs: torch.Tensor, labels: torch.Tensor, cache: kdcache.Cache
) -> None:
    wrong = labels.clone()
    wrong[3] = 0
    with pytest.raises(MismatchError, match="sample 3 has the label 0 in the data set and 3"):
        list(kdcache.attach(loader_of(TensorDataset(inputs, wrong)), cache))
    with pytest.raises(MismatchError, match="sample 0: its input"):
        list(kdcache.attach(loader_of(TensorDataset(inputs + 1, labels)), cache))
    assert len(list(kdcache.attach(loader_of(TensorDataset(inputs + 1, labels)), cache, check="ids"))) == 3


def test_inputs_that_collate_mixes_are_noticed(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    def mix(items: list[Any]) -> Any:
        x, y, ids = torch.utils.data.default_collate(items)
        return [0.5 * x + 0.5 * x.flip(0), y, ids]

    with pytest.raises(MismatchError, match="its input is not the one"):
        list(kdcache.attach(loader_of(dataset, collate_fn=mix), cache))


def test_text_ids_travel_through_a_batch(dataset: TensorDataset, make_cache: Any) -> None:
    names = [f"{'x' * index}.png" for index in range(12)]
    data = kdcache.with_ids(dataset, sample_ids=names)
    assert data[3][2].value == b"xxx.png"
    batches = list(kdcache.attach(DataLoader(data, batch_size=4), make_cache(ids=names)))
    assert [value.decode() for batch in batches for value in batch[2].sample_id.tolist()] == names


def test_ids_reach_the_items_of_a_subset(dataset: TensorDataset) -> None:
    data = kdcache.with_ids(Subset(dataset, [9, 4]))
    assert len(data) == 2
    assert [item[2].value for item in (data[0], data[-1])] == [9, 4]
    assert data.sample_ids.tolist() == [9, 4]


def test_what_is_compared_is_stated(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    attached = kdcache.attach(loader_of(dataset), cache, check="ids")
    assert attached.checked == "ids and labels"
    assert attached.cache is cache


@pytest.mark.gpu
def test_rows_are_pinned_where_the_loader_pins(dataset: TensorDataset, cache: kdcache.Cache) -> None:
    x, _, teacher = next(iter(kdcache.attach(loader_of(dataset, pin_memory=True), cache)))
    assert x.is_pinned()
    assert teacher.arrays["logits"].is_pinned()
