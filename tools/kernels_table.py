"""Write the table "which kernel serves which weights where" into docs/reference.md, from the kernels themselves.

`python tools/kernels_table.py`. A test compares the page with what this writes.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fewbit import registry
from fewbit.formats.base import large
from fewbit.kernels.nvidia import layout
from fewbit.schemes.base import Scheme, parse

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
HEADER = "| weights | CPU | CPU, without the C++ library | NVIDIA GPU with Triton |"


def main() -> None:
    """Replace the table, which begins with its header and ends at the first empty line."""
    page = PAGE.read_text(encoding="utf-8")
    start = page.index(HEADER)
    end = page.index("\n\n", start) + 1
    PAGE.write_text(page[:start] + table() + page[end:], encoding="utf-8")


def table() -> str:
    """One row for those schemes of a family that the same kernels serve, activations in bfloat16. In Markdown."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, family in registry.entries("schemes").items():
        for spec in family.examples:
            alike.setdefault((name, *serving(parse(spec))), []).append(spec)
    lines = [HEADER, "|---|---|---|---|"]
    lines += [f"| {', '.join(f'`{spec}`' for spec in specs)} | {' | '.join(by)} |" for (_, *by), specs in alike.items()]
    return "\n".join(lines) + "\n"


def serving(scheme: Scheme) -> tuple[str, ...]:
    """The kernels of the table's columns; that of a GPU is decided by its layouts, so none is needed."""
    shape, cpu = large(scheme), torch.device("cpu")
    kernels = sorted((kernel() for kernel in registry.entries("kernels").values()), key=lambda k: -k.priority)
    fit = [k.name for k in kernels if k.priority >= 0 and k.why_not(scheme, shape, cpu, torch.bfloat16) is None]
    nvidia = isinstance(layout.recipe(scheme, shape[1]), layout.Recipe)
    return fit[0], next(name for name in fit if name not in ("cpu", "cpu_exact")), "nvidia" if nvidia else "reference"


if __name__ == "__main__":
    main()
