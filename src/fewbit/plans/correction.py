"""From the sum of costs of an allocation to the KL divergence that is measured, by points that were measured.

    measured = factor * max(sum, least) ** (exponent - 1) * sum

The sum is of second order, and each cost is that of one weight alone. Where errors are small, both hold, and the ratio
of measured to sum is nearly constant. Errors of several weights disturb one another, the more the larger they are: so
the ratio grows with the sum. In logarithms the points lie near a line, measured = factor * sum ** exponent: two points
give it, and more are fitted by least squares. Below the smallest point, `least`, the line would end at ratios below 1:
there the ratio stays as it is at that point.

On `tiny` with GGUF types, the ratio is 1.58 at a sum of 0.284, 1.39 at 0.175, 1.37 at 0.111, 1.25 at 0.073, 1.23 at
0.036, 1.16 at 0.017, 1.15 at 0.0051 and 1.13 at 0.0015 (benchmarks/results/2026-11-allocation.md).

>>> curve = Correction.of([(0.01, 0.012), (0.1, 0.15)])
>>> [round(curve(total), 4) for total in (0.001, 0.01, 0.1)]
[0.0012, 0.012, 0.15]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, log

_EXPONENTS = 0.5, 2.0  # others say that the points are too close to one another, or too small to be measured


@dataclass(frozen=True)
class Correction:
    """measured = factor * max(sum, least) ** (exponent - 1) * sum, in nats per token."""

    factor: float = 1.0
    exponent: float = 1.0
    least: float = 0.0

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Correction:
        """The curve through points (sum, measured). The exponent is 1 if they do not determine it. Points that are not
        above 0 are ignored; without any, nothing is corrected."""
        used = [(a, b) for a, b in points if a > 0 and b > 0 and isfinite(a) and isfinite(b)]
        if not used:
            return cls()
        pairs = [(log(a), log(b)) for a, b in used]
        x, y = (sum(each) / len(pairs) for each in zip(*pairs, strict=True))
        spread = sum((a - x) ** 2 for a, _ in pairs)
        exponent = sum((a - x) * (b - y) for a, b in pairs) / spread if spread > 0 else 1.0
        if not _EXPONENTS[0] <= exponent <= _EXPONENTS[1]:
            exponent = 1.0
        return cls(exp(y - exponent * x), exponent, min(a for a, _ in used))

    def __call__(self, total: float) -> float:
        """The KL divergence to expect for a sum of costs."""
        larger = max(total, self.least)
        return self.factor * larger ** (self.exponent - 1) * total if total > 0 else 0.0
