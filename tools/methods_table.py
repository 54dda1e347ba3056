"""Write the table of methods, generated from the registry and the measured priors, into docs/reference.md."""

from __future__ import annotations

from pathlib import Path

from fewbit.advise.table import table
from fewbit.report.advice import COLUMNS, markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"


def main() -> None:
    """Replace the table, which begins with its header and ends at the first empty line."""
    page = PAGE.read_text(encoding="utf-8")
    start = page.index(f"| {' | '.join(COLUMNS)} |")
    end = page.index("\n\n", start) + 1
    PAGE.write_text(page[:start] + markdown(table(device="cpu", here=False)) + page[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
