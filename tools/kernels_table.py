"""Write the table "which kernel serves which weights where" into docs/reference.md, from the kernels themselves.

`python tools/kernels_table.py`. A test compares the page with what this writes.
"""

from __future__ import annotations

from itertools import groupby, product
from pathlib import Path

import tables
import torch

from fewbit import registry
from fewbit.formats.base import large
from fewbit.kernels.nvidia import layout
from fewbit.schemes.base import Scheme, parse

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
HEADER = "| weights | CPU | CPU, without the C++ library | NVIDIA GPU with Triton |"
_GROUPS = ("g16", "g32", "g64", "g128", "g256", "g512", "g1024", "row")


def main() -> None:
    tables.replace(PAGE, HEADER, table())


def table() -> str:
    """One row for those schemes of a family that the same kernels serve, activations in bfloat16. In Markdown."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, family in registry.entries("schemes").items():
        for spec in family.examples if name != "affine" else ():
            alike.setdefault((name, *serving(parse(spec))), []).append(spec)
    rows = [(", ".join(f"`{spec}`" for spec in specs), by) for (_, *by), specs in alike.items()]
    return (
        "\n".join(
            [HEADER, "|---|---|---|---|", *(f"| {what} | {' | '.join(by)} |" for what, by in [*integers(), *rows])]
        )
        + "\n"
    )


def integers() -> list[tuple[str, tuple[str, ...]]]:
    """The rows of integers: all bits and groups are asked for, so the words hold for each of them."""
    alike: dict[tuple[str, ...], list[tuple[int, str, bool]]] = {}
    for bits, group, symmetric in product(range(2, 9), _GROUPS, (False, True)):
        scheme = parse(f"int{bits}-{group}{'-sym' if symmetric else ''}")
        alike.setdefault(serving(scheme), []).append((bits, group, symmetric))
    *special, (rest, others) = sorted(alike.items(), key=lambda entry: len(entry[1]))
    rows = [(_words(which), by) for by, which in special]
    return [*rows, (f"all other integers, of {_listed(sorted({bits for bits, _, _ in others}))} bits", rest)]


def _words(which: list[tuple[int, str, bool]]) -> str:
    """Names of the integers `which`. An error if they are more or fewer than the words say."""
    bits, groups, symmetric = {b for b, _, _ in which}, {g for _, g, _ in which}, {s for _, _, s in which}
    assert len(which) == len(bits) * len(groups) * len(symmetric)
    words = f"integers of {_listed(sorted(bits))} bits"
    if len(symmetric) == 1:
        words += ", symmetric" if True in symmetric else ", asymmetric"
    if len(groups) < len(_GROUPS):
        words += f", in groups of {_listed([int(group.removeprefix('g')) for group in _GROUPS if group in groups])}"
    return words


def _listed(numbers: list[int]) -> str:
    """2, 3, 4, 8 as "2 to 4 and 8"."""
    steps = [[k for _, k in run] for _, run in groupby(enumerate(numbers), lambda entry: entry[1] - entry[0])]
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in steps]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def serving(scheme: Scheme) -> tuple[str, ...]:
    """The kernels of the table's columns; that of a GPU is decided by its layouts, so none is needed."""
    shape, cpu = large(scheme), torch.device("cpu")
    kernels = sorted((kernel() for kernel in registry.entries("kernels").values()), key=lambda k: -k.priority)
    fit = [k.name for k in kernels if k.priority >= 0 and k.why_not(scheme, shape, cpu, torch.bfloat16) is None]
    nvidia = isinstance(layout.recipe(scheme, shape[1]), layout.Recipe)
    return fit[0], next(name for name in fit if name not in ("cpu", "cpu_exact")), "nvidia" if nvidia else "reference"


if __name__ == "__main__":
    main()
