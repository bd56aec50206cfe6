from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset
from view_caches import Images, logits_of, write_views

import kdcache
from kdcache.errors import MismatchError, UsageError
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.pipelines import named
from kdcache.train.views import replayable
from kdcache.train.with_ids import SampleIds


def darker(image: torch.Tensor) -> torch.Tensor:
    return image * torch.rand(())


@pytest.fixture
def images() -> Images:
    return Images()


@pytest.fixture
def cache(images: Images, tmp_path: Path) -> kdcache.Cache:
    return write_views(tmp_path / "c", images, named("shift,noise", seed=3))


def attached(images: Any, cache: kdcache.Cache, *, check: Any = "full", **options: Any) -> Any:
    data = kdcache.with_ids(images, cache=cache, **options)
    return kdcache.attach(DataLoader(data, batch_size=5), cache, check=check)


@pytest.mark.parametrize("text", ["shift,noise", "shift,mixup1", "noise,cutmix"])
def test_attach_gives_the_batches_of_join(images: Images, tmp_path: Path, text: str) -> None:
    cache = write_views(tmp_path / "c", images, named(text), (0, 2, 5))
    loader, joined = attached(images, cache), kdcache.join(images, cache, check="full")
    for epoch in range(4):
        loader.set_epoch(epoch)
        joined.set_epoch(epoch)
        for ours, theirs in zip(loader, DataLoader(joined, batch_size=5), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[2].dense(), theirs[2].dense())
            assert ours[2].view.tolist() == theirs[2].view.tolist() == [(0, 2, 5)[epoch % 3]] * len(ours[0])
            if isinstance(ours[1], MixedLabels):
                assert torch.equal(ours[1].second, theirs[1].second)
                assert torch.equal(ours[1].ratio, ours[2].mix_ratio)
            else:
                assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("order", [None, "random"])
def test_each_access_may_take_a_view_at_random(images: Images, cache: kdcache.Cache, order: Any) -> None:
    loader = attached(images, cache, view_order=order)
    seen = set()
    for x, _, teacher in [batch for _ in range(4) for batch in loader]:
        assert np.array_equal(teacher.dense().numpy(), np.stack([logits_of(value) for value in x]))
        seen |= set(teacher.view.tolist())
    assert seen == {0, 1, 2, 3}


def test_workers_that_live_on_follow_the_epoch(images: Images, cache: kdcache.Cache) -> None:
    data = kdcache.with_ids(images, cache=cache)
    loader = kdcache.attach(DataLoader(data, batch_size=3, num_workers=2, persistent_workers=True), cache, check="full")
    for epoch in (0, 3, 1):
        loader.set_epoch(epoch)
        assert {view for batch in loader for view in batch[2].view.tolist()} == {epoch}


def test_the_epoch_reaches_data_sets_within_others(images: Images, cache: kdcache.Cache) -> None:
    first, second = (Subset(kdcache.with_ids(images, cache=cache, view_order="epoch"), part) for part in ([3, 1], [5]))
    loader = kdcache.attach(DataLoader(ConcatDataset([first, second]), batch_size=3), cache, check="full")
    loader.set_epoch(2)
    assert [batch[2].view.tolist() for batch in loader] == [[2, 2, 2]]


def test_views_can_be_fixed_or_fewer(images: Images, cache: kdcache.Cache) -> None:
    assert {int(view) for batch in attached(images, cache, view=2) for view in batch[2].view} == {2}
    fewer = attached(images, cache, views=2)
    fewer.set_epoch(3)
    assert {int(view) for batch in fewer for view in batch[2].view} == {1}
    assert fewer.dataset.views == (0, 1)


def test_ids_without_a_view_are_refused_beside_several_views(images: Images, cache: kdcache.Cache) -> None:
    message = r"c holds 4 views, and the ids do not say which .*with_ids\(dataset, cache=cache\), with augment="
    with pytest.raises(UsageError, match=message):
        kdcache.attach(DataLoader(kdcache.with_ids(images)), cache)
    with pytest.raises(UsageError, match=message):
        list(kdcache.attach([{"x": torch.zeros(2, 3), "sample_id": [0, 1]}], cache))


def test_a_loader_that_replays_by_itself_says_its_view(images: Images, cache: kdcache.Cache) -> None:
    replay = named("shift,noise", seed=3)
    batches = [{"x": torch.stack([replay(images[n][0], n, 2) for n in (4, 1)]), "sample_id": [4, 1]}]
    ((_, teacher),) = [tuple(batch.values()) for batch in kdcache.attach(batches, cache, view=2, check="full")]
    assert teacher.view.tolist() == [2, 2]
    with pytest.raises(MismatchError, match="sample 4"):
        list(kdcache.attach(batches, cache, view=3, check="full"))
    with pytest.raises(MismatchError, match=r"views \[0, 1, 2, 3\], not 4"):
        kdcache.attach(batches, cache, view=4)


