"""README's numbers are those that commands print: sizes from the exact account of `estimate`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import fewbit
from fewbit.api import compare
from fewbit.measure.comparison import Comparison
from fewbit.units import size

ROOT = Path(__file__).resolve().parents[2]
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def stated() -> dict[str, list[str]]:
    """The cells of README's table of plans, by plan."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = page[page.index("| plan | on disk |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {plan: cells for plan, *cells in rows}


def nbytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * _UNITS[unit]


def test_the_sizes_in_the_readme_are_those_of_estimate() -> None:
    exact = {row.plan: row for row in fewbit.estimate("tiny").plans}
    told = stated()
    assert set(told) == set(compare.PLANS)
    for plan, (disk, rest, *_) in told.items():
        # Rotary frequencies, 128 bytes, are in memory too.
        assert rest in (size(exact[plan].weights_bytes), size(exact[plan].weights_bytes + 128)), plan
        # A file is its tensors and a header; a GGUF file has the tokenizer, too.
        beside = nbytes(disk) - exact[plan].file_bytes
        assert -5_000 <= beside < (200_000 if exact[plan].format == "gguf" else 60_000), plan


@pytest.mark.parametrize("command", ["chat", "serve", "push", "run", "cache", "--install-completion"])
def test_what_is_done_with_a_model_has_a_line_each(command: str) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = page[page.index("\n## More\n") :].splitlines()
    assert len([line for line in lines if line.startswith(f"- `fewbit {command}")]) == 1


def test_the_losses_in_the_readme_are_in_order_of_the_priors() -> None:
    losses = {plan: float(cells[3].split(" ")[0]) for plan, cells in stated().items()}
    assert losses["bf16"] == 0 < losses["int8"] < losses["q4_k_m"] < losses["gptq-4bit"] < losses["nf4"]


def test_the_tool_writes_rows_as_they_stand() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tools" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    lines = tool.table(Comparison.read(ROOT / "tests" / "data" / "report.json")).splitlines()
    assert lines[0] in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"\| int8 \| 8.42 MB \| 8.42 MB \| 6.430 \| 0.0036 ± 0.0002 \| 98.1 % \|", lines[3])
