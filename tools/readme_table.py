"""Write the table and the chart of README.md from a comparison: `python tools/readme_table.py REPORT`.

REPORT is the folder of `fewbit compare tiny -o REPORT`. What depends on the machine, memory and speed, is not in them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import tables

from fewbit.measure.comparison import Comparison, Row
from fewbit.measure.intervals import Interval
from fewbit.units import size

ROOT = Path(__file__).resolve().parent.parent
HEADINGS = ("plan", "on disk", "at rest", "perplexity", "KL divergence", "same top token")


def main() -> None:
    """Replace the table and the chart."""
    folder = Path(sys.argv[1])
    tables.replace(ROOT / "README.md", f"| {' | '.join(HEADINGS)} |", table(Comparison.read(folder)))
    shutil.copyfile(folder / "quality-size.svg", ROOT / "docs" / "images" / "compare-tiny.svg")


def table(compared: Comparison) -> str:
    """The rows that were measured, in Markdown."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in compared.rows if row.done]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    assert row.disk_bytes is not None
    assert row.weights is not None
    assert row.loss is not None
    loss = row.loss
    sizes = size(row.disk_bytes), size(row.weights.at_rest)
    top = f"{100 * loss.same_top.value:.1f} %"
    return row.plan, *sizes, f"{loss.perplexity.value:.3f}", _within(loss.kl), top


def _within(interval: Interval) -> str:
    if interval.low == interval.high:
        return f"{interval.value:.3g}"
    half = f"{(interval.high - interval.low) / 2:.0e}"
    digits = -int(half.partition("e")[2])
    return f"{interval.value:.{digits}f} ± {float(half):.{digits}f}"


if __name__ == "__main__":
    main()
