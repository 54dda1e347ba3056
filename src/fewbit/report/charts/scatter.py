"""A scatter chart of two measures that trade off against each other, with the Pareto front.

A point is on the Pareto front if no other is at least as good in both measures and better in one. If intervals overlap,
this may be unknown: such a point is undecided. The front is drawn as a staircase around the region that its points
beat, because a straight line between two points would show values that were never measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fewbit.report.charts.axis import Axis, Measure, axis
from fewbit.report.charts.labels import Box, placed
from fewbit.report.charts.svg import cut, drawing, element, extent

_DOT = 5.0
_NAME = 24  # characters of a point's name that are shown


@dataclass(frozen=True)
class Point:
    """A named point. `low` and `high`: the interval of `y`. `left` and `right`: the interval of `x`."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    left: float | None = None
    right: float | None = None

    def ends(self, x: Measure, y: Measure) -> tuple[tuple[float, float], tuple[float, float]]:
        """The best and the worst (x, y) within the intervals, as costs: less is better."""
        across = (_or(self.left, self.x), _or(self.right, self.x))
        up = (_or(self.low, self.y), _or(self.high, self.y))
        (bx, wx), (by, wy) = (
            (-high, -low) if measure.more_is_better else (low, high) for (low, high), measure in ((across, x), (up, y))
        )
        return (bx, by), (wx, wy)


def _or(end: float | None, value: float) -> float:
    return value if end is None else end


def front(points: Sequence[Point], x: Measure, y: Measure) -> list[Point]:
    """The points that are on the front for any values within the intervals, sorted by `x`. Ties are all included."""
    return _sorted(p for p in points if not any(_beats(q.ends(x, y)[0], p.ends(x, y)[1]) for q in points if q is not p))


def undecided(points: Sequence[Point], x: Measure, y: Measure) -> list[Point]:
    """The points that may be on the front but are not certain to be: no point beats them for certain."""
    best = front(points, x, y)
    beaten = [p for p in points if any(_beats(q.ends(x, y)[1], p.ends(x, y)[0]) for q in points if q is not p)]
    return _sorted(p for p in points if p not in best and p not in beaten)


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def _sorted(points: Iterable[Point]) -> list[Point]:
    return sorted(points, key=lambda p: (p.x, p.y, p.name))


def scatter(
    points: Sequence[Point], x: Measure, y: Measure, *, name: str, title: str, width: int = 580, height: int = 400
) -> str:
    """Draw the chart. Points with non-finite values are left out. Without points, the chart says so."""
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not points:
        said = element("text", text="nothing to show", x=width / 2, y=48, text_anchor="middle", class_="tick")
        return drawing(width, 96, said, name=name, title=title, description="There is nothing to show.")
    ends = [v for p in points for v in (p.low, p.high) if v is not None and math.isfinite(v)]
    # Leave out interval ends at zero: a logarithmic axis would reserve a gap for them.
    ends = [v for v in ends if v > 0 or not y.log]
    vertical = axis([*(p.y for p in points), *ends], height - 52, 34, log=y.log)
    named = [_written(y, v) for v in vertical.ticks]
    left = 16 + max(extent(n) for n in named)
    across = [v for p in points for v in (p.left, p.right) if v is not None and math.isfinite(v) and v > 0]
    horizontal = axis([*(p.x for p in points), *across], left, width - 18, log=x.log, ticks=5 if width >= 500 else 3)
    best, open_ = front(points, x, y), undecided(points, x, y)
    stair = _stair(best, horizontal, vertical, x)
    body = [
        *_frame(vertical, horizontal, named, x, y, width, height),
        element("path", d="M" + "L".join(f"{at:.1f},{h:.1f}" for at, h in stair), class_="front"),
        *_marks(points, (best, open_), horizontal, vertical, Box(left + 2, 26, width - 2, height - 54), stair),
    ]
    told = "; ".join(f"{p.name}: {_written(x, p.x)}, {_written(y, p.y)}" for p in points)
    description = f"{y.title} against {x.title}. On the Pareto front: {', '.join(p.name for p in best)}. {told}."
    if open_:
        description += f" Undecided: {', '.join(p.name for p in open_)}."
    return drawing(width, height, *body, name=name, title=title, description=description)


def _written(measure: Measure, value: float) -> str:
    return "0" if value == 0 else measure.write(value)


