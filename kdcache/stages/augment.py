"""`--augment`: a pipeline that ships with kdcache, by its name, or `module:factory` for a transform of one's own."""

from __future__ import annotations

from kdcache.errors import UsageError
from kdcache.stages.specs import SpecKind, call_factory, describe
from kdcache.train.cache_views import Augment

AUGMENT = SpecKind("augment", {})


def load_augment(text: str) -> Augment:
    """What an `--augment` stands for: the name of a pipeline as it is, or what the factory returns.

    Args:
        text: "crop4,hflip", or "module:factory", which is imported and called.

    Raises:
        UsageError: no such module or factory, or it returned nothing that can be called.
        KDCacheError: the module or the factory raised.

    >>> load_augment("shift2,noise0.1")
    'shift2,noise0.1'
    """
    if ":" not in text:
        return text
    spec = AUGMENT.parse(text)
    transform = call_factory(spec, AUGMENT)
    if not callable(transform):
        raise UsageError(
            f"{spec.rest} returned {describe(transform)}; expected a transform, which is called with an input, or a "
            "kdcache.views.Replay"
        )
    found: Augment = transform
    return found
