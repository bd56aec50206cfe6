"""What the numbers of losses may be: checked where a record is made, and where a function is called. No torch here."""

from __future__ import annotations

import math

from kdcache.errors import UsageError

# From this temperature on KL is summed as p * (exp(x) - 1 - x), x = log(q / p), whose terms are all positive. As the
# difference of two sums near log(C) a row is up to 0.2 % off at a temperature of 100 in float32, 18 % at 1000 (the mean
# of 64 rows: 0.01 % and 1.5 %); so summed, the mean is right to 3e-6.
SERIES_FROM = 8.0
# exp2 takes a quarter of the time of exp on a CPU (38 against 172 us at 256 x 1000), and the factor costs no rounding
# of its own, since logits are divided by the temperature anyway.
LOG2_E = math.log2(math.e)


def check_temperature(name: str, value: float | None) -> None:
    """Refuses what cannot divide logits; None is no temperature and fine.

    Raises:
        UsageError: with the name.
    """
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise UsageError(f"{name} is {value}, expected a finite number above 0 (usual: 1 to 8)")


def check_mixture(name: str, value: float) -> None:
    """Refuses a teacher's share of a mixture outside of (0, 1).

    Raises:
        UsageError: naming the divergence that the end of the range stands for.
    """
    if not 0 < value < 1:
        raise UsageError(
            f"{name} is {value}, expected a number above 0 and below 1: the teacher's share of the mixture "
            "(towards 0 use kl, towards 1 reverse_kl)"
        )


def check_part_weight(name: str, value: float) -> None:
    """Refuses a weight of a part of a loss below 0, and what is no number.

    Raises:
        UsageError: with the name.
    """
    if not 0 <= value < math.inf:
        raise UsageError(f"{name} is {value}, expected a finite number of at least 0")
