"""A chart axis: its tick values, and the pixel position of a value.

Ticks of a linear axis are 1, 2, 2.5 or 5 times a power of ten. Ticks of a logarithmic axis are powers of ten and, if
these are few, 2 and 5 times them. A logarithmic axis shows zero, which has no logarithm, beyond a gap at its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_GAP = 34.0  # pixels between zero and the least number of a logarithmic axis
_ROOM = 1.6  # factor by which a logarithmic axis extends beyond its values
_WIDE = 12.0  # largest ratio of greatest to smallest value for a linear axis; beyond it the small values would crowd


@dataclass(frozen=True)
class Measure:
    """The quantity on an axis: its title, the format of its numbers, and whether more is better.

    `log` allows a logarithmic axis, which is used if the numbers span more than a factor of 12.
    """

    title: str
    write: Callable[[float], str]
    more_is_better: bool = False
    log: bool = False


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to pixels from `start` to `end`. `start` may be greater than `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    zero: bool  # on a logarithmic axis: zero is at `start`, the other values begin after a gap
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """The pixel of a value. Values outside the axis are clamped to its nearer end."""
        start = self.start
        if self.log:
            if self.zero:
                start += math.copysign(_GAP, self.end - self.start)
            if value <= 0:
                return self.start
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return start + min(max(share, 0.0), 1.0) * (self.end - start)


def axis(values: Sequence[float], start: float, end: float, *, log: bool = False, ticks: int = 5) -> Axis:
    """An axis that covers all `values` (finite, >= 0). Logarithmic if allowed and the range is wide."""
    positive = [v for v in values if v > 0]
    if log and positive and max(positive) > _WIDE * min(positive):
        low, high = min(positive) / _ROOM, max(positive) * _ROOM
        named = log_ticks(low, high, ticks)
        zero = len(positive) < len(values)
        return Axis(low, high, start, end, True, zero, ((0.0, *named) if zero else named))
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low < high / 2 or high == low:
        low = 0.0  # begin at zero if possible
    if high == low:
        high = 1.0
    named = linear_ticks(low, high, ticks)
    return Axis(named[0], named[-1], start, end, False, False, named)


def linear_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """About `count` steps of a round size, from at most `low` to at least `high`.

    >>> linear_ticks(0, 28.7)
    (0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0)
    >>> linear_ticks(0.71, 0.94)
    (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.85)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # 3 * 0.1 is not 0.3 in floating point, but it is after rounding to twelve digits.
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def log_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Round numbers between `low` and `high`: powers of ten; if these are few, also 3 times or 2 and 5 times them.

    >>> log_ticks(0.008, 460)
    (0.01, 0.1, 1.0, 10.0, 100.0)
    >>> log_ticks(0.013, 0.6)
    (0.02, 0.05, 0.1, 0.2, 0.5)
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    named: list[float] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        named = [n for power in powers for n in (float(f"{factor}e{power}") for factor in factors) if low <= n <= high]
        if len(named) <= count + 1:
            break
    return tuple(named)
