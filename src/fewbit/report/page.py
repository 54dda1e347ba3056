"""The report of a comparison as one HTML page that works offline, without libraries.

`write` writes index.html and the charts into a folder. All texts are escaped, because models may write anything. As a
second protection, a content security policy forbids all requests, and all scripts except the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from string import Template

from fewbit import __version__, units
from fewbit.measure.comparison import Comparison, Row, TextUsed, Timing
from fewbit.report.charts.axis import Measure
from fewbit.report.charts.heat import Shades, heat, in_blocks, legend, shades
from fewbit.report.charts.png import png
from fewbit.report.charts.scatter import Point, front, scatter, undecided
from fewbit.report.charts.svg import DARK, FONT, LIGHT, element, escaped, rules, standalone
from fewbit.report.columns import Column, columns

_DATA = Path(__file__).parents[1] / "data" / "report"
_UNIT = re.compile(r"(?<=\d) (?=[kMGT]?B)|(?<=[+−]) (?=\d)")  # where no line may break
_HIDDEN_STATE = "after the block"

_SIZE = Measure("bytes on disk", units.size)
_SPEED = Measure("decoded tokens per second", lambda v: f"{v:,g}", more_is_better=True)
_KL = Measure("KL divergence, nats per token", lambda v: f"{v:g}", log=True)


def write(comparison: Comparison, folder: str | Path) -> list[str]:
    """Write index.html, quality-size and quality-speed (.svg, .png) into a folder. Returns notes on missing images."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _put(folder / "index.html", page(comparison).encode())
    notes = []
    for name, (title, x, points) in _charts(comparison).items():
        image = scatter(points, x, _KL, name=name, title=title)
        _put(folder / f"{name}.svg", standalone(image).encode())
        rendered = png(standalone(image, dark=False))
        if isinstance(rendered, bytes):
            _put(folder / f"{name}.png", rendered)
        elif (note := f"no .png of the charts was written: {rendered}") not in notes:
            notes.append(note)
    return notes


