"""A heat map of one number for each linear of each block. It shows where in the model the error is.

Blocks go from left to right, linears from top to bottom, in the model's order. Colors are nine steps of a logarithmic
scale. Several maps can share the scale, so that they can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fewbit.report.charts.svg import STEPS, cut, drawing, element, extent

_BLOCK = re.compile(r"^(?:.*?\.)?([0-9]{1,6})\.(.+)$")
_ROW = 17.0
_NAME = 22  # characters of a linear's name that are shown


@dataclass(frozen=True)
class Shades:
    """A logarithmic scale of colors from `low` to `high`."""

    low: float
    high: float

    def step(self, value: float) -> int:
        if not value > 0 or self.high <= self.low:
            return 0
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return min(max(int(share * STEPS), 0), STEPS - 1)


def shades(values: Iterable[float]) -> Shades:
    """The scale from the smallest to the largest of `values`, ignoring zeros."""
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    return Shades(min(positive), max(positive)) if positive else Shades(1.0, 1.0)


def in_blocks(errors: Mapping[str, float]) -> tuple[dict[tuple[str, int], float], dict[str, float]]:
    """Values by (linear, block), and the values of modules outside the blocks.

    >>> in_blocks({"model.layers.0.self_attn.q_proj": 0.1, "lm_head": 0.2})
    ({('self_attn.q_proj', 0): 0.1}, {'lm_head': 0.2})
    """
    inside, outside = {}, {}
    for module, value in errors.items():
        if match := _BLOCK.match(module):
            inside[match[2], int(match[1])] = value
        else:
            outside[module] = value
    return inside, outside


def heat(cells: Mapping[tuple[str, int], float], scale: Shades, *, name: str, title: str, width: int = 340) -> str:
    """The chart of `cells`, the first result of `in_blocks`."""
    linears = list(dict.fromkeys(linear for linear, _ in cells))
    blocks = sorted({block for _, block in cells})
    short = _short(linears)
    left = 8 + max((extent(short[linear]) for linear in linears), default=0)
    column = min(24.0, (width - left - 2) / max(len(blocks), 1))
    gap = 1.5 if column > 6 else 0.5
    parts = []
    for row, linear in enumerate(linears):
        top = row * _ROW
        parts.append(element("text", text=short[linear], x=left - 8, y=top + 12.5, text_anchor="end", class_="tick"))
        for i, block in enumerate(blocks):
            value = cells.get((linear, block))
            place = {"x": left + i * column, "y": top, "width": column - gap, "height": _ROW - gap}
            if value is None:
                parts.append(element("rect", **place, class_="none"))
            else:
                said = element("title", text=f"block {block}, {linear}: {value:.2e}")
                parts.append(element("rect", said, **place, class_=f"h{scale.step(value)}"))
    base = len(linears) * _ROW + 13
    for i in _named(len(blocks), column):
        at = left + i * column + (column - gap) / 2
        parts.append(element("text", text=blocks[i], x=at, y=base, text_anchor="middle", class_="tick"))
    (linear, block), worst = max(cells.items(), key=lambda item: item[1], default=(("", 0), 0.0))
    description = (
        f"{len(linears)} linears in {len(blocks)} blocks. The largest is {worst:.2e}, of {linear} in block {block}."
        if cells
        else "There is nothing to show."
    )
    return drawing(width, base + 5, *parts, name=name, title=title, description=description)


def legend(scale: Shades, *, name: str, width: int = 340) -> str:
    """The colors, with the smallest and the largest number."""
    low, high = f"{scale.low:.1e}", f"{scale.high:.1e}"
    begin, end = extent(low) + 8, width - extent(high) - 8
    step = (end - begin) / STEPS
    parts = [element("text", text=low, x=begin - 8, y=12.5, text_anchor="end", class_="tick")]
    parts += [
        element("rect", x=begin + i * step, y=2.0, width=step + 0.5 * (i < STEPS - 1), height=13.0, class_=f"h{i}")
        for i in range(STEPS)
    ]
    parts.append(element("text", text=high, x=end + 8, y=12.5, class_="tick"))
    told = f"Nine colors, on a logarithmic scale from {low} to {high}."
    return drawing(width, 18, *parts, name=name, title="What the colors mean", description=told)


def _short(linears: Sequence[str]) -> dict[str, str]:
    """The last part of each name if these are distinct, else the whole names."""
    last = [linear.rsplit(".", 1)[-1] for linear in linears]
    return {full: cut(part if last.count(part) == 1 else full, _NAME) for full, part in zip(linears, last, strict=True)}


def _named(blocks: int, column: float) -> range:
    """The blocks that get their number under their column, so that the numbers do not overlap."""
    every = next((step for step in (1, 2, 5, 10, 20, 50, 100) if step * column >= 20), 1000)
    return range(0, blocks, every)
