"""How many standard errors tell two means over seeds apart: few seeds know their own spread badly."""

from __future__ import annotations

import math

# Two-sided 95 % quantiles of Student's t at 1 to 10 degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z95 = 1.959964


def needed(seeds: int) -> float:
    """Standard errors that a mean over so many seeds, at least two, has to be away from 0 to be called another.

    The two-sided 95 % quantile of Student's t with seeds - 1 degrees of freedom: equal settings are told apart once in
    20 times. From 11 degrees on the Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5), off by less than 0.001.

    >>> [round(needed(seeds), 2) for seeds in (2, 3, 5, 12)]
    [12.71, 4.3, 2.78, 2.2]
    """
    freedom = seeds - 1
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = _Z95
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return math.fsum(term / freedom**at for at, term in enumerate(terms))
