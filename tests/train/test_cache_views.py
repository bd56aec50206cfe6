"""Which pipeline and which views a student of a cache gets, and what is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from view_caches import Images, write_views

import kdcache
from kdcache.errors import CorruptCacheError, MismatchError, UsageError
from kdcache.train.cache_views import RecordedPipeline, as_replay, choice_of, pipeline_of, recorded_pipeline
from kdcache.train.mixing import Mix
from kdcache.train.pipelines import named
from kdcache.train.replay import Replay
from kdcache.train.views import replayable


def darker(image: torch.Tensor) -> torch.Tensor:
    return image * torch.rand(())


def brighter(image: torch.Tensor) -> torch.Tensor:
    return image + torch.rand(())


def cache_of(tmp_path: Path, replay: Replay | None, **options: Any) -> kdcache.Cache:
    return write_views(tmp_path / "teacher", Images(6), replay, **{"views": (0, 1), **options})


def test_a_named_pipeline_is_built_from_the_provenance(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, named("shift3,noise,mixup0.4", seed=8))
    assert recorded_pipeline(cache) == RecordedPipeline("shift3,noise0.1,mixup0.4", True, 8, "mixup0.4")
    found = pipeline_of(cache)
    assert found is not None
    assert found.describe() == named("shift3,noise,mixup0.4", seed=8).describe()


def test_a_dump_of_the_items_has_none_and_takes_none(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, None, views=(0,))
    assert pipeline_of(cache) is None
    with pytest.raises(MismatchError, match="dumped from the items as they are"):
        pipeline_of(cache, "shift")


def test_code_never_comes_out_of_a_cache(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, replayable(darker, seed=8))
    with pytest.raises(UsageError, match=r"the pipeline custom '.*darker' with seed 8, which is code .* augment="):
        pipeline_of(cache)
    forged = cache_of(tmp_path / "forged", Replay(darker, seed=1, name="os:system", is_named=True))
    with pytest.raises(MismatchError, match=r"dumped with 'os:system', which this version of kdcache does not have"):
        pipeline_of(forged)


def test_a_transform_of_ones_own_takes_seed_and_mix_of_the_cache(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, replayable(darker, seed=8, mix=Mix("cutmix", 0.7)))
    for augment in (darker, replayable(darker, seed=8, mix=Mix("cutmix", 0.7))):
        found = pipeline_of(cache, augment)
        assert found is not None
        assert (found.transform, found.seed, found.mix) == (darker, 8, Mix("cutmix", 0.7))


def test_the_same_pipeline_may_be_named_in_other_words(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, named("shift,noise", seed=8))
    assert pipeline_of(cache, "shift2, noise0.10") is not None
    assert pipeline_of(cache, named("shift,noise0.1", seed=8)) is not None


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("shift3", r"the pipeline 'shift2' with seed 8, and augment= is 'shift3' with seed 8.*Leave augment= out"),
        (named("shift", seed=9), r"'shift2' with seed 8, and augment= is 'shift2' with seed 9"),
        ("shift,mixup", "augment= is 'shift2,mixup0.2' with seed 8"),
        (darker, r"augment= is custom '.*darker' with seed 8"),
        (replayable(darker, seed=8, name="shift"), "augment= is custom 'shift' with seed 8"),
    ],
)
def test_another_pipeline_or_seed_is_refused_with_both_names(tmp_path: Path, augment: Any, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        pipeline_of(cache_of(tmp_path, named("shift", seed=8)), augment)


def test_another_transform_of_ones_own_is_refused(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, replayable(darker, seed=8))
    with pytest.raises(MismatchError, match=r"custom '.*darker' with seed 8, and augment= is custom '.*brighter'"):
        pipeline_of(cache, brighter)
    mixing = replayable(darker, seed=8, mix=Mix("mixup", 0.2))
    with pytest.raises(MismatchError, match=r"darker' and mixup0\.2 with seed 8"):
        pipeline_of(cache, mixing)


def test_other_versions_of_the_libraries_are_no_reason_to_refuse(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, named("shift", seed=8))
    cache.provenance["views"]["versions"] = {"torch": "1.0"}
    assert pipeline_of(cache) is not None


@pytest.mark.parametrize(
    "views",
    [
        [],
        "shift",
        {"augment": "shift"},
        {"augment": 3, "named": True, "seed": 0, "mix": None},
        {"augment": "shift", "named": 1, "seed": 0, "mix": None},
        {"augment": "shift", "named": True, "seed": -1, "mix": None},
        {"augment": "shift", "named": True, "seed": True, "mix": None},
        {"augment": "shift", "named": True, "seed": 2**63, "mix": None},
        {"augment": "shift", "named": True, "seed": 0, "mix": 7},
        {"augment": "shift", "named": True, "seed": 0, "mix": "mixup0.2"},
    ],
)
def test_a_provenance_that_says_no_pipeline_is_refused(tmp_path: Path, views: Any) -> None:
    cache = cache_of(tmp_path, named("shift", seed=8))
    cache.provenance["views"] = views
    with pytest.raises(CorruptCacheError, match=r"provenance\.views|does not mix"):
        pipeline_of(cache)


def test_a_mix_or_a_pipeline_of_the_future_is_named(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, replayable(darker, seed=8))
    for mix in ("fmix1", "shift", "mixup0"):
        cache.provenance["views"]["mix"] = mix
        with pytest.raises(MismatchError, match=f"dumped with '{mix}', which this version"):
            pipeline_of(cache, darker)
    cache.provenance["views"] = {"augment": "warp3", "named": True, "seed": 8, "mix": None}
    with pytest.raises(MismatchError, match="dumped with 'warp3', which this version"):
        pipeline_of(cache)
    with pytest.raises(MismatchError, match="the pipeline 'warp3' with seed 8, and augment= is 'shift2'"):
        pipeline_of(cache, "shift")


def test_a_student_takes_all_views_the_first_or_one(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, named("shift"), views=(0, 2, 5))
    assert choice_of(cache).views == (0, 2, 5)
    assert choice_of(cache, views=2).views == (0, 2)
    assert choice_of(cache, view=5).views == (5,)


def test_views_that_the_cache_does_not_hold_are_refused_with_both_numbers(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, named("shift"), views=(0, 2, 5))
    with pytest.raises(MismatchError, match=r"4 views are asked for and teacher holds 3: .*--views 4"):
        choice_of(cache, views=4)
    with pytest.raises(MismatchError, match=r"teacher has the views \[0, 2, 5\], not 1"):
        choice_of(cache, view=1)
    with pytest.raises(UsageError, match="must be 1 to 65536, found 0"):
        choice_of(cache, views=0)
    with pytest.raises(UsageError, match="give one or the other"):
        choice_of(cache, view=0, views=1)


def test_several_views_of_unknown_making_are_refused_but_one_can_be_chosen(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, None, views=(0, 1))
    with pytest.raises(UsageError, match="holds 2 views and does not say how they were made"):
        choice_of(cache)
    assert choice_of(cache, view=1).views == (1,)


def test_code_is_given_as_an_object_not_as_text() -> None:
    with pytest.raises(UsageError, match="names code: pass the transform itself"):
        as_replay("os:system", seed=0)
