"""Which pipeline a student of a cache replays, and which of its views it takes.

The cache's provenance names the pipeline of an augmented dump. One that ships with kdcache is built from that name; any
other is code, which never comes out of a cache: the student gives it again, and it must be the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from kdcache.errors import CorruptCacheError, MismatchError, UsageError
from kdcache.format.view_seed import MAX_SEED, check_views
from kdcache.store.cache import Cache
from kdcache.train.mixing import Mix
from kdcache.train.pipeline_text import canonical
from kdcache.train.pipelines import named
from kdcache.train.replay import Replay
from kdcache.train.view_order import VIEWS, ViewChoice, ViewOrder, check_alone
from kdcache.train.views import replayable

Augment: TypeAlias = str | Replay | Callable[..., Any]


@final
@dataclass(frozen=True)
class RecordedPipeline:
    """What the provenance says of a pipeline: its text, whether kdcache ships it, the cache's seed, and the mix."""

    text: str
    is_named: bool
    seed: int
    mix: str | None

    def __str__(self) -> str:
        mixed = f" and {self.mix}" if self.mix is not None and not self.is_named else ""
        return f"{'' if self.is_named else 'custom '}{self.text!r:.300}{mixed:.50} with seed {self.seed}"

    @property
    def key(self) -> tuple[str, bool, int, str | None]:
        """Equal for equal pipelines."""
        text = self.text
        if self.is_named:
            with contextlib.suppress(UsageError):  # of a newer kdcache
                text = canonical(text)
        return text, self.is_named, self.seed, self.mix


def recorded_pipeline(cache: Cache) -> RecordedPipeline | None:
    """The pipeline of an augmented dump; None for a dump of the items as they are.

    Raises:
        CorruptCacheError: the provenance has views that say no pipeline.
    """
    value = cache.provenance.get("views")
    if value is None:
        return None
    text, is_named, seed, mix = (
        (value.get(key) for key in ("augment", "named", "seed", "mix")) if isinstance(value, dict) else [None] * 4
    )
    if (
        not isinstance(text, str)
        or type(is_named) is not bool
        or type(seed) is not int
        or not 0 <= seed <= MAX_SEED
        or not (mix is None or isinstance(mix, str))
    ):
        raise CorruptCacheError(
            f"{cache.path.name}: provenance.views is {value!r:.200}, expected augment (text), named (true or false), "
            "seed (a number) and mix (text or null)"
        )
    return RecordedPipeline(text, is_named, seed, mix)


def pipeline_of(cache: Cache, augment: Augment | None = None) -> Replay | None:
    """What turns a data set's items into the views that the cache was dumped from; None where they are the items.

    Args:
        cache: open.
        augment: a pipeline by name, a transform, which takes seed and mix of the cache, or a `Replay`; None builds
            the one that the cache names.

    Raises:
        UsageError: the cache's pipeline is code, and `augment` does not give it; or several views of unknown making.
        MismatchError: `augment` is another pipeline than the cache's, has another seed, or the cache has none.
        MissingExtraError: the pipeline needs a package that is missing.
    """
    recorded, name = recorded_pipeline(cache), cache.path.name
    if recorded is None:
        if augment is not None:
            raise MismatchError(
                f"{name} was dumped from the items as they are, so augment= would show the student other inputs than "
                "its teacher saw: leave it out (--augment), or dump with the same augmentation"
            )
        return None
    if augment is None:
        if not recorded.is_named:
            raise UsageError(
                f"{name} was dumped with the pipeline {recorded}, which is code of its maker's: give the same "
                "transform again as augment= (--augment module:factory)"
            )
        return _built(recorded, name)
    has_own_mix = isinstance(augment, (str, Replay))
    replay = as_replay(augment, seed=recorded.seed, mix=None if has_own_mix else _recorded_mix(recorded, name))
    given = of_replay(replay)
    if given.key != recorded.key:
        raise MismatchError(
            f"{name} was dumped with the pipeline {recorded}, and augment= is {given}: the student would see other "
            "views than its teacher. "
            + ("Leave augment= out (--augment)" if recorded.is_named else "Give the transform of the dump")
            + ", or dump again with this one"
        )
    return replay


def as_replay(augment: Augment, *, seed: int, mix: Mix | None = None) -> Replay:
    """A pipeline by its name, a transform made replayable, or the `Replay` that was given.

    Raises:
        UsageError: an unknown name, or not callable.
        MissingExtraError: the pipeline needs a package that is missing.
    """
    if isinstance(augment, Replay):
        return augment
    if isinstance(augment, str):
        if ":" in augment:
            raise UsageError(f"augment={augment!r} names code: pass the transform itself")
        return named(augment, seed=seed)
    return replayable(augment, seed=seed, mix=mix)


def of_replay(replay: Replay) -> RecordedPipeline:
    """A pipeline as its dump would record it."""
    mix = None if replay.mix is None else replay.mix.name
    return RecordedPipeline(replay.name, replay.is_named, replay.seed, mix)


def choice_of(
    cache: Cache,
    *,
    view: int | None = None,
    views: int | None = None,
    view_order: ViewOrder | None = None,
    seed: int | None = None,
) -> ViewChoice:
    """How a student chooses among the views of a cache.

    Args:
        cache: open.
        view: this one alone.
        views: the first so many; None for all.
        view_order: see `ViewChoice`.
        seed: see `ViewChoice`.

    Raises:
        UsageError: a view beside a number of views or an order, or fewer than one view.
        MismatchError: the cache does not hold them; the message names both numbers.
    """
    if view is None:
        return ViewChoice(_first_views(cache, views), view_order, seed=seed)
    check_alone(views, view_order)
    if view not in cache.views:
        raise MismatchError(f"{cache.path.name} has the views {list(cache.views)}, not {view}")
    return ViewChoice((view,), None)


def _first_views(cache: Cache, views: int | None) -> tuple[int, ...]:
    held, name = cache.views, cache.path.name
    if views is not None:
        check_views(views, name=VIEWS)
    if views is not None and views > len(held):
        by = "" if cache.catalog.header is None else f", on a folder that `kdcache merge {name} FOLDER/` makes of it"
        raise MismatchError(
            f"{views} views are asked for and {name} holds {len(held)}: ask for fewer (--views), or add views to it "
            f"with the command of its dump and --views {views}{by}"
        )
    if recorded_pipeline(cache) is None and len(held) > 1 and views != 1:
        raise UsageError(
            f"{name} holds {len(held)} views and does not say how they were made, so that the student cannot be shown "
            "them: choose one with view="
        )
    return held[:views]


def _built(recorded: RecordedPipeline, name: str) -> Replay:
    """The pipeline that kdcache ships under the recorded name."""
    try:
        replay = named(recorded.text, seed=recorded.seed)
    except UsageError:
        raise _unknown(recorded.text, name) from None
    if of_replay(replay).mix != recorded.mix:
        raise CorruptCacheError(f"{name}: the pipeline {recorded.text!r:.200} does not mix by {recorded.mix!r:.50}")
    return replay


def _recorded_mix(recorded: RecordedPipeline, name: str) -> Mix | None:
    """For a transform that is given without its mix."""
    if recorded.mix is None:
        return None
    try:
        mix = named(recorded.mix).mix
    except UsageError:
        mix = None
    if mix is None:
        raise _unknown(recorded.mix, name)
    return mix


def _unknown(text: str, name: str) -> MismatchError:
    return MismatchError(
        f"{name} was dumped with {text!r:.200}, which this version of kdcache does not have: upgrade kdcache"
    )
