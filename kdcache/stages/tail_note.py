"""What a run on top-k rows is told first: how much of the teacher lies outside the kept classes, and how surely."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache.format.topk import TopK
from kdcache.store.cache import Cache
from kdcache.train.sparse_metrics import captured_mass

_SAMPLE_ROWS = 1024


def tail_facts(cache: Cache | None, temperature: float, *, seed: int = 0) -> dict[str, Any] | None:
    """`mass` and `error` of the tail at a temperature, means over up to 1,024 rows; None where all logits are kept.

    Args:
        cache: of the run.
        temperature: that the run begins with.
        seed: of the rows.

    Raises:
        CorruptCacheError, IncompleteCacheError: of a row or its shard.
    """
    if cache is None or not isinstance(cache.encoding, TopK) or cache.encoding.has_all_logits:
        return None
    chosen = np.random.default_rng(seed).choice(len(cache), min(_SAMPLE_ROWS, len(cache)), replace=False)
    found = captured_mass(cache.gather(np.sort(chosen)).tensors(), temperature)
    error = 0.0 if found.error is None else float(found.error.mean())
    return {"temperature": temperature, "mass": 1 - float(found.value.mean()), "error": error}


def tail_line(cache: Cache | None, facts: dict[str, Any] | None) -> list[str]:
    """The line that is printed, if any."""
    if cache is None or facts is None:
        return []
    stored = ", ".join(t if isinstance(t, str) else f"{t:g}" for t in cache.encoding.to_json()["temperatures"])
    known = f"known to within ± {facts['error']:.2g}, since only {stored} are stored" if facts["error"] else "exact"
    return [
        f"top-k rows: {100 * facts['mass']:.3g} % of the teacher's probability at T = {facts['temperature']:g} lies in "
        f"one bucket of the classes that were not kept ({known})"
    ]
