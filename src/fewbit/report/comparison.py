"""Prints a comparison: its table, failures and samples."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from fewbit.measure.comparison import ORIGINAL, Comparison
from fewbit.report import columns, tables, text
from fewbit.units import duration

BEST = "*"
_SAMPLE = 400  # characters of a sample that are shown


def table(compared: Comparison) -> tables.Table:
    """The measured rows, with `BEST` before the best number of the quantized ones."""
    shown = [row for row in compared.rows if row.done]
    made = [row for row in shown if row.plan != ORIGINAL]
    shown_columns = columns.in_terminal()
    best = [column.best(made) for column in shown_columns]
    headings = (tables.Column(column.title, number=True) for column in shown_columns)
    grid = tables.Table("", [tables.Column("plan"), *headings])
    for row in shown:
        cells = [
            Text(BEST + column.cell(row), style="bold green") if row in won else Text(column.cell(row))
            for column, won in zip(shown_columns, best, strict=True)
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
        peak = (
            "what torch allocated on the GPU" if on_gpu else "of a process that loads and generates, imports included"
        )
        say(f"{BEST} the best quantized plan, if 95 % intervals (±) separate it from all others.")
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
        say(f"{c.reused} of {len(c.rows)} rows are reused from an earlier comparison.")
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


def _where(compared: Comparison) -> str:
    machine = compared.machine
    if machine.device != "cpu":
        return ", ".join(machine.devices)
    return f"{machine.threads} thread{'s' * (machine.threads != 1)}"


def _calibrated(compared: Comparison) -> str:
    used = compared.calibration
    return f", calibrated on {used.samples} x {used.length} of {used.text}" if used else ""


def say(line: str, style: str = "") -> None:
    tables.say(text.out, line, style)
