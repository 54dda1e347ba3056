"""Write the table of config options, from fewbit.models.plugin.options, into docs/reference.md."""

from __future__ import annotations

from pathlib import Path

from fewbit.models.plugin.options import OPTIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
HEADER = "| config | option | fewbit | |"


def table() -> str:
    """Markdown, one row an option."""
    rows = [f"| `{o.config}` | `{o.name}` | {o.verdict} | {o.says} |" for o in OPTIONS]
    return "\n".join([HEADER, "|---|---|---|---|", *rows]) + "\n"


def main() -> None:
    """Replace the table, which begins with its header and ends at the first empty line."""
    page = PAGE.read_text(encoding="utf-8")
    start = page.index(HEADER)
    end = page.index("\n\n", start) + 1
    PAGE.write_text(page[:start] + table() + page[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
