"""Tables and paragraphs that fit a terminal of any width without breaking a word.

A table that is too wide is changed step by step until it fits: headings wrap, then texts wrap at spaces, then the
columns are split into several tables that all begin with the first column. If the first column alone takes more
than half of the width, each of its cells gets its own line above the rest of its row. Numbers never wrap.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from rich import console as rich_console
from rich.cells import cell_len
from rich.text import Text

_GAP = 2  # spaces between columns
_LEAST = 16  # a text is not wrapped into less, unless its words are shorter
_GLUE = "\ue000"  # stands for a space where no line may break
# What is copied or read as one piece: a command, an option with its value, a number with its unit.
_WHOLE = re.compile(
    r"`[^`]+`|(?<=\()(?:fewbit|make|pip|python) [^()]*(?=\))|\b(?:fewbit|make|pip) [a-z][\w-]*(?: --?[a-z][\w=.-]*)*"
    r"|--[a-z][\w-]* (?:True|False|[0-9.]+)|\d (?:[kMGT]?B|%|s|min|h|bits?|tokens/s)(?!\w)"
)


class _Environment(Mapping[str, str]):
    """os.environ without a size of the terminal that is none: 0, a negative number or a text."""

    def __getitem__(self, name: str) -> str:
        value = os.environ[name]
        if name in ("COLUMNS", "LINES") and not re.fullmatch(r"0{0,9}[1-9][0-9]{0,4}", value):
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name in os.environ if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Console(rich_console.Console):
    """A console that does not crop: a word longer than a line stays whole, so that it can be copied."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, _environ=_Environment(), **options)

    def print(self, *objects: Any, crop: bool = False, **options: Any) -> None:
        super().print(*objects, crop=crop, **options)


def say(console: rich_console.Console, line: str, style: str = "") -> None:
    """Print a paragraph wrapped between words. All lines get the indent of the first."""
    indent = len(line) - len(line.lstrip(" "))
    for part in _wrapped(Text(line.lstrip(" ")), max(1, console.width - indent)):
        console.print(Text(" " * indent + part.plain, style=style), soft_wrap=True)


def verbatim(console: rich_console.Console, line: str) -> None:
    """Print a line without wrapping. For text to copy, such as a command."""
    console.print(Text(line), soft_wrap=True)


@dataclass(frozen=True)
class Column:
    """A heading, and whether the cells are numbers: right-aligned and never wrapped."""

    heading: str
    number: bool = False


