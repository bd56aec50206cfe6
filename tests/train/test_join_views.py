"""Students of a cache of views: pixels, row, labels and digest of an item are of one and the same view."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from view_caches import Images, logits_of, write_views

import kdcache
from kdcache.errors import CoverageError, MismatchError, UsageError
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.pipelines import named
from kdcache.train.replay import Replay
from kdcache.train.views import replayable

PIPELINES = ["shift,noise", "shift,mixup1", "noise,cutmix"]


def fits(batch: Any) -> None:
    """Every row is the teacher's answer to the very pixels beside it."""
    x, _, teacher = batch
    assert np.array_equal(teacher.dense().numpy(), np.stack([logits_of(value) for value in x]))


@pytest.fixture
def images() -> Images:
    return Images()


@pytest.mark.parametrize("text", PIPELINES)
def test_each_epoch_takes_its_view_and_rows_and_pixels_belong_together(
    images: Images, tmp_path: Path, text: str
) -> None:
    joined = kdcache.join(images, write_views(tmp_path / "c", images, named(text), (0, 2, 5)), check="full")
    assert joined.checked == "ids and labels, inputs (all)"
    loader = DataLoader(joined, batch_size=5, shuffle=True)
    for epoch in range(4):
        joined.set_epoch(epoch)
        for batch in loader:
            fits(batch)
            assert set(batch[2].view.tolist()) == {(0, 2, 5)[epoch % 3]}


@pytest.mark.parametrize("text", PIPELINES)
def test_a_random_view_of_each_access_is_consistent_too(images: Images, tmp_path: Path, text: str) -> None:
    cache = write_views(tmp_path / "c", images, named(text))
    for options in ({}, {"view_order": "random"}):
        joined = kdcache.join(images, cache, check="full", **options)  # type: ignore[arg-type]
        seen = set()
        for _ in range(4):
            for batch in DataLoader(joined, batch_size=4):
                fits(batch)
                seen |= set(batch[2].view.tolist())
        assert seen == {0, 1, 2, 3}


def test_an_order_by_epoch_raises_where_nobody_tells_the_epoch(images: Images, tmp_path: Path) -> None:
    joined = kdcache.join(images, write_views(tmp_path / "c", images, named("shift")), view_order="epoch")
    with pytest.raises(UsageError, match="nobody has told it"):
        joined[0]
    with pytest.raises(UsageError, match="nobody has told it"):
        next(iter(DataLoader(joined, num_workers=1)))
    joined.set_epoch(2)
    assert joined[0][2].rows.view.tolist() == [2]


def test_one_view_can_be_fixed_and_fewer_taken(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, named("shift"))
    fixed = kdcache.join(images, cache, view=3)
    assert fixed.views == (3,)
    fixed.set_epoch(1)
    assert fixed[4][2].rows.view.tolist() == [3]
    fewer = kdcache.join(images, cache, views=2)
    assert fewer.views == (0, 1)
    fewer.set_epoch(3)
    assert fewer[4][2].rows.view.tolist() == [1]
    with pytest.raises(MismatchError, match="5 views are asked for and c holds 4"):
        kdcache.join(images, cache, views=5)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_live_on_follow_the_epoch(images: Images, tmp_path: Path, workers: int) -> None:
    joined = kdcache.join(images, write_views(tmp_path / "c", images, named("shift,cutmix")), check="full")
    loader = DataLoader(joined, batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 3, 1):
        joined.set_epoch(epoch)
        batches = list(loader)
        assert {view for batch in batches for view in batch[2].view.tolist()} == {epoch}
        for batch in batches:
            fits(batch)


def test_the_students_transform_comes_after_the_comparison(images: Images, tmp_path: Path) -> None:
    def halve(image: torch.Tensor) -> torch.Tensor:
        return image[..., ::2, ::2] - 0.5

    cache = write_views(tmp_path / "c", images, named("shift"))
    plain = kdcache.join(images, cache, view=1, check="full")
    changed = kdcache.join(images, cache, view=1, check="full", transform=halve)
    for index in range(12):
        assert torch.equal(changed[index][0], halve(plain[index][0]))
        assert torch.equal(changed[index][2].dense(), plain[index][2].dense())
    items = kdcache.join(images, write_views(tmp_path / "items", images, None, (0,)), check="full", transform=halve)
    assert torch.equal(items[3][0], halve(images[3][0]))


def test_a_subset_in_any_order_sees_the_views_of_its_samples(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, named("shift,noise"))
    joined = kdcache.join(Subset(images, [7, 2, 9]), cache, view=2, check="full")
    for place, index in enumerate([7, 2, 9]):
        assert torch.equal(joined[place][0], kdcache.join(images, cache, view=2)[index][0])
        assert joined[place][2].sample_id == index
    with pytest.raises(CoverageError, match="mix each sample with one of its 12"):
        kdcache.join(Subset(images, [7, 2]), write_views(tmp_path / "m", images, named("mixup")))


