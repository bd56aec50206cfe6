"""The views in which a run sees its training data: those of the cache, or of a run without one.

With a cache the pipeline is that of its dump. Without one the inputs are augmented all the same, in a new view each
epoch or in so many fixed ones, drawn as a cache of that seed would have them: the controls of a comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from kdcache.errors import UsageError
from kdcache.stages.augment import load_augment
from kdcache.stages.distill_options import DistillOptions
from kdcache.store.cache import Cache
from kdcache.train.cache_views import Augment, as_replay, choice_of, pipeline_of, recorded_pipeline
from kdcache.train.items import first_input
from kdcache.train.replay import Replay, check_alike, check_replay
from kdcache.train.view_order import ViewOrder, own_choice
from kdcache.train.viewed import ViewedItems
from kdcache.train.with_ids import IdentifiedDataset

_PROBED_SAMPLES, _PROBED_VIEWS = 4, 2


@dataclass(frozen=True, eq=False)
class ViewSettings:
    """What the options say of views.

    Attributes:
        augment: a pipeline by name, a transform or a `Replay`; None for that of the cache.
        views: how many; None for all of the cache, without one for a new view each epoch.
        order: by epoch or at random.
        seed: of the views without a cache; None for 0.
        run_seed: of the run, for the random order.
    """

    augment: Augment | None
    views: int | None
    order: ViewOrder
    seed: int | None
    run_seed: int


def view_settings(options: DistillOptions, augment: Augment | None) -> ViewSettings:
    """The settings of a run; an object given as `augment` takes the place of the option.

    Raises:
        UsageError: the option names code that is not there.
        KDCacheError: that code raised.
    """
    if augment is None and options.augment is not None:
        augment = load_augment(options.augment)
    order = cast("ViewOrder", options.view_order)
    return ViewSettings(augment, options.views, order, options.view_seed, options.seed)


def in_views(dataset: Any, sample_ids: np.ndarray, cache: Cache | None, settings: ViewSettings) -> IdentifiedDataset:
    """The data set with ids, and where there is a pipeline with its items in views; epoch 0 is told.

    Args:
        dataset: map-style.
        sample_ids: (N,) of its items.
        cache: of the teacher's rows, if any.
        settings: which views.

    Raises:
        UsageError: a seed beside a cache, views without a pipeline, or the pipeline of the dump has to be given.
        MismatchError: another pipeline than the dump's, or more views than the cache holds.
        CoverageError: MixUp or CutMix need samples that the data set lacks.
        DataError: the pipeline is not replayed, or its views do not stack to batches.
    """
    order, run_seed = settings.order, settings.run_seed
    if cache is not None:
        if settings.seed is not None:
            raise UsageError("--view-seed is for runs without a cache: the views of a cache have the seed of its dump")
        replay = pipeline_of(cache, settings.augment)
        choice = choice_of(cache, views=settings.views, view_order=order, seed=run_seed)
        mixes = replay is not None and replay.mix is not None
        partner_ids = cache.sample_ids if mixes else None
    else:
        replay = None if settings.augment is None else as_replay(settings.augment, seed=settings.seed or 0)
        if replay is None and settings.views is not None:
            raise UsageError("--views without a cache needs a pipeline to make them: give --augment, or a cache")
        choice, partner_ids = own_choice(views=settings.views, view_order=order, seed=run_seed), None
    if replay is not None:
        _probe(replay, dataset, sample_ids, choice.views)
    has_views = replay is not None or (cache is not None and len(cache.views) > 1)
    items = ViewedItems(dataset, sample_ids, replay, partner_ids)
    identified = IdentifiedDataset(dataset, sample_ids, items, replay, choice if has_views else None)
    identified.set_epoch(0)
    return identified


def refuse_views(cache: Cache, *, name: str) -> None:
    """Refuses the cache of an augmented dump for data that are never augmented.

    Raises:
        UsageError: naming the pipeline.
    """
    recorded = recorded_pipeline(cache)
    if recorded is not None:
        raise UsageError(
            f"{cache.path.name} was dumped with the pipeline {recorded}, and the {name} data are never augmented: dump "
            "them without --augment"
        )


def describe_views(items: IdentifiedDataset | None, settings: ViewSettings) -> dict[str, Any] | None:
    """Pipeline, seed, views and order as plain values; None for inputs as they are."""
    if items is None or items.replay is None:
        return None
    described = {key: value for key, value in items.replay.describe().items() if key != "versions"}
    return {**described, "views": None if items.views is None else list(items.views), "order": settings.order}


def views_line(described: dict[str, Any], cache: Cache | None) -> str:
    """What `describe_views` says, for people, and how many views the cache holds where the run takes fewer."""
    chosen = described["views"]
    count = "a new view each epoch" if chosen is None else f"{len(chosen)} view(s)"
    if chosen is not None and cache is not None and len(cache.views) > len(chosen):
        count += f" of the {len(cache.views)} in {cache.path.name}"
    return f"inputs in views of {described['augment']} (seed {described['seed']}): {count}, {described['order']} order"


def _probe(replay: Replay, dataset: Any, sample_ids: np.ndarray, views: tuple[int, ...] | None) -> None:
    """Looks at a few samples in two views before the first step."""
    places = np.unique(np.linspace(0, len(sample_ids) - 1, _PROBED_SAMPLES).round().astype(np.int64)).tolist()
    samples = [(first_input(dataset[place]), sample_ids[place].item()) for place in places]
    chosen = (views or (0, 1))[:_PROBED_VIEWS]
    check_replay(replay, samples, chosen)
    check_alike(replay, samples, chosen)
