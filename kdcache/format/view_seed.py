"""The seed of a view: from it come all random draws that turn a sample into view v of it.

A function of the cache's seed, the sample's id and the view's number alone, so that the dump and every student, in any
process and any order, draw the same.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

from kdcache.errors import UsageError
from kdcache.format.schema import MAX_VIEWS

MAX_SEED = 2**63 - 1


def view_seed(
    seed: int,
    sample_id: int | bytes | np.integer | np.bytes_,
    view: int,
    *,
    purpose: Literal["view", "mix", "choice"] = "view",
) -> bytes:
    """32 bytes: BLAKE2b of the cache's seed, the view and the id, personalised with what they are for.

    The hashed bytes are the seed as int64, the view as uint32 (both little-endian), then `i` and the id as int64, or
    `s` and the bytes of the id.

    Args:
        seed: of the cache, 0 to 2**63 - 1.
        sample_id: as the cache stores it.
        view: 0 to 2**32 - 1; caches hold views below 65,536, a student without a cache draws a new one each epoch.
        purpose: "view" for the augmentation, "mix" for partner and ratio of MixUp and CutMix, "choice" for which view
            an access takes at random.

    Raises:
        UsageError: a seed or a view out of range.

    >>> view_seed(0, 7, 3).hex()[:16]
    '742968e099175385'
    """
    if not 0 <= seed <= MAX_SEED or not 0 <= view < 2**32:
        raise UsageError(f"a seed is 0 to 2**63 - 1 and a view 0 to 2**32 - 1, found {seed} and {view}")
    if isinstance(sample_id, (bytes, np.bytes_)):
        name = b"s" + bytes(sample_id)
    else:
        name = b"i" + int(sample_id).to_bytes(8, "little", signed=True)
    head = seed.to_bytes(8, "little") + view.to_bytes(4, "little")
    return hashlib.blake2b(head + name, digest_size=32, person=f"kdcache {purpose}".encode()).digest()


def check_views(count: int, *, name: str = "--views") -> int:
    """The number of views of a dump.

    Raises:
        UsageError: below 1 or above 65,536.
    """
    if not 1 <= count <= MAX_VIEWS:
        raise UsageError(f"{name} must be 1 to {MAX_VIEWS}, found {count}")
    return count
