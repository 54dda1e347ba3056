"""Charts of the site, drawn from tables of its pages.

A comment before a table says what to draw of it:

    <!-- chart: KL measured; seconds as seconds on one core by bits; plan -->

Each column before `by` becomes a chart with one bar for each row; the words after `as` are its title. The columns after
`by` name the bars. `#2` is the second column, if its name is missing or not unique. An empty name is that of the row
above; of the first of several names, what follows a comma is left out. After `by columns`, the charts are of rows, by
their first cell. A bar has the first number of its cell; a cell without one has no bar.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fewbit.report.charts.axis import linear_ticks
from fewbit.report.charts.svg import DARK, LIGHT, cut, drawing, element, extent, rules

MARK = re.compile(r"^<!-- chart: (.+?) by (.+?) -->\n(?=\s*((?:\|.*\n?)+))", re.MULTILINE)
_ROW, _NAME, _WIDTH = 22.0, 56, 800
_SAFE = 1.12  # `extent` is for Arial; DejaVu Sans, which many Linux systems have, is wider


def style() -> str:
    """The CSS of all charts, in the colors that the reader chose for the site."""
    made = []
    for scheme, colors in (("default", LIGHT), ("slate", DARK)):
        said = "".join(f"--{name}:{color};" for name, color in colors.items())
        made.append(f"[data-md-color-scheme={scheme}] .figure{{{said}}}\n")
    return (
        "".join(made)
        + rules(None)
        + ".figure{overflow-x:auto}\n.figure .chart{width:100%;min-width:32rem;height:auto}\n"
    )


def figure(image: str) -> str:
    """A drawing as a block of Markdown, with nothing in it that Markdown would change."""
    return f'<div class="figure">{image}</div>\n'


def with_charts(text: str) -> str:
    """The Markdown of a page, with charts where it asks for them."""
    drawn = 0

    def draw(match: re.Match[str]) -> str:
        nonlocal drawn
        values, names, table = match.groups()
        images = []
        for name, title, rows in charts(table, values.split("; "), names.split("; ")):
            drawn += 1
            images.append(figure(bars(rows, name=f"bars-{drawn}-{name}", title=title)))
        return "\n".join(images) + "\n"

    return MARK.sub(draw, text)


def charts(table: str, values: Sequence[str], names: Sequence[str]) -> list[tuple[str, str, list[tuple[str, float]]]]:
    """For each of `values`: its place, its title, the bars' names and numbers. SystemExit if a column is missing."""
    rows = [[_plain(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    del rows[1]  # the line under the heads
    if names == ["columns"]:
        rows, names = [list(column) for column in zip(*rows, strict=True)], ["#1"]
    head, *body = rows

    def place(name: str) -> int:
        found = int(name[1:]) - 1 if re.fullmatch(r"#\d+", name) else head.index(name) if name in head else len(head)
        if found >= len(head):
            raise SystemExit(f"a chart wants {name!r}; the table has {head}")
        return found

    labels, above = [], {place(name): "" for name in names}
    for cells in body:
        above |= {at: cells[at] for at in above if cells[at]}
        first, *others = (text for text in above.values() if text)
        labels.append(", ".join([first.partition(", ")[0], *others]) if others else first)
    made = []
    for value in values:
        name, _, title = value.partition(" as ")
        at = place(name)
        found = [(label, _number(cells[at])) for label, cells in zip(labels, body, strict=True)]
        bars = [(label, number) for label, number in found if number is not None]
        made.append((str(at + 1), title or head[at], bars))
    return made


def bars(rows: Sequence[tuple[str, float]], *, name: str, title: str) -> str:
    """A bar for each row, from zero, with its name before it and its number after it."""
    shown = [(cut(label, _NAME), value) for label, value in rows]
    left = 12 + _SAFE * max(extent(label) for label, _ in shown)
    ends = linear_ticks(0, max(value for _, value in shown) or 1)
    right = _WIDTH - 64
    base = 30 + _ROW * len(rows)
    parts = [element("text", text=title, x=left, y=14, class_="tick")]
    for tick in ends:
        at = left + tick / ends[-1] * (right - left)
        parts.append(element("line", x1=at, x2=at, y1=24, y2=base, class_="axis" if tick == 0 else "grid"))
        parts.append(element("text", text=f"{tick:g}", x=at, y=base + 16, text_anchor="middle", class_="tick"))
    for i, (label, value) in enumerate(shown):
        top = 28 + i * _ROW
        width = value / ends[-1] * (right - left)
        parts.append(element("text", text=label, x=left - 8, y=top + 13, text_anchor="end"))
        parts.append(element("rect", x=left, y=top + 2, width=width, height=_ROW - 6, class_="best"))
        parts.append(element("text", text=f"{value:g}", x=left + width + 6, y=top + 13, class_="name halo"))
    told = "; ".join(f"{label}: {value:g}" for label, value in rows)
    return drawing(_WIDTH, base + 24, *parts, name=name, title=title, description=f"{title}. {told}.")


def _plain(cell: str) -> str:
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell).replace("`", "").replace("**", "")


def _number(cell: str) -> float | None:
    found = re.match(r"\d[\d,]*\.?\d*", cell)
    return float(found[0].replace(",", "")) if found else None