def page(comparison: Comparison) -> str:
    """The whole page."""
    script = _data("sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    style = Template(_data("style.css")).substitute(light=_properties(LIGHT), dark=_properties(DARK), font=FONT)
    sections = (_facts, _table, _figures, _errors, _samples, _made)
    return Template(_data("page.html")).substitute(
        policy=policy,
        title=escaped(f"{comparison.model}: plans compared by fewbit"),
        style=style + rules(None),
        model=escaped(comparison.model),
        lede=escaped(_lede(comparison)),
        body="\n".join(part for section in sections for part in section(comparison)),
        footer=escaped(f"Made by fewbit {__version__}. The numbers are also in report.json, beside this page."),
        script=script,
    )


def _lede(c: Comparison) -> str:
    done = sum(row.done for row in c.rows)
    failed = len(c.rows) - done
    count = units.counted(done, "plan") + (f" ({failed} more failed)" if failed else "")
    reused = f" The numbers of {c.reused} come from an earlier comparison." if c.reused else ""
    return (
        f"{count} for {c.architecture} with {c.parameters:,} parameters, each measured in its own process, in "
        f"{units.duration(c.seconds)} on {_day(c.date)}.{reused}"
    )


def _facts(c: Comparison) -> Iterator[str]:
    """The best quantized models. The original is left out because its distance to itself is 0. If intervals overlap,
    all possible winners are named."""
    rows = [row for row in c.rows if row.done and row is not c.original]
    by_name = {column.name: column for column in columns(rows)}
    cards = []
    for name, what in (("kl", "Closest to the original"), ("disk", "Smallest"), ("decode", "Fastest decoding")):
        column = by_name.get(name)
        first = column.first(rows) if column else []
        if column is None or not first:
            continue
        best = [value for row in first if (value := column.value(row)) is not None]
        if len(first) == 1 or column.best(rows) == first:
            cards.append((what, ", ".join(row.plan for row in first), _said(column, best[0])))
        else:
            plans = ", ".join(row.plan for row in first)
            cards.append((what, "no clear winner", f"95 % intervals do not separate {plans}"))
    if cards:
        items = (
            element(
                "li",
                element("span", text=what, class_="what"),
                element("span", text=plan, class_="which"),
                element("span", text=number, class_="number"),
            )
            for what, plan, number in cards
        )
        yield element("ul", *items, class_="facts")
    if c.noise is not None:
        yield element("p", text=f"Note: {c.noise}", class_="note")


def _said(column: Column, value: float) -> str:
    written = column.write(value)
    return {"kl": f"KL divergence {written}", "decode": f"{written} tokens/s"}.get(column.name, written)


def _table(c: Comparison) -> Iterator[str]:
    yield element("h2", text="All numbers", id="numbers")
    if not c.rows:
        yield element("p", text="No plan was compared.", class_="note")
        return
    shown = columns(c.rows)
    yield element(
        "p",
        text="Click a header to sort. Bold: the best quantized plan of a column, if 95 % intervals separate it "
        "from all others. Below a number: its 95 % interval, the memory added to what the process already held (+), or "
        "the sum over parameters. Load, memory and quantizing are measured once.",
        class_="note",
    )
    groups = [(group, len(list(members))) for group, members in groupby(shown, key=lambda column: column.group)]
    begins = {shown[sum(n for _, n in groups[:i])].name for i in range(len(groups))}
    over = [element("th", text=group, colspan=n, scope="colgroup", class_="first") for group, n in groups]
    heads = [_head("plan", "plan", "the requested plan", "ascending", "text", "plan")]
    heads += [
        _head(
            column.name,
            column.title,
            column.explained,
            "descending" if column.more_is_better else "ascending",
            "number",
            "first" if column.name in begins else None,
        )
        for column in shown
    ]
    head = element("thead", element("tr", "<td></td>", *over, class_="groups"), element("tr", *heads))
    quantized = [row for row in c.rows if row.done and row is not c.original]
    best = {column.name: column.best(quantized) for column in shown}
    body = element("tbody", *(_line(row, shown, begins, best, row is c.original) for row in c.rows))
    caption = element("caption", text=f"Plans for {c.model}", class_="unseen")
    table = element("table", caption, head, body, class_="sortable")
    yield element("div", table, class_="scroll", tabindex=0, role="region", aria_labelledby="numbers")
    yield element("p", text="Scroll right for more columns →", class_="more")
    terms = (element("dt", text=column.title) + element("dd", text=column.explained) for column in shown)
    yield element("details", element("summary", text="What the columns mean"), element("dl", *terms))


def _head(name: str, title: str, explained: str, begin: str, kind: str, look: str | None) -> str:
    button = element("button", text=title, type="button", title=explained)
    return element("th", button, scope="col", data_column=name, data_kind=kind, data_begin=begin, class_=look)


def _line(
    row: Row, shown: Sequence[Column], begins: set[str], best: Mapping[str, Sequence[Row]], original: bool
) -> str:
    under = [element("small", text=text) for text in (row.what, "reused" if row.reused else "") if text]
    plan = element("th", escaped(row.plan), *under, scope="row", data_of="plan", data_value=row.plan)
    if not row.done:
        reason = element(
            "td",
            text=f"Failed: {row.reason or 'no reason is known'}",
            class_="first reason",
            colspan=len(shown) or None,
        )
        return element("tr", plan, reason, class_="failed")
    cells = []
    for column in shown:
        value = column.value(row)
        look = ["first"] if column.name in begins else []
        if not original and any(row is each for each in best[column.name]):
            look.append("best")
        small = column.under(row) if value is not None else None
        content = escaped(column.write(value)) if value is not None else "–"
        if small:
            content += element("small", text=_UNIT.sub("\u00a0", small))
        cells.append(
            element(
                "td", content, class_=" ".join(look) or None, data_of=column.name,
                data_value=repr(value) if value is not None else None,
            )
        )  # fmt: skip
    return element("tr", plan, *cells)


def _charts(c: Comparison) -> dict[str, tuple[str, Measure, list[Point]]]:
    """The charts' file names, with the title, the measure of x and the points of each."""
    done = [row for row in c.rows if row.done and row.loss is not None]
    sizes = [_point(row, row.disk_bytes) for row in done if row.disk_bytes is not None]
    speeds = [_point(row, row.speed.decode.median, row.speed.decode) for row in done if row.speed is not None]
    return {
        "quality-size": ("Quality against size", _SIZE, sizes),
        "quality-speed": ("Quality against speed", _SPEED, speeds),
    }


def _point(row: Row, x: float, timing: Timing | None = None) -> Point:
    """A chart point with its intervals. A time without an interval may be any value: 0 to infinity."""
    assert row.loss is not None
    kl = row.loss.kl
    across = (x, x)
    if timing is not None:
        across = (0.0, math.inf) if timing.interval is None else (timing.interval.low, timing.interval.high)
    return Point(row.plan, x, kl.value, kl.low, kl.high, *across)


def _figures(c: Comparison) -> Iterator[str]:
    charts = _charts(c)
    if not any(points for _, _, points in charts.values()):
        return
    yield element("h2", text="What quality costs")
    yield element(
        "p",
        text="Filled points are on the Pareto front: no other plan is better in one measure and at least as good "
        "in the other. A point beyond the dashed line is worse than a point on the front. Bars are 95 % intervals. A "
        "dotted ring marks a point that may be on the front: its intervals overlap those of a plan that might beat it.",
        class_="note",
    )
    figures = []
    for name, (title, x, points) in charts.items():
        drawn = (
            scatter(points, x, _KL, name=f"{name}-{look}", title=title, width=width, height=height).replace(
                'class="chart"', f'class="chart {look}"', 1
            )
            for look, width, height in (("wide", 580, 400), ("narrow", 340, 360))
        )
        best = ", ".join(p.name for p in front(points, x, _KL)) or "none for certain"
        open_ = ", ".join(p.name for p in undecided(points, x, _KL))
        caption = element("figcaption", text=f"On the front: {best}." + (f" Undecided: {open_}." if open_ else ""))
        figures.append(element("figure", element("h3", text=title), *drawn, caption))
    yield element("div", *figures, class_="pair")


def _errors(c: Comparison) -> Iterator[str]:
    rows = [row for row in c.rows if row.done and row is not c.original and (row.errors or row.loss)]
    maps = []
    for row in rows:
        inside, outside = in_blocks(row.errors)
        drift = row.loss.drift if row.loss else ()
        cells = {**inside, **{(_HIDDEN_STATE, i): error for i, error in enumerate(drift)}}
        if cells:
            maps.append((row.plan, cells, outside))
    if not maps:
        return
    scale = shades(v for _, cells, _ in maps for v in cells.values())
    yield element("h2", text="Where the error is")
    yield element(
        "p",
        text="The relative squared error of each linear's output (of its weight, if the method needs no calibration), "
        f"by block from left to right. The last line is the hidden state {_HIDDEN_STATE}, where errors add up. All "
        "maps share one color scale.",
        class_="note",
    )
    yield legend(scale, name="legend")
    figures = (_map(i, *each, scale) for i, each in enumerate(maps))
    yield element("div", *figures, class_="maps")


def _map(i: int, plan: str, cells: Mapping[tuple[str, int], float], rest: Mapping[str, float], scale: Shades) -> str:
    drawn = heat(cells, scale, name=f"heat-{i}", title=f"Error per layer of {plan}")
    linears = {key: value for key, value in cells.items() if key[0] != _HIDDEN_STATE}
    notes = []
    if linears:
        (linear, block), worst = max(linears.items(), key=lambda item: item[1])
        notes.append(f"worst: {linear} of block {block}, {worst:.1e}")
    notes += [f"{module}: {value:.1e}" for module, value in rest.items()]
    return element("figure", element("h3", text=plan), drawn, element("figcaption", text="; ".join(notes)))


def _samples(c: Comparison) -> Iterator[str]:
    rows = [row for row in c.rows if row.done and row.sample is not None]
    if not rows:
        return
    original = (c.original.sample or "").strip() if c.original else None
    yield element("h2", text="Samples")
    yield element("p", text="Each model continues this prompt:", class_="note")
    yield element("p", text=c.prompt, class_="prompt", dir="auto")
    if original is not None and len(rows) > 1:
        yield element("p", text="Text after the first difference from the original is underlined.", class_="note")
    cards = []
    for row in rows:
        sample = (row.sample or "").strip()
        same = len(sample) if row is c.original or original is None else _agreed(sample, original)
        words = element("span", text=sample[:same], class_=None if same == len(sample) else "same")
        rest = element("mark", text=sample[same:]) if same < len(sample) else ""
        equal = row is not c.original and sample == original
        note = element("p", text="same as the original", class_="note") if equal else ""
        text = element("p", words, rest, dir="auto") if sample else element("p", text="(nothing)", class_="note")
        cards.append(element("article", element("h3", text=row.plan), text, note, class_="sample"))
    yield element("div", *cards, class_="samples")


def _agreed(text: str, other: str) -> int:
    """Length of the common prefix of `text` and `other`, cut at the start of the first word that differs."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    if not (_in_word(text[same : same + 1]) or _in_word(other[same : same + 1])):
        return same
    while same and _in_word(text[same - 1]):
        same -= 1
    return same


def _in_word(character: str) -> bool:
    """Whether the character is part of a longer word. In scripts without spaces (Chinese), each character is a word."""
    return character != "" and unicodedata.category(character)[0] in "LMN" and unicodedata.category(character) != "Lo"


def _made(c: Comparison) -> Iterator[str]:
    yield element("h2", text="How it was measured")
    m = c.machine
    pairs = [
        ("date", _day(c.date)),
        ("quality on", _text(c.text)),
        ("calibrated on", _text(c.calibration) if c.calibration else "nothing: no plan needs calibration"),
        ("speed on", f"a prompt of {c.prompt_tokens:,} tokens, then {c.new_tokens:,} new ones"),
        ("model on", m.device),
        ("CPU", f"{m.cpu}, {units.counted(m.threads, 'thread')}"),
        ("instructions", ", ".join(m.instructions)),
        ("memory", units.size(m.memory)),
        ("devices", ", ".join(m.devices)),
        ("system", m.system),
        ("versions", ", ".join(f"{name} {version}" for name, version in c.versions.items())),
        *((f"note, {row.plan}", note) for row in c.rows for note in row.notes),
    ]
    yield element("dl", *(element("dt", text=k) + element("dd", text=v) for k, v in pairs if v))


def _text(used: TextUsed) -> str:
    seed = f", seed {used.seed}" if used.seed is not None else ""
    return f"{used.samples} × {used.length} tokens of {used.text}{seed}, digest {used.digest[:12]}"


def _day(date: str) -> str:
    try:
        return f"{datetime.fromisoformat(date):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return date


def _properties(colors: Mapping[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in colors.items())


def _data(name: str) -> str:
    return (_DATA / name).read_text(encoding="utf-8")


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
