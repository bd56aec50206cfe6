"""Which caches a run is given, each with the weight of its teacher: PATH or PATH=WEIGHT, once or several times."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, final

from kdcache.errors import UsageError
from kdcache.store import posix
from kdcache.store.cache import Cache

if TYPE_CHECKING:
    from kdcache.stages.distill_options import DistillOptions

CachePath: TypeAlias = str | os.PathLike[str] | Cache
Caches: TypeAlias = CachePath | Sequence[CachePath]


@final
@dataclass(frozen=True, eq=False)
class AskedCache:
    """A cache that a run is given.

    Attributes:
        cache: open, or where it lies.
        weight: of its teacher among several, above 0.
    """

    cache: CachePath
    weight: float = 1.0

    @property
    def name(self) -> str:
        """For messages: its last name, without a folder."""
        return self.cache.path.name if isinstance(self.cache, Cache) else Path(self.cache).name


def asked_caches(given: Caches | None, texts: Sequence[str], *, option: str) -> tuple[AskedCache, ...]:
    """What a call is given, or else the options.

    Args:
        given: one cache or several, open or by their paths; texts may have a weight.
        texts: of the option, each PATH or PATH=WEIGHT.
        option: for messages.

    Raises:
        UsageError: a weight that is no number above 0, or a cache given twice.
    """
    chosen: Sequence[CachePath] = texts
    if isinstance(given, (str, os.PathLike, Cache)):
        chosen = [given]
    elif given is not None:
        chosen = given
    found = tuple(parse_cache(one, option=option) if isinstance(one, str) else AskedCache(one) for one in chosen)
    places = [os.path.realpath(one.cache.path if isinstance(one.cache, Cache) else one.cache) for one in found]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UsageError(
                f"{option} names {found[number].name} twice: give each teacher's cache once, and its weight as "
                f"{option} PATH=WEIGHT"
            )
    return found


def check_apart(options: DistillOptions, asked: Sequence[AskedCache], asked_val: Sequence[AskedCache]) -> None:
    """Refuses to replace a folder from which the run itself reads: what is removed could not be read again.

    Raises:
        UsageError: --out may be replaced, and a cache or the first weights lie in it.
    """
    if options.out is None or not (options.overwrite or options.resume):
        return
    places: list[tuple[str, str | os.PathLike[str]]] = [
        (option, one.cache.path if isinstance(one.cache, Cache) else one.cache)
        for option, caches in (("--cache", asked), ("--val-cache", asked_val))
        for one in caches
    ]
    if options.init is not None and options.overwrite:
        places.append(("--init", options.init))
    folder = os.path.realpath(options.out)
    for option, path in places:
        if os.path.realpath(path).startswith(os.path.join(folder, "")) or os.path.realpath(path) == folder:
            raise UsageError(
                f"{option} {Path(path).name} lies in --out {options.out}, whose content a new run replaces: choose "
                f"another --out, or move what {option} names out of it"
            )


def parse_cache(text: str, *, option: str) -> AskedCache:
    """PATH or PATH=WEIGHT; a path that is there as it stands is one, whatever it looks like.

    Raises:
        UsageError: a weight that is no finite number above 0.
    """
    path, sign, number = text.rpartition("=")
    if not sign or posix.exists(Path(text)):
        return AskedCache(text)
    try:
        weight = float(number)
    except ValueError:
        if posix.exists(Path(path)):
            raise UsageError(f"{option} {text!r:.200}: a weight is a number above 0, found {number!r:.50}") from None
        return AskedCache(text)
    if not path or not 0 < weight < math.inf:
        raise UsageError(f"{option} {text!r:.200}: expected PATH=WEIGHT with a finite weight above 0")
    return AskedCache(path, weight)