def test_a_view_that_was_not_replayed_is_noticed(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "one", images, named("shift"), (0,))
    loader = DataLoader(kdcache.with_ids(images), batch_size=12)
    with pytest.raises(MismatchError, match="its input"):
        list(kdcache.attach(loader, cache))
    assert len(list(kdcache.attach(loader, cache, check="ids"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augment": "shift,noise", "views": 2, "seed": 4},
            "with seed 3, and augment= is 'shift2,noise0.1' with seed 4",
        ),
        ({"augment": "shift", "views": 2, "seed": 3}, "augment= is 'shift2' with seed 3"),
        ({"augment": "shift,noise", "views": 5, "seed": 3}, r"gives the views \[0, 1, 2, 3, 4\], and c has the views"),
        ({"augment": "shift,noise", "seed": 3}, "gives a new view in each epoch, and c has the views"),
    ],
)
def test_views_of_another_making_are_refused_before_training(
    images: Images, cache: kdcache.Cache, options: Any, message: str
) -> None:
    with pytest.raises(MismatchError, match=message):
        kdcache.attach(DataLoader(Subset(kdcache.with_ids(images, **options), [1, 2])), cache)


def test_views_without_the_cache_at_hand_can_be_attached_to_it(images: Images, cache: kdcache.Cache) -> None:
    data = kdcache.with_ids(images, augment="shift,noise", views=3, seed=3)
    data.set_epoch(2)
    ((_, _, teacher),) = kdcache.attach(DataLoader(data, batch_size=12), cache, check="full")
    assert teacher.view.tolist() == [2] * 12


def test_ids_of_views_that_the_cache_lacks_are_refused_in_their_batch(cache: kdcache.Cache) -> None:
    batch = (torch.zeros(2, 3), SampleIds(np.array([0, 1]), np.array([1, 9])))
    with pytest.raises(MismatchError, match=r"in view 9, and c has the views \[0, 1, 2, 3\]"):
        list(kdcache.attach([batch], cache, check="ids"))
    with pytest.raises(MismatchError, match=r"told that all batches are in view 1, .* name the views \[1, 9\]"):
        list(kdcache.attach([batch], cache, check="ids", view=1))


def test_missing_samples_are_taken_out_with_their_views(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, named("noise,mixup1"), samples=[1, 4, 7])
    data = kdcache.with_ids(images, cache=cache, view_order="random")
    loader = kdcache.attach(DataLoader(data, batch_size=6), cache, missing="skip", check="full")
    batches = list(loader)
    assert [batch[2].sample_id.tolist() for batch in batches] == [[1, 4], [7]]
    assert [len(batch[1].first) for batch in batches] == [2, 1]


def test_a_transform_of_ones_own_has_to_be_given(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, replayable(darker, seed=4))
    with pytest.raises(UsageError, match="code of its maker"):
        kdcache.with_ids(images, cache=cache)
    loader = attached(images, cache, augment=darker)
    loader.set_epoch(1)
    assert len(list(loader)) == 3


def test_views_without_a_pipeline_are_refused(images: Images) -> None:
    for options in ({"view": 0}, {"views": 2}, {"view_order": "random"}):
        with pytest.raises(UsageError, match="there is none: give augment="):
            kdcache.with_ids(images, **options)  # type: ignore[arg-type]


def test_without_a_cache_each_epoch_has_a_view_of_its_own(images: Images) -> None:
    data = kdcache.with_ids(images, augment="shift,mixup1", view_order="epoch", seed=5)
    seen = []
    for epoch in (0, 9, 0):
        data.set_epoch(epoch)
        x, labels, sample_ids = next(iter(DataLoader(data, batch_size=12)))
        assert sample_ids.views.tolist() == [epoch] * 12
        assert kdcache.losses.kd_loss(torch.zeros(12, 5), None, labels, alpha=0.0, temperature=1.0) > 0
        seen.append(x)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_items_as_they_are_say_nothing_of_a_view(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,))
    data = kdcache.with_ids(images, cache=cache)
    assert data[3][2].view is None
    assert data.views is None
    data.set_epoch(3)
    assert len(list(kdcache.attach(DataLoader(data, batch_size=5), cache, check="full"))) == 3
