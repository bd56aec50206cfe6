"""The views of a dump: which pipeline makes them, and whether it can be replayed."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache.errors import UsageError
from kdcache.stages.augment import load_augment
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.train.cache_views import Augment, as_replay
from kdcache.train.items import first_input, label_of
from kdcache.train.replay import Replay, check_replay

_PROBED_SAMPLES, _PROBED_VIEWS = 4, 2


def pipeline_of_dump(augment: Augment | None, options: PrecomputeOptions) -> Replay | None:
    """What makes the views; an object given as `augment` takes the place of the option.

    Raises:
        UsageError: several views without a pipeline, which would all be the same; or an unknown one.
        MissingExtraError: it needs a package that is missing.
        KDCacheError: the code that the option names raised.
    """
    if augment is None and options.augment is not None:
        augment = load_augment(options.augment)
    if augment is not None:
        return as_replay(augment, seed=options.seed)
    if options.views > 1:
        raise UsageError(
            f"--views {options.views} without --augment would store the same rows {options.views} times: give a "
            "pipeline, for example --augment crop4,hflip"
        )
    return None


def check_pipeline(replay: Replay, dataset: Any, sample_ids: np.ndarray, views: int) -> None:
    """Draws a few samples twice, before the teacher is loaded.

    Raises:
        DataError: the pipeline fails, or is not replayed; the message names the transform.
        UsageError: MixUp or CutMix on data without labels.
    """
    places = np.unique(np.linspace(0, len(sample_ids) - 1, _PROBED_SAMPLES).round().astype(np.int64)).tolist()
    items = [dataset[place] for place in places]
    if replay.mix is not None and any(label_of(item) is None for item in items):
        raise UsageError(
            f"{replay.mix.kind} mixes the labels of two samples, and the data has none: leave it out of --augment"
        )
    samples = [(first_input(item), sample_ids[place].item()) for item, place in zip(items, places, strict=True)]
    check_replay(replay, samples, range(min(views, _PROBED_VIEWS)))
