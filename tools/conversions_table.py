"""Write the table of exact conversions, generated from the schemes and formats, into docs/reference.md.

`python tools/conversions_table.py`. A test compares the page with what this writes.
"""

from __future__ import annotations

from pathlib import Path

import tables

from fewbit import registry
from fewbit.formats.base import Format, large
from fewbit.plans.targets import DENSE, targets
from fewbit.schemes import exact
from fewbit.schemes.base import Scheme, parse

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
FIRST = "stored as"
# Groups of GGUF's blocks, and what ModelOpt's files hold.
MORE = ("int4-g32", "int4-g32-sym", "int5-g32-sym", "int8-g32-sym", "nvfp4-mul")


def main() -> None:
    tables.replace(PAGE, f"| {FIRST} |", table())


def table() -> str:
    """For each scheme that a format stores: whether each format holds its values exactly. In Markdown."""
    formats = {target.format.name: target.format for target in targets().values()}
    del formats[DENSE]
    examples = [spec for family in registry.entries("schemes").values() for spec in family.examples]
    rows: dict[tuple[str, ...], list[str]] = {}
    for spec in dict.fromkeys([*examples, *MORE]):
        cells = tuple(cell(parse(spec), format) for format in formats.values())
        if set(cells) != {"no"}:
            rows.setdefault(cells, []).append(spec)
    lines = [f"| {FIRST} | {' | '.join(formats)} |", f"|{'---|' * (len(formats) + 1)}"]
    lines += [f"| {', '.join(f'`{spec}`' for spec in specs)} | {' | '.join(cells)} |" for cells, specs in rows.items()]
    return "\n".join(lines) + "\n"


def cell(scheme: Scheme, format: Format) -> str:
    """What the format makes of a weight of this scheme."""
    shape = large(scheme)
    found = []
    for form in exact.forms(scheme, shape):
        if str(form.scheme).endswith("-bf16") > str(scheme).endswith("-bf16"):
            continue  # a form that a bfloat16 model may get, with the same values
        if format.why_not_moved(shape, form.scheme) is None:
            name = "exact" if form.scheme == scheme else f"exact as `{form.scheme}`"
            found.append(f"{name}, if the values fit" if form.checked else name)
            if not form.checked:
                break
    return "; ".join(dict.fromkeys(found)) or "no"


if __name__ == "__main__":
    main()
