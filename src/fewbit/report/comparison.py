"""What a person sees of a comparison: its table, its failures and samples, and lines while it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from fewbit.measure.comparison import ORIGINAL, Comparison, Interval, Row, Timing, winners
from fewbit.report import tables, text
from fewbit.units import duration, size

BEST = "*"
_SAMPLE = 400  # characters of a sample that are shown


@dataclass(frozen=True)
class Column:
    """A heading, what stands below it, and what is compared: the least, or the greatest, is the best. Without `value`,
    as of what is measured once, none is the best."""

    heading: str
    shown: Callable[[Row], str]
    value: Callable[[Row], Interval | None] | None = None
    least: bool = True


def columns() -> list[Column]:
    """What the table shows of a row that was measured."""
    return [
        Column("on disk", lambda r: size(r.disk_bytes or 0), lambda r: Interval.exact(r.disk_bytes or 0)),
        Column("at rest", lambda r: size(_of(r.weights).at_rest), lambda r: Interval.exact(_of(r.weights).at_rest)),
        Column("peak memory", lambda r: size(peak(r))),
        Column("load", lambda r: short(_of(r.speed).load)),
        Column(
            "prefill tokens/s",
            lambda r: pace(_of(r.speed).prefill),
            lambda r: _of(r.speed).prefill.interval,
            least=False,
        ),
        Column(
            "decode tokens/s", lambda r: pace(_of(r.speed).decode), lambda r: _of(r.speed).decode.interval, least=False
        ),
        Column("perplexity", lambda r: within(_of(r.loss).perplexity), lambda r: _of(r.loss).perplexity),
        Column("KL divergence", lambda r: within(_of(r.loss).kl), lambda r: _of(r.loss).kl),
        Column("same top", lambda r: percent(_of(r.loss).same_top), lambda r: _of(r.loss).same_top, least=False),
        Column("quantized in", lambda r: short(r.quantizing.seconds) if r.quantizing else ""),
    ]


def peak(row: Row) -> int:
    """The most memory of loading and generating: of the GPUs where the model was there, else of the process."""
    peaks = [p for p in (row.loading, row.generating) if p is not None]
    return max((p.cuda for p in peaks), default=0) or max((p.process for p in peaks), default=0)


def short(seconds: float) -> str:
    """Seconds for people, in few characters."""
    return (
        duration(seconds)
        if seconds < 60
        else f"{seconds / 60:.3g} min"
        if seconds < 3600
        else f"{seconds / 3600:.3g} h"
    )


def pace(timing: Timing) -> str:
    """Tokens a second: the median, and half the width of its interval where there is one."""
    return f"{float(f'{timing.median:.3g}'):,g}" if timing.interval is None else within(timing.interval)


def percent(interval: Interval) -> str:
    """A share as a percentage, and half the width of its interval: 89.5±.4%."""
    return f"{within(Interval(*(100 * each for each in (interval.value, interval.low, interval.high))))}%"


def within(interval: Interval) -> str:
    """A value and half the width of its interval: .041±.003."""
    if interval.value == interval.low == interval.high:
        return f"{interval.value:.3g}"
    half = float(f"{(interval.high - interval.low) / 2:.1g}")
    if interval.value < 0.001:
        return f"{interval.value:.1e}±{half:.0e}".replace("e-0", "e-")
    digits = max(0, min(4, -math.floor(math.log10(half)))) if half else 4
    return re.sub(r"(?<!\d)0\.", ".", f"{interval.value:,.{digits}f}±{half:,.{digits}f}")


def table(compared: Comparison) -> tables.Table:
    """The rows that were measured, `BEST` before what is best of the quantized ones."""
    shown = [row for row in compared.rows if row.done]
    made = [row for row in shown if row.plan != ORIGINAL]
    kinds = columns()
    best = [_best(column, made) for column in kinds]
    grid = tables.Table("", [tables.Column("plan"), *(tables.Column(column.heading, number=True) for column in kinds)])
    for row in shown:
        cells = [
            Text(BEST + column.shown(row), style="bold green") if row in won else Text(column.shown(row))
            for column, won in zip(kinds, best, strict=True)
        ]
        grid.add_row(row.plan, *cells)
    return grid


def comparison(compared: Comparison, folder: str | Path | None) -> None:
    """What `fewbit compare` prints when it is finished."""
    c = compared
    say(f"{c.model}: {c.architecture}, {c.parameters:,} parameters, on {c.machine.cpu}, {_where(c)}", style="bold")
    text.out.print(table(c))
    if sum(row.done for row in c.rows if row.plan != ORIGINAL) > 1:
        on_gpu = any(p.cuda for row in c.rows for p in (row.loading, row.generating) if p is not None)
        peak = "what torch held on the GPU" if on_gpu else "of a process that loads and generates, imports included"
        say(f"{BEST} the best of the quantized, where 95 % intervals (±) tell it from all the others.")
        say(f"Peak memory is {peak}. It, load and quantized in are measured once.")
    if c.noise is not None:
        say(f"note: {c.noise}")
    for row in c.rows:
        if not row.done:
            say(f"{row.plan} failed: {row.reason}", style="red")
    for row in c.rows:
        for note in row.notes:
            say(f"note: {row.plan}: {note}")
    say(f"Measured on {c.text.samples} x {c.text.length} tokens of {c.text.text}{_calibrated(c)}.")
    _samples(c)
    if c.reused:
        say(f"{c.reused} of {len(c.rows)} rows were measured before and are reused.")
    say(f"{duration(c.seconds)}{f'; the report is in {folder}' if folder is not None else ''}.")


def _samples(compared: Comparison) -> None:
    """Print each model's continuation of the prompt. Models with equal text share an entry."""
    said: dict[str, list[str]] = {}
    for row in compared.rows:
        if row.sample is not None:
            said.setdefault(row.sample, []).append(row.plan)
    say(f'"{compared.prompt}" is continued')
    for sample, plans in said.items():
        say(f"  by {', '.join(plans)}: {' '.join(sample.split())[:_SAMPLE]}")


def _best(column: Column, rows: Sequence[Row]) -> list[Row]:
    if column.value is None:
        return []
    return [rows[i] for i in winners([column.value(row) for row in rows], more_is_better=not column.least)]


def _where(compared: Comparison) -> str:
    machine = compared.machine
    if machine.device != "cpu":
        return ", ".join(machine.devices)
    return f"{machine.threads} thread{'s' * (machine.threads != 1)}"


def _calibrated(compared: Comparison) -> str:
    used = compared.calibration
    return f", calibrated on {used.samples} x {used.length} of {used.text}" if used else ""


def _of(part: Any) -> Any:
    """What a measured row has."""
    assert part is not None
    return part


def say(line: str, style: str = "") -> None:
    tables.say(text.out, line, style)
