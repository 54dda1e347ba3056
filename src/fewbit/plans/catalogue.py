"""What there is: schemes, methods, formats, kernels and plans, each with what it is for."""

from __future__ import annotations

import sys

from fewbit import registry
from fewbit.methods.base import options
from fewbit.plans import plan as plans


def catalogue() -> dict[str, list[tuple[str, str, str | None]]]:
    """For each family, (name, what it is, why it is unavailable here): schemes, methods, formats, kernels, plans."""
    found: dict[str, list[tuple[str, str, str | None]]] = {}
    for family in registry.FAMILIES:
        rows = []
        for name, entry in registry.entries(family).items():
            what = (sys.modules[entry.__module__].__doc__ or "").strip().splitlines()[0]
            if family == "schemes":
                what += f" Such as {', '.join(entry.examples)}."
            if family == "methods" and (own := [each for each in options() if name in each.methods]):
                what += f" Options: {', '.join(f'{each.flag} ({each.shown})' for each in own)}."
            rows.append((name, what, entry().unavailable() if family == "kernels" else None))
        found[family] = rows
    found["plans"] = [
        (name, "; ".join(f"{r.match}: {r.scheme} by {r.method}" for r in plan.rules) + f"; {plan.format} files", None)
        for name, plan in plans.PRESETS.items()
    ]
    return found
