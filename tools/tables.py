"""Write a table into a page of the documentation."""

from __future__ import annotations

from pathlib import Path


def replace(page: Path, header: str, table: str) -> None:
    """Replace the table of a page that begins with the line `header` and ends at the first empty line."""
    text = page.read_text(encoding="utf-8")
    start = text.index(header)
    end = text.index("\n\n", start) + 1
    page.write_text(text[:start] + table + text[end:], encoding="utf-8")
