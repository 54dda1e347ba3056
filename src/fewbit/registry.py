"""The registry of schemes, methods, formats and kernels. Each family is a folder, and each file in it adds an entry.

A module registers its class with `@register("family", "name")`. `entries` and `get` import all modules of a family's
folder on first use. To add a scheme, method, format or kernel, add one file.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fewbit.errors import PlanError

FAMILIES = ("schemes", "methods", "formats", "kernels")

_entries: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES}
_loaded: set[str] = set()

T = TypeVar("T")


def register(family: str, name: str) -> Callable[[T], T]:
    """Class decorator: register the class (or value) as `name` in `family`."""

    def add(entry: T) -> T:
        if name in _entries[family]:
            raise RuntimeError(f"{family}: {name!r} is registered twice")
        _entries[family][name] = entry
        return entry

    return add


def entries(family: str) -> dict[str, Any]:
    """All entries of a family, name -> class, in the order of their file names."""
    if family not in _loaded:
        package = importlib.import_module(f"fewbit.{family}")
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
            importlib.import_module(f"fewbit.{family}.{module.name}")
        # One that was imported before the others has come first.
        _entries[family] = dict(sorted(_entries[family].items(), key=lambda entry: str(entry[1].__module__)))
        _loaded.add(family)
    return _entries[family]


def get(family: str, name: str) -> Any:
    """The entry `name` of a family, in any case. Raises PlanError with the closest names if there is none."""
    known = entries(family)
    if (lower := name.lower()) not in known:
        raise unknown(family[:-1], name, known)
    return known[lower]


def unknown(what: str, name: str, known: Iterable[str], others: Iterable[str] = ()) -> PlanError:
    """The error for an unknown name. Its hint is that of `near`."""
    return PlanError(f"unknown {what} {name!r}", near(name, known, others))


def near(name: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """A hint with the names that are closest to `name`; with all of `known` if none is close. others: more names."""
    known, name = sorted(known), name.lower()
    every = sorted({*known, *others})
    if longer := [each for each in every if name and each.startswith(f"{name}-")]:
        return f"Did you mean {' or '.join(longer[:3])}?"
    found = close(name, every)
    return f"Did you mean {' or '.join(found)}?" if found else f"Known: {', '.join(known)}."


def close(name: str, every: Iterable[str]) -> list[str]:
    """At most three of `every` that differ from `name` in the fewest characters; empty if none is close."""
    name = name.lower()
    ratios = {each: difflib.SequenceMatcher(None, name, each.lower()).ratio() for each in every}
    edits = {each: _edits(name, each.lower()) for each, ratio in ratios.items() if ratio >= 0.6}
    return sorted((each for each in edits if edits[each] == min(edits.values())), key=lambda each: -ratios[each])[:3]


def _edits(one: str, other: str) -> int:
    """The fewest characters to insert, delete or replace that make `one` of `other` (Levenshtein's distance)."""
    row = list(range(len(other) + 1))
    for i, here in enumerate(one, 1):
        before, row = row, [i]
        for j, there in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (here != there)))
    return row[-1]
