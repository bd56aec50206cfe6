from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from view_caches import Images

from kdcache.errors import CoverageError, DataError
from kdcache.train.mixed_labels import MixedLabel
from kdcache.train.pipelines import named
from kdcache.train.replay import Replay
from kdcache.train.viewed import Viewed, ViewedItems

IDS = np.arange(12)


def test_without_a_pipeline_items_are_what_they_are() -> None:
    images = Images()
    items = ViewedItems(images, IDS, None)
    found = items.load([3, 1], [0, 5])
    assert [one.item[1] for one in found] == [3, 1]
    assert found[0].item[0] is images[3][0] or torch.equal(found[0].item[0], images[3][0])
    assert (found[0].label_b, found[0].mix_ratio, items.is_mixed) == (None, 1.0, False)


def test_items_come_in_the_view_of_their_id_not_of_their_place() -> None:
    images, replay = Images(), named("shift,noise", seed=2)
    found = ViewedItems(images, IDS + 100, replay).load([3, 1, 3], [0, 5, 5])
    for one, (index, view) in zip(found, [(3, 0), (1, 5), (3, 5)], strict=True):
        assert torch.equal(one.item[0], replay(images[index][0], index + 100, view))
        assert one.item[1] == index % 5


Item = namedtuple("Item", "x y")


@pytest.mark.parametrize(
    "item",
    [
        (torch.ones(1, 4, 4), 3),
        [torch.ones(1, 4, 4), 3],
        Item(torch.ones(1, 4, 4), 3),
        {"name": "a", "x": torch.ones(1, 4, 4), "label": 3},
        torch.ones(1, 4, 4),
    ],
)
def test_items_keep_their_form(item: Any) -> None:
    (found,) = ViewedItems([item], IDS[:1], named("noise")).load([0], [0])
    assert type(found.item) is type(item)
    assert found.labelled is found.item


@pytest.mark.parametrize("text", ["shift,mixup1", "noise,cutmix", "mixup"])
def test_a_mixed_view_is_made_of_the_partners_same_view_and_labels(text: str) -> None:
    images, replay = Images(), named(text, seed=2)
    assert replay.mix is not None
    partners = IDS[[5, 2, 9, 0]]
    items = ViewedItems(images, IDS, replay, partners)
    for index in IDS.tolist():
        (one,) = items.load([index], [3])
        draw = replay.mix.draw(2, index, 3, 4)
        other = int(partners[draw.partner])
        expected, ratio = replay.mix(replay(images[index][0], index, 3), replay(images[other][0], other, 3), draw)
        assert torch.equal(one.item[0], expected)
        assert (one.label_b, one.mix_ratio) == (other % 5, ratio)
        assert one.labelled[1] == MixedLabel(index % 5, other % 5, ratio)
        assert one.item[1] == index % 5


def test_a_batch_is_its_items() -> None:
    items = ViewedItems(Images(), IDS, named("shift,cutmix", seed=2))
    indices, views = [4, 0, 4, 11], [1, 1, 0, 2]
    together = items.load(indices, views)
    for one, index, view in zip(together, indices, views, strict=True):
        (alone,) = items.load([index], [view])
        assert torch.equal(one.item[0], alone.item[0])
        assert (one.label_b, one.mix_ratio) == (alone.label_b, alone.mix_ratio)


def test_partners_that_the_data_set_lacks_are_refused() -> None:
    with pytest.raises(CoverageError, match=r"with one of its 13 samples, and the data set lacks 1 of them .* is 99\)"):
        ViewedItems(Images(), IDS, named("mixup"), np.array([*range(12), 99]))
    names = np.array([b"a", b"b", b"c"])
    ViewedItems(Images(3), names, named("mixup"), names[::-1])
    with pytest.raises(CoverageError, match="the first is 'd'"):
        ViewedItems(Images(3), names, named("mixup"), np.array([b"a", b"d"]))


def test_labels_that_are_no_class_numbers_cannot_be_mixed() -> None:
    items = ViewedItems([(torch.ones(1, 4, 4), "cat")] * 2, IDS[:2], named("mixup"))
    with pytest.raises(DataError, match="mix class numbers, found a label of str"):
        items.load([0], [0])


def test_items_without_a_label_are_mixed_with_none() -> None:
    items = ViewedItems([(torch.ones(1, 4, 4),)] * 2, IDS[:2], named("mixup"))
    (found,) = items.load([0], [0])
    assert found.label_b == -1
    assert found.labelled is found.item


def test_a_failing_pipeline_names_the_sample() -> None:
    def fail(value: Any) -> Any:
        raise ValueError("bad")

    with pytest.raises(DataError, match=r"failed on sample 7 \(view 2\)"):
        ViewedItems(Images(), IDS, Replay(fail, seed=0, name="t")).load([7], [2])


def test_a_viewed_item_is_unmixed_by_default() -> None:
    assert (Viewed(1).label_b, Viewed(1).mix_ratio, Viewed(1).labelled) == (None, 1.0, 1)
