"""The rows of `fewbit list`: all schemes, methods, formats, kernels and plans, with a description of each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from fewbit import registry
from fewbit.formats.base import storing
from fewbit.methods.base import options
from fewbit.plans import plan as plans
from fewbit.schemes.base import parse


@dataclass(frozen=True)
class Entry:
    """A row of `fewbit list`. unavailable: why this machine cannot use it; None if it can.

    formats: for a scheme, its examples and the formats that store each; else None.
    """

    name: str
    what: str
    unavailable: str | None = None
    formats: dict[str, list[str]] | None = None

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "what": self.what, "unavailable": self.unavailable}
        return row if self.formats is None else {**row, "formats": self.formats}


def catalogue() -> dict[str, list[Entry]]:
    """The entries of each family: schemes, methods, formats, kernels, plans."""
    families: dict[str, list[Entry]] = {}
    for family in registry.FAMILIES:
        rows = []
        for name, entry in registry.entries(family).items():
            what = (sys.modules[entry.__module__].__doc__ or "").strip().splitlines()[0]
            if family == "schemes":
                rows.append(_scheme(name, what, entry.examples))
                continue
            if family == "methods" and (own := [each for each in options() if name in each.methods]):
                what += f" Options: {', '.join(f'{each.flag} ({each.shown})' for each in own)}."
            rows.append(Entry(name, what, entry().unavailable() if family == "kernels" else None))
        families[family] = rows
    families["plans"] = [
        Entry(
            name,
            "; ".join(f"{r.match}: {r.scheme} by {r.method}" for r in plan.rules)
            + ("; servers round activations too" if plan.activations else "")
            + f"; {plan.format} files",
        )
        for name, plan in plans.PRESETS.items()
    ]
    return families


def _scheme(name: str, what: str, examples: tuple[str, ...]) -> Entry:
    formats = {spec: storing(parse(spec)) for spec in examples}
    stored, others = [s for s in examples if formats[s]], [s for s in examples if not formats[s]]
    what += f" For example {', '.join(stored or others)}."
    if stored and others:
        what += f" No format stores these yet: {', '.join(others)}."
    return Entry(name, what, None if stored else "no format stores it yet", formats)