def test_partners_are_those_of_the_caches_order_not_of_the_data_sets(images: Images, tmp_path: Path) -> None:
    order = [9, 4, 7, 0, 2, 11]
    cache = write_views(tmp_path / "c", images, named("shift,mixup1"), samples=order)
    joined = kdcache.join(images, cache, missing="skip", check="full")
    assert joined.sample_ids.tolist() == sorted(order)
    for epoch in range(4):
        joined.set_epoch(epoch)
        fits(next(iter(DataLoader(joined, batch_size=6))))


def test_a_mixed_view_brings_both_labels(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, named("shift,cutmix"))
    joined = kdcache.join(images, cache, view=1)
    _, labels, teacher = next(iter(DataLoader(joined, batch_size=12)))
    assert isinstance(labels, MixedLabels)
    assert labels.first.tolist() == images.labels == teacher.label.tolist()
    assert labels.second.tolist() == teacher.label_b.tolist()
    assert torch.equal(labels.ratio, teacher.mix_ratio)
    student = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    loss = kdcache.losses.kd_loss(student, teacher, labels, alpha=0.0, temperature=1.0, reduction="none")
    expected = kdcache.losses.cross_entropy(student, labels.first) * labels.ratio
    expected += kdcache.losses.cross_entropy(student, labels.second) * (1 - labels.ratio)
    torch.testing.assert_close(loss, expected)


def test_samples_that_the_cache_lacks_learn_both_labels_of_their_mixed_view(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, named("mixup1"), samples=range(8))
    _, labels, teacher = next(iter(DataLoader(kdcache.join(images, cache, missing="ce", view=0), batch_size=12)))
    assert teacher.has_teacher.tolist() == [True] * 8 + [False] * 4
    assert (labels.second >= 0).all()
    assert (labels.ratio[8:] < 1).all()


def test_a_partner_of_another_label_is_noticed_at_every_level(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, named("mixup1"), samples=range(8), digests=False)
    stored = cache.gather(range(8))
    assert stored.label_b is not None
    at = next(n for n in range(8) if stored.label_b[n] != n % 5)
    images.labels[int(stored.label_b[at])] = images.labels[int(stored.label_b[at]) + 5] = 9
    joined = kdcache.join(Subset(images, range(8)), cache, view=0, check="ids", sample_ids=np.arange(8))
    with pytest.raises(MismatchError, match=rf"sample {at} is mixed with one of label 9 in view 0 here and of label"):
        joined[at]


def test_a_transform_of_ones_own_has_to_be_given(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, replayable(darker, seed=4))
    with pytest.raises(UsageError, match="code of its maker"):
        kdcache.join(images, cache)
    with pytest.raises(MismatchError, match="augment= is custom"):
        kdcache.join(images, cache, augment=lambda image: image)
    fits(next(iter(DataLoader(kdcache.join(images, cache, augment=darker, check="full"), batch_size=12))))


def darker(image: torch.Tensor) -> torch.Tensor:
    return image * torch.rand(())


def test_a_pipeline_that_draws_otherwise_than_in_the_dump_is_caught(images: Images, tmp_path: Path) -> None:
    def once_more(image: torch.Tensor) -> torch.Tensor:
        torch.rand(())
        return darker(image)

    cache = write_views(tmp_path / "c", images, Replay(darker, seed=4, name="darker"))
    joined = kdcache.join(images, cache, augment=Replay(once_more, seed=4, name="darker"))
    with pytest.raises(MismatchError, match="sample 0"):
        joined[0]


def test_a_cache_of_one_augmented_view_is_replayed(images: Images, tmp_path: Path) -> None:
    joined = kdcache.join(images, write_views(tmp_path / "c", images, named("shift"), (6,)), check="full")
    assert joined.views == (6,)
    fits(next(iter(DataLoader(joined, batch_size=12))))


def test_text_ids_seed_views_too(images: Images, tmp_path: Path) -> None:
    names = [f"class/{index}.png" for index in range(12)]
    cache = write_views(tmp_path / "c", images, named("noise,mixup"), sample_ids=names)
    fits(next(iter(DataLoader(kdcache.join(images, cache, sample_ids=names, check="full"), batch_size=12))))


def test_a_joined_set_of_views_pickles_whole(images: Images, tmp_path: Path) -> None:
    joined = kdcache.join(images, write_views(tmp_path / "c", images, named("shift,mixup")), view_order="epoch")
    joined.set_epoch(2)
    copy = pickle.loads(pickle.dumps(joined))
    assert torch.equal(copy[3][0], joined[3][0])
    assert copy[3][2].rows.view.tolist() == [2]
