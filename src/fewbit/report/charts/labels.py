"""Place the labels of points so that they overlap neither points nor each other.

Each label has candidate places around its point, near ones first. In turn, each label moves to its cheapest place given
the places of all others, until none moves. That is enough for the few points of a chart, and it is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_ROUNDS = 8


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: Box, margin: float = 0.0) -> float:
        """The overlap area with another box, after adding a margin to this one."""
        wide = min(self.right + margin, other.right) - max(self.left - margin, other.left)
        high = min(self.bottom + margin, other.bottom) - max(self.top - margin, other.top)
        return wide * high if wide > 0 and high > 0 else 0.0

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


def placed(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    room: Box,
    radius: float,
    lines: Sequence[Box] = (),
) -> list[Box]:
    """A box for each point's label: inside `room` if that is large enough, and if possible not on the `lines`."""
    dots = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    choices = [list(_around(x, y, *size, radius + 3)) for (x, y), size in zip(points, sizes, strict=True)]
    taken = [choice[0] for choice in choices]

    def cost(i: int, rank: int) -> float:
        box = choices[i][rank]
        outside = box.area - box.shared(room)
        over_names = sum(box.shared(other, 2) for j, other in enumerate(taken) if j != i)
        over_dots = sum(box.shared(dot, 1) for j, dot in enumerate(dots) if j != i)
        over_lines = sum(box.shared(line) for line in lines)
        return 1000 * outside + 20 * over_names + 20 * over_dots + 2 * over_lines + 3 * rank

    for _ in range(_ROUNDS):
        before = list(taken)
        for i, choice in enumerate(choices):
            taken[i] = choice[min(range(len(choice)), key=lambda rank: cost(i, rank))]
        if taken == before:
            break
    return taken


def _around(x: float, y: float, width: float, height: float, gap: float) -> Iterator[Box]:
    for far in (gap, gap + 12, gap + 26, gap + 42):
        slant = far * math.sqrt(0.5)
        for left, top in (
            (x + far, y - height / 2),
            (x - far - width, y - height / 2),
            (x - width / 2, y - far - height),
            (x - width / 2, y + far),
            (x + slant, y - slant - height),
            (x + slant, y + slant),
            (x - slant - width, y - slant - height),
            (x - slant - width, y + slant),
        ):
            yield Box(left, top, left + width, top + height)
