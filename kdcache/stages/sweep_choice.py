"""Which setting is chosen, and whether it beats labels alone: means over seeds and paired differences. No torch here.

The best of many settings looks better than it is, by the noise of the means it was chosen from: its value on the
validation data is for choosing, and the one on a test set for telling.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.stages.standard_errors import needed
from kdcache.stages.sweep_grid import Setting


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error: sd / sqrt(n), None of a single seed."""

    mean: float
    standard_error: float | None
    seeds: int

    def describe(self) -> dict[str, Any]:
        """For `--json`."""
        return {"mean": self.mean, "standard_error": self.standard_error, "seeds": self.seeds}


@dataclass(frozen=True, eq=False)
class Scored:
    """A setting and what its runs reached, by seed."""

    setting: Setting
    values: Mapping[int, float]

    @property
    def mean(self) -> Mean:
        """Over the seeds."""
        return mean_of(list(self.values.values()))


@dataclass(frozen=True, eq=False)
class Verdict:
    """For one fraction of the labels: the best settings, and how they compare.

    Attributes:
        fraction: None where the sweep has none.
        labels: alpha 0, tuned.
        best: of all with a teacher; None where none of them finished.
        keep: of those that learn from the unlabelled rows too; None where the sweep has none.
        drop: of those that leave them out.
    """

    fraction: float | None
    labels: Scored | None
    best: Scored | None
    keep: Scored | None
    drop: Scored | None

    @property
    def chosen(self) -> list[Scored]:
        """What a test set is for."""
        found = [one for one in (self.labels, self.best, self.keep, self.drop) if one is not None]
        return [one for at, one in enumerate(found) if one not in found[:at]]


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of independent values, at least one.

    >>> mean_of([0.5, 0.7])
    Mean(mean=0.6, standard_error=0.1, seeds=2)
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(round(statistics.fmean(values), 12), None if error is None else round(error, 12), len(values))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Mean | None:
    """The mean of the differences first - second over the seeds that both have; None without one.

    >>> paired({0: 0.9, 1: 0.8}, {0: 0.8, 1: 0.7, 2: 0.1})
    Mean(mean=0.1, standard_error=0.0, seeds=2)
    """
    both = [first[seed] - second[seed] for seed in first if seed in second]
    return mean_of(both) if both else None


def said(difference: Mean | None) -> str:
    """A difference in words; of one seed nothing can be said."""
    if difference is None or difference.standard_error is None:
        return "cannot be compared with"
    if abs(difference.mean) <= needed(difference.seeds) * difference.standard_error or difference.mean == 0:
        return "cannot be told from"
    return "beats" if difference.mean > 0 else "loses to"


def scored(settings: Sequence[Setting], rows: Mapping[tuple[int, int], Mapping[str, Any]], metric: str) -> list[Scored]:
    """Settings of which every seed finished.

    Args:
        settings: of the sweep.
        rows: of the table, by (number of the setting, seed); those that failed have no metric.
        metric: the column.
    """
    found = []
    for number, setting in enumerate(settings):
        values = {seed: row.get(metric) for (at, seed), row in rows.items() if at == number}
        known = {seed: float(value) for seed, value in values.items() if value is not None}
        if known and len(known) == len(values):
            found.append(Scored(setting, known))
    return found


def verdicts(found: Sequence[Scored]) -> list[Verdict]:
    """The choice for each fraction of the labels, in the order of the sweep."""
    result = []
    for fraction in dict.fromkeys(one.setting.fraction for one in found):
        same = [one for one in found if one.setting.fraction == fraction]
        taught = [one for one in same if not one.setting.is_labels_only]
        result.append(
            Verdict(
                fraction,
                _best([one for one in same if one.setting.is_labels_only]),
                _best(taught),
                _best([one for one in taught if one.setting.options.unlabelled == "keep"]),
                _best([one for one in taught if one.setting.options.unlabelled == "drop"]),
            )
        )
    return result


def _best(found: Sequence[Scored]) -> Scored | None:
    """The highest mean; of equal ones the first."""
    return max(found, key=lambda one: one.mean.mean, default=None)
