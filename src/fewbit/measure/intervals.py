"""95 % intervals of a median, from the measurements alone: no distribution is assumed.

Of n measurements in order, the interval from the k-th to the k-th last misses the true median with probability
2 P(B < k), where B counts heads of n fair coins. k is the greatest for which that is at most 5 %.

    >>> of_median([5, 1, 3, 2, 4, 6])
    (1, 6)
    >>> of_median([5, 1, 3, 2, 4]) is None  # of five, the widest interval misses it in 6 % of the cases
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median

FEWEST = 6  # measurements that an interval needs
TIGHT = 0.05  # half of an interval, as a share of the median: closer than that nothing more is measured
NOISY = 0.10  # beyond it the median says little, and a reader is told


def of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """The ends of the interval; None for fewer than FEWEST values."""
    count, ordered = len(values), sorted(values)
    missed, k = 0, 0
    while 2 * (missed := missed + comb(count, k)) <= 0.05 * 2**count:
        k += 1
    return (ordered[k - 1], ordered[count - k]) if k else None


def spread(values: Sequence[float]) -> float:
    """Half of the interval as a share of the median; infinite where there is no interval."""
    if (ends := of_median(values)) is None:
        return float("inf")
    return (ends[1] - ends[0]) / 2 / median(values)
