"""What a run on top-k rows is told first: how much of the teacher lies outside the kept classes, and how surely."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.errors import UsageError
from kdcache.format.topk import TopK
from kdcache.stages.distill_inputs import Source
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.loss_options import courses, loss_settings
from kdcache.store.cache import Cache
from kdcache.store.quality import sampled_rows
from kdcache.train.sparse_metrics import captured_mass
from kdcache.train.tail import DEFAULT_TAIL_TOLERANCE

_STEPS = 33  # of a schedule that are looked at


@dataclass(frozen=True)
class TailFacts:
    """Means over up to 1,024 rows.

    Attributes:
        temperature: T.
        mass: of the classes that were not kept.
        error: half the width of what it can be; 0 at a stored temperature.
    """

    temperature: float
    mass: float
    error: float


def tail_facts(cache: Cache, temperature: float) -> TailFacts:
    """Of a cache of top-k rows.

    Raises:
        CorruptCacheError, IncompleteCacheError: of a row or its shard.
    """
    found = captured_mass(sampled_rows(cache).tensors(), temperature)
    error = 0.0 if found.error is None else float(found.error.mean())
    return TailFacts(temperature, 1 - float(found.value.mean()), error)


def tail_lines(source: Source, options: DistillOptions) -> list[str]:
    """A line for each temperature that the losses of a run begin with, where its cache has top-k rows.

    A calibrated teacher is asked at T times the calibration's temperature.

    Raises:
        UsageError: a temperature, of the schedule or of a loss, whose tail is too vague.
        CorruptCacheError, IncompleteCacheError: of a row or its shard.
    """
    cache = source.cache
    if cache is None or not isinstance(cache.encoding, TopK) or cache.encoding.has_all_logits or options.hard_targets:
        return []
    divisor = 1.0 if source.calibration is None else source.calibration.calibration.temperature
    losses = [part.loss for part in loss_settings(options).losses if part.loss.name != "standardized_kd"]
    own = {own for loss in losses if (own := getattr(loss, "temperature", None)) is not None}
    begins = own | ({options.temperature} if any(loss.follows_run for loss in losses) else set())
    stored = ", ".join(t if isinstance(t, str) else f"{t:g}" for t in cache.encoding.temperatures)
    _refuse_vague(cache, [t * divisor for t in begins | _on_the_way(options)], options.tail_tolerance, stored)
    lines = []
    for facts in (tail_facts(cache, temperature * divisor) for temperature in sorted(begins)):
        known = f"known to within ± {facts.error:.2g}, since only {stored} are stored" if facts.error else "exact"
        lines.append(
            f"top-k rows: {100 * facts.mass:.3g} % of the teacher's probability at T = {facts.temperature:g} lies in "
            f"one bucket of the classes that were not kept ({known})"
        )
    return lines


def _on_the_way(options: DistillOptions) -> set[float]:
    """Temperatures of the schedule, where a loss follows it."""
    course = courses(options)[1]
    if course.end is None or not loss_settings(options).follows_run:
        return set()
    return {course.at(step, _STEPS, start=options.temperature) for step in range(_STEPS)}


def _refuse_vague(cache: Cache, temperatures: list[float], tolerance: float | None, stored: str) -> None:
    """Before the first step, rather than in the middle of a schedule."""
    limit = DEFAULT_TAIL_TOLERANCE if tolerance is None else tolerance
    worst = max((tail_facts(cache, t) for t in temperatures), key=lambda facts: facts.error, default=None)
    if worst is not None and worst.error > limit:
        raise UsageError(
            f"temperature {worst.temperature:.3g} was not stored (stored: {stored}), and the mass of the classes that "
            f"{cache.path.name} does not keep is open by +-{worst.error:.3g} there; the tolerance is {limit:g}. Use "
            "stored temperatures (--temperature, the end of --temperature-schedule), allow more with --tail-tolerance, "
            "or make the cache again with --temperatures that have this one"
        )