def _frame(
    vertical: Axis, horizontal: Axis, named: Sequence[str], x: Measure, y: Measure, width: int, height: int
) -> list[str]:
    left, right, base = horizontal.start, horizontal.end, vertical.start
    parts = []
    for value, text in zip(vertical.ticks, named, strict=True):
        at = vertical.place(value)
        parts.append(element("line", x1=left, x2=right, y1=at, y2=at, class_="axis" if at == base else "grid"))
        parts.append(element("text", text=text, x=left - 8, y=at + 4, text_anchor="end", class_="tick"))
    if vertical.zero:  # two short strokes where the axis is broken
        parts += [
            element("line", x1=left - 5, x2=left + 5, y1=at + 3, y2=at - 3, class_="axis")
            for at in (base - 13, base - 19)
        ]
    free = -math.inf
    for value in horizontal.ticks:
        at, text = horizontal.place(value), _written(x, value)
        parts.append(element("line", x1=at, x2=at, y1=base, y2=base + 5, class_="axis"))
        half = extent(text) / 2
        middle = min(at, width - half - 1)  # the last label must not be cut off
        if middle - half > free:
            parts.append(element("text", text=text, x=middle, y=base + 19, text_anchor="middle", class_="tick"))
            free = middle + half + 8
    ways = {True: "more is better", False: "less is better"}
    under = f"{x.title} ({ways[x.more_is_better]} →)" if x.more_is_better else f"{x.title} (← {ways[False]})"
    over = f"{'↑' if y.more_is_better else '↓'} {y.title} ({ways[y.more_is_better]})"
    parts.append(element("text", text=over, x=2, y=16, class_="tick"))
    parts.append(element("text", text=under, x=right, y=height - 10, text_anchor="end", class_="tick"))
    return parts


def _stair(best: Sequence[Point], horizontal: Axis, vertical: Axis, x: Measure) -> list[tuple[float, float]]:
    """The corners of the staircase, including the front's points."""
    corners: list[tuple[float, float]] = []
    for p in best:
        at, height = horizontal.place(p.x), vertical.place(p.y)
        if corners:
            corners.append((corners[-1][0], height) if x.more_is_better else (at, corners[-1][1]))
        corners.append((at, height))
    return corners


def _marks(
    points: Sequence[Point],
    ranks: tuple[Sequence[Point], Sequence[Point]],
    horizontal: Axis,
    vertical: Axis,
    room: Box,
    stair: Sequence[tuple[float, float]],
) -> list[str]:
    bars, dots, names, leads = [], [], [], []
    best, open_ = ranks
    points = sorted(points, key=lambda p: p in best)  # points on the front are drawn last, on top
    places = [(horizontal.place(p.x), vertical.place(p.y)) for p in points]
    for p, (cx, cy) in zip(points, places, strict=True):
        if p.low is not None and p.high is not None and math.isfinite(p.low) and math.isfinite(p.high):
            y1, y2 = vertical.place(p.low), vertical.place(p.high)
            bars.append(element("line", x1=cx, x2=cx, y1=y1, y2=y2, class_="bar"))
        if p.left is not None and p.right is not None and p.left < p.right < math.inf:
            x1, x2 = horizontal.place(p.left), horizontal.place(p.right)
            bars.append(element("line", x1=x1, x2=x2, y1=cy, y2=cy, class_="bar"))
        look = "best" if p in best else "dot open" if p in open_ else "dot"
        dots.append(element("circle", cx=cx, cy=cy, r=_DOT, class_=look))
    sizes = [(extent(cut(p.name, _NAME)), 12.0) for p in points]
    lines = [
        Box(min(ax, bx) - 1, min(ay, by) - 1, max(ax, bx) + 1, max(ay, by) + 1)
        for (ax, ay), (bx, by) in pairwise(stair)
    ]
    for p, (cx, cy), box in zip(points, places, placed(places, sizes, room, _DOT, lines), strict=True):
        near = min(max(cx, box.left), box.right), min(max(cy, box.top), box.bottom)
        if math.dist((cx, cy), near) > 2.8 * _DOT:
            leads.append(element("line", x1=cx, y1=cy, x2=near[0], y2=near[1], class_="lead"))
        side, anchor = (box.right, "end") if box.right < cx else (box.left, "start")
        if box.left <= cx <= box.right:
            side, anchor = (box.left + box.right) / 2, "middle"
        look = "name halo on" if p in best else "name halo"
        names.append(
            element("text", text=cut(p.name, _NAME), x=side, y=box.bottom - 2, text_anchor=anchor, class_=look)
        )
    return [*bars, *leads, *dots, *names]