class Table:
    """A table without lines. Cells are printed literally, because model output may look like rich markup."""

    def __init__(self, title: str, columns: Sequence[Column]) -> None:
        self.title, self.columns = title, tuple(columns)
        self.rows: list[list[Text]] = []

    def add_row(self, *cells: str | Text) -> None:
        self.rows.append([Text(cell) if isinstance(cell, str) else cell for cell in cells])

    def __rich_console__(
        self, console: rich_console.Console, options: rich_console.ConsoleOptions
    ) -> rich_console.RenderResult:
        for line in self.lines(options.max_width):
            line.no_wrap, line.overflow, line.end = True, "ignore", "\n"
            yield line

    def lines(self, width: int) -> Iterator[Text]:
        """What is printed where a line has `width` characters. Only a word of more makes a longer line."""
        for line in _wrapped(Text(self.title), width) if self.title else ():
            line.stylize("bold")
            yield line
        every = range(len(self.columns))
        if self._least(every) <= width:
            yield from self._block(every, width)
        elif cell_len(self.columns[0].heading) < width // 2 < self._floor(0):
            yield from self._records(width)
        else:
            for number, block in enumerate(self._blocks(width)):
                if number:
                    yield Text("")
                yield from self._block(block, width)

    def _blocks(self, width: int) -> list[list[int]]:
        """The columns in as few tables as possible, in order, the first column in each of them."""
        blocks = [[0]]
        for column in range(1, len(self.columns)):
            if len(blocks[-1]) > 1 and self._least([*blocks[-1], column]) > width:
                blocks.append([0])
            blocks[-1].append(column)
        return blocks

    def _block(self, columns: Sequence[int], width: int) -> Iterator[Text]:
        widths = self._widths(columns, width)
        if any(self.columns[i].heading for i in columns):
            headings = [_wrapped(Text(self.columns[i].heading, style="bold"), w) for i, w in widths.items()]
            tallest = max(map(len, headings))
            yield from self._joined([[*[Text("")] * (tallest - len(h)), *h] for h in headings], widths)
        for row in self.rows:
            yield from self._joined([_wrapped(row[i], w) for i, w in widths.items()], widths)

    def _records(self, width: int) -> Iterator[Text]:
        rest = Table("", self.columns[1:])
        widths = dict(enumerate(self._widths(range(1, len(self.columns)), width - _GAP).values()))
        indent = " " * _GAP
        for first, *cells in [[Text(c.heading, style="bold") for c in self.columns], *self.rows]:
            yield first.copy()
            parts = [_wrapped(cell, room) for cell, room in zip(cells, widths.values(), strict=True)]
            for line in rest._joined(parts, widths):
                yield Text(indent).append_text(line)

    def _joined(self, cells: Sequence[Sequence[Text]], widths: Mapping[int, int]) -> Iterator[Text]:
        """Join the wrapped lines of a row's cells into the lines of the row."""
        for parts in zip_longest(*cells, fillvalue=Text("")):
            line = Text("")
            for n, (part, (column, width)) in enumerate(zip(parts, widths.items(), strict=True)):
                room = " " * (width - part.cell_len)
                number = self.columns[column].number
                line.append(" " * _GAP * (n > 0) + (room if number else ""))
                line.append_text(part)
                line.append("" if number else room)
            line.rstrip()
            yield line

    def _widths(self, columns: Sequence[int], width: int) -> dict[int, int]:
        """A width for each column: its natural width, or less if there is not enough room."""
        room = width - _GAP * (len(columns) - 1)
        found = {i: max(self._natural(i), cell_len(self.columns[i].heading)) for i in columns}
        if sum(found.values()) > room:
            found = {i: max(self._natural(i), _longest_word(Text(self.columns[i].heading))) for i in columns}
        floors = {i: self._floor(i) for i in columns}
        while sum(found.values()) > room and any(found[i] > floors[i] for i in columns):
            widest = max((i for i in columns if found[i] > floors[i]), key=lambda i: found[i])
            found[widest] -= 1
        return found

    def _least(self, columns: Sequence[int]) -> int:
        return sum(map(self._floor, columns)) + _GAP * (len(columns) - 1)

    def _floor(self, column: int) -> int:
        """The smallest width of a column that breaks no number and no word."""
        natural = self._natural(column)
        cells = [row[column] for row in self.rows]
        least = natural if self.columns[column].number else min(natural, _LEAST)
        words = 0 if self.columns[column].number else max(map(_longest_word, cells), default=0)
        return max(least, words, _longest_word(Text(self.columns[column].heading)))

    def _natural(self, column: int) -> int:
        return max((cell_len(line) for row in self.rows for line in row[column].plain.split("\n")), default=0)


def _glued(text: str) -> str:
    return _WHOLE.sub(lambda found: found[0].replace(" ", _GLUE), text)


def _longest_word(text: Text) -> int:
    return max(map(cell_len, _glued(text.plain).split()), default=0)


def _wrapped(text: Text, width: int) -> list[Text]:
    """Wrap into lines of at most `width` characters. Longer words stay whole."""
    glued, cuts = _glued(text.plain), list[int]()
    start = end = 0  # of the line so far
    for word in re.finditer(r"\n|\S+", glued):
        if word[0] == "\n":
            start = word.end()
            cuts.append(start)
        elif end > start and cell_len(glued[start : word.end()]) > width:
            start = word.start()
            cuts.append(start)
        end = word.end()
    lines = text.divide(cuts)
    for line in lines:
        line.rstrip()
    return list(lines)
