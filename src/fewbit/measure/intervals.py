"""Values with 95 % confidence intervals, and the interval of a median without any assumption about the distribution.

Sort n measurements. The interval from the k-th to the k-th last misses the true median with probability 2 P(B < k),
where B is binomial (n, 1/2). k is the largest value for which this probability is at most 5 %.

    >>> of_median([5, 1, 3, 2, 4, 6])
    (1, 6)
    >>> of_median([5, 1, 3, 2, 4]) is None  # with five, even the widest interval misses it in 6 % of cases
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

FEWEST = 6  # the fewest measurements for which an interval exists
# Both are half the interval's width as a share of the median:
TIGHT = 0.05  # stop measuring at this or below
NOISY = 0.10  # above this the median is unreliable, and the report says so


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether the intervals overlap, so that the difference of the values is not significant."""
        return self.low <= other.high and other.low <= self.high

    @classmethod
    def exact(cls, value: float) -> Interval:
        return cls(value, value, value)


def of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """The ends of the interval; None for fewer than FEWEST values."""
    count, ordered = len(values), sorted(values)
    missed, k = 0, 0
    while 2 * (missed := missed + comb(count, k)) <= 0.05 * 2**count:
        k += 1
    return (ordered[k - 1], ordered[count - k]) if k else None


def spread(values: Sequence[float]) -> float:
    """Half the width of the interval as a share of the median; infinite if there is no interval."""
    if (ends := of_median(values)) is None:
        return float("inf")
    return (ends[1] - ends[0]) / 2 / median(values)
