"""Healing a folder that grew and then lost shards, in turns: launches that are killed, while further shards go."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from kill_growth import AFTER, BEFORE, WORLD_SIZES, Tally, launch
from precompute_runs import contents

from kdcache.store.folder import read_manifest


def kill_healing(dumps: Any, folder: Path, *, kills: int) -> Tally:
    """Kills at least so many processes of launches of each size; the folder must end as it was, root and predecessor.

    One folder is healed again and again, so that what a kill leaves behind is there in the next turn.
    """
    rng, tally, out = random.Random(kills), Tally(), folder / "healed"
    dumps.here(out, **BEFORE)
    first = read_manifest(out).root
    dumps.here(out, **AFTER)
    whole = contents(out)
    assert read_manifest(out).predecessor == first
    while min(tally.kills[n] for n in WORLD_SIZES) < kills:
        _lose(out, rng)
        while not launch(dumps, out, rng, tally, kills):
            if rng.random() < 0.5:
                _lose(out, rng)
        assert contents(out) == whole
        tally.caches += 1
    return tally


def _lose(out: Path, rng: random.Random) -> None:
    """Removes one to three shards."""
    there = sorted((out / "shards").glob("*.h5"))
    for path in rng.sample(there, min(len(there), rng.randint(1, 3))):
        path.unlink()
