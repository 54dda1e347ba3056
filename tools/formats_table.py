"""Write the table "what works with what" into README.md, generated from plans, formats and kernels.

`python tools/formats_table.py`. A test compares the page with what this writes.
"""

from __future__ import annotations

from pathlib import Path

import tables
import torch

from fewbit import registry
from fewbit.formats.base import Format, large
from fewbit.kernels.nvidia import layout
from fewbit.plans import mixtures
from fewbit.plans.plan import PRESETS, Plan
from fewbit.schemes.base import Scheme, parse

PAGE = Path(__file__).resolve().parent.parent / "README.md"
COLUMNS = ("files", "plans", "codes are chosen by", "stay packed on", "who else reads them")


def main() -> None:
    tables.replace(PAGE, f"| {' | '.join(COLUMNS)} |", table())


def table() -> str:
    """One row for each format: those of plans first, in the order of the plans. In Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    every: dict[str, type[Format]] = dict(registry.entries("formats"))
    names = dict.fromkeys(
        [*(plan.format for plan in PRESETS.values()), *sorted(every, key=lambda n: every[n].read_only)]
    )
    for name in names:
        plans = [plan for plan in PRESETS.values() if plan.format == name]
        schemes = [scheme for plan in plans for scheme in schemes_of(plan)] or stored_in(every[name]())
        cells = (
            name,
            plans_cell(every[name], plans),
            chosen_by(plans or fitting(every[name]())),
            kernels(schemes),
            every[name].readers,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def schemes_of(plan: Plan) -> list[Scheme]:
    specs = [rule.scheme for rule in plan.rules if rule.scheme is not None]
    bases = [
        mixtures.MIXTURES[s.removeprefix(mixtures.PREFIX)].base if s.startswith(mixtures.PREFIX) else s for s in specs
    ]
    return [parse(spec) for spec in bases]


def stored_in(format: Format) -> list[Scheme]:
    """The schemes of a format that no preset names."""
    examples = [parse(spec) for family in registry.entries("schemes").values() for spec in family.examples]
    return [parse(spec) for spec in format.held] or [s for s in examples if format.why_not(large(s), s) is None]


def plans_cell(format: type[Format], plans: list[Plan]) -> str:
    if plans:
        return " ".join(f"`{plan.name}`" for plan in plans)
    if not format.read_only:
        return " ".join(f"`{plan.name}`" for plan in fitting(format())) + f", with `--format {format.name}`"
    moved = format.why_not_moved is not Format.why_not_moved
    return f"none; `fewbit convert --to {format.name}`" if moved else "none; read only"


def fitting(format: Format) -> list[Plan]:
    """The presets that the format stores if a user names it."""
    return [
        plan
        for plan in PRESETS.values()
        if all(format.why_not(large(scheme), scheme) is None for scheme in schemes_of(plan))
    ]


def chosen_by(plans: list[Plan]) -> str:
    called = {"rtn": "rounding to nearest", "gptq": "GPTQ", "awq": "AWQ", "imatrix": "weighted errors (imatrix)"}
    return ", ".join(dict.fromkeys(called[rule.method] for plan in plans for rule in plan.rules)) or "other tools"


def kernels(schemes: list[Scheme]) -> str:
    """Where a kernel of fewbit multiplies by packed weights of these schemes, and which it does not."""
    cpu, device = registry.get("kernels", "cpu")(), torch.device("cpu")
    lacks = {
        "CPU": [s for s in schemes if cpu.why_not(s, large(s), device, torch.bfloat16) is not None],
        "NVIDIA": [s for s in schemes if isinstance(layout.recipe(s, large(s)[1]), str)],
    }
    told: dict[str, list[str]] = {}  # what is missing -> where
    for place, without in lacks.items():
        if len(without) < len(schemes):
            told.setdefault(f" (not {', '.join(families(without))})" if without else "", []).append(place)
    return ", ".join(" and ".join(places) + missing for missing, places in told.items())


def families(schemes: list[Scheme]) -> list[str]:
    """Names of schemes; `iq2_*` in place of several that begin alike."""
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(map(str, schemes)):
        alike.setdefault(name.partition("_")[0], []).append(name)
    return [names[0] if len(names) == 1 else f"`{start}_*`" for start, names in alike.items()]


if __name__ == "__main__":
    main()
