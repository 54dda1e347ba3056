"""Write the table of methods, generated from the registry and the measured priors, into docs/reference.md."""

from __future__ import annotations

from pathlib import Path

import tables

from fewbit.advise.table import table
from fewbit.report.advice import COLUMNS, markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"


def main() -> None:
    tables.replace(PAGE, f"| {' | '.join(COLUMNS)} |", markdown(table(device="cpu", here=False)))


if __name__ == "__main__":
    main()
