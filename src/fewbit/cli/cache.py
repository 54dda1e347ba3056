"""Show what the cache keeps, and delete it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fewbit import registry
from fewbit.cli.options import Json, printed
from fewbit.system import kept
from fewbit.system.cache import cache_folder

_CHOICES = (*kept.KINDS, "abandoned", "all")


def cache(
    clear: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help=f"Delete the entries of this kind: {', '.join(_CHOICES)}. all leaves out rescued.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what the cache keeps, with sizes and ages. --clear deletes it."""
    if clear is not None and clear not in _CHOICES:
        raise registry.unknown("kind of entry", clear, _CHOICES)
    from fewbit.report import text as report

    folder, entries = cache_folder(), kept.entries()
    chosen = [each for each in entries if _matches(each, clear)]
    if as_json:
        gone = [each for each in chosen if kept.delete(each)]
        printed({"folder": str(folder), "entries": [_plain(each, each in gone) for each in entries]})
        return
    if clear is None:
        report.cache(str(folder), entries)
        chosen = [each for each in entries if each.abandoned]
        if not chosen or not _agreed(len(chosen)):
            return
    gone = [each for each in chosen if kept.delete(each)]
    report.cleared(gone, [each for each in chosen if each not in gone])


def _matches(entry: kept.Entry, clear: str | None) -> bool:
    if clear == "all":
        return entry.kind != "rescued"
    return entry.abandoned if clear == "abandoned" else entry.kind == clear


def _agreed(count: int) -> bool:
    """Ask in a terminal whether to delete abandoned runs. Elsewhere say how to do it."""
    runs = "1 run was" if count == 1 else f"{count} runs were"
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        return typer.confirm(f"{runs} not continued for a month. Delete?")
    print(f"{runs} not continued for a month. `fewbit cache --clear abandoned` deletes what they left.")
    return False


def _plain(entry: kept.Entry, deleted: bool) -> dict[str, Any]:
    return {**asdict(entry), "path": str(entry.path), "abandoned": entry.abandoned, "deleted": deleted}
