"""Write the table of config options, from fewbit.models.plugin.options, into docs/reference.md."""

from __future__ import annotations

from pathlib import Path

import tables

from fewbit.models.plugin.options import OPTIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
HEADER = "| config | option | fewbit | |"


def table() -> str:
    """Markdown, one row an option."""
    rows = [f"| `{o.config}` | `{o.name}` | {o.verdict} | {o.says} |" for o in OPTIONS]
    return "\n".join([HEADER, "|---|---|---|---|", *rows]) + "\n"


def main() -> None:
    tables.replace(PAGE, HEADER, table())


if __name__ == "__main__":
    main()
