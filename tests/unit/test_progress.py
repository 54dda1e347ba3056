"""Progress of the verbs in a terminal, in a notebook, and where nobody watches."""

from __future__ import annotations

import io
import logging
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fewbit.measure.comparison import Event
from fewbit.pipeline.progress import Step
from fewbit.report import progress
from fewbit.report import text as report_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What is printed on stderr, which is a terminal."""
    buffer = Terminal()
    monkeypatch.setattr(report_text, "err", Console(file=buffer, width=120, force_terminal=True, _environ={}))
    return buffer


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The lines in a notebook's output: for each its texts, the last of which stays."""
    shown = list[list[str]]()

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        line = [data["text/plain"]]
        shown.append(line)
        return SimpleNamespace(update=lambda data, raw: line.append(data["text/plain"]))

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=True)))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return shown


def work(kind: str, steps: int, wanted: bool | None) -> None:
    """Report `steps` quick steps of one kind."""
    if kind == "window":
        with progress.windows(wanted) as window:
            for done in range(1, steps + 1):
                window(done, steps)
    elif kind == "step":
        with progress.steps(wanted) as step:
            for done in range(1, steps + 1):
                step(done, steps, 0.5)
    else:
        with progress.blocks(wanted) as block:
            for done in range(1, steps + 1):
                block(Step(done, steps, 0.5, resumed=False))


KINDS = pytest.mark.parametrize("kind", ["window", "step", "block"])


def test_off_a_terminal_blocks_are_lines(said: io.StringIO) -> None:
    with progress.blocks(True) as step:
        step(Step(1, 2, 0.0123, resumed=True))
        step(Step(2, 2, 0.0123, resumed=False))
    first, second = said.getvalue().splitlines()
    assert first.startswith("block 1/2  found")
    assert second.startswith("block 2/2  output error 1.23e-02")
    assert second.endswith("0 s left")


def test_what_is_no_block_is_counted_apart(said: io.StringIO) -> None:
    with progress.blocks(True) as step:
        step(Step(1, 1, None, resumed=False))
        step(Step(1, 1, 0.5, resumed=False, what="embeddings and head"))
    first, second = said.getvalue().splitlines()
    assert first.startswith("block 1/1  ")
    assert "error" not in first
    assert second.startswith("embeddings and head 1/1  output error 5.00e-01")


@KINDS
def test_off_a_terminal_the_first_and_last_are_lines(kind: str, said: io.StringIO) -> None:
    work(kind, 200, True)
    assert [" ".join(line.split()[:2]) for line in said.getvalue().splitlines()] == [f"{kind} 1/200", f"{kind} 200/200"]


@KINDS
def test_a_script_logs_its_progress(kind: str, said: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fewbit")
    work(kind, 200, None)
    assert not said.getvalue()
    assert [(r.name, r.levelname, r.message.split()[1]) for r in caplog.records] == [
        ("fewbit.progress", "INFO", "1/200"),
        ("fewbit.progress", "INFO", "200/200"),
    ]


@KINDS
def test_progress_can_be_turned_off(
    kind: str, terminal: Terminal, cells: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fewbit")
    work(kind, 3, False)
    assert not terminal.getvalue()
    assert not cells
    assert not caplog.records


@KINDS
@pytest.mark.parametrize("wanted", [None, True])
def test_a_terminal_has_a_bar(kind: str, wanted: bool | None, terminal: Terminal) -> None:
    work(kind, 3, wanted)
    assert kind in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


def test_a_bar_in_another_joins_its_display(terminal: Terminal) -> None:
    with progress.phase("merging", None), progress.blocks(None) as block:
        block(Step(1, 2, 0.5, resumed=False))
        with progress.windows(None) as window:
            window(1, 8)
        block(Step(2, 2, 0.5, resumed=False))
    assert all(part in terminal.getvalue() for part in ("merging", "1/8", "2/2"))
    with progress.windows(None) as window:  # the display can be opened again
        window(5, 8)
    assert "5/8" in terminal.getvalue()


def test_bars_of_two_threads_share_a_display(terminal: Terminal) -> None:
    meet = threading.Barrier(2)

    def one(total: int) -> None:
        with progress.windows(None) as window:
            meet.wait()
            window(1, total)
            meet.wait()

    threads = [threading.Thread(target=one, args=(total,)) for total in (21, 22)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "1/21" in terminal.getvalue()
    assert "1/22" in terminal.getvalue()


def test_a_file_is_no_terminal_whatever_colours_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.StringIO()
    monkeypatch.setattr(report_text, "err", Console(file=buffer, width=120, _environ={"FORCE_COLOR": "1"}))
    work("block", 3, None)
    assert not buffer.getvalue()


@KINDS
def test_a_notebook_has_one_line_that_changes(
    kind: str, said: io.StringIO, cells: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress._Cell, "GAP", 1e9)
    work(kind, 200, None)
    (line,) = cells
    assert [" ".join(text.split()[:2]) for text in line] == [kind, f"{kind} 1/200", f"{kind} 200/200"]
    assert not said.getvalue()


def test_a_function_is_called_and_nothing_is_shown(terminal: Terminal) -> None:
    seen = list[Any]()
    with progress.blocks(seen.append) as block:
        block(Step(1, 2, 0.5, resumed=False))
    with progress.windows(lambda *step: seen.append(step)) as window:
        window(1, 8)
    with progress.phase("merging", seen.append):
        pass
    assert seen == [Step(1, 2, 0.5, resumed=False), (1, 8)]
    assert not terminal.getvalue()


def test_a_comparison_says_what_it_does(said: io.StringIO) -> None:
    with progress.plans(True) as tell:
        for state in ("quantizing", "measuring"):
            for done in (0, 1, 2):
                tell(Event("nf4", 1, 2, state, done=done, of=2 if done else 0, unit="block"))
        tell(Event("nf4", 1, 2, "done", seconds=3.0))
        tell(Event("int8", 2, 2, "failed", reason="no [memory]"))
    assert said.getvalue().split("\n") == [
        "1/2  nf4         quantizing",
        "1/2  nf4         measuring",
        "1/2  nf4         done in 3 s",
        "2/2  int8        failed: no [memory]",
        "",
    ]


def test_slow_plans_have_lines_in_between(said: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.Lines, "GAP", 0.0)
    with progress.plans(True) as tell:
        tell(Event("nf4", 1, 2, "quantizing", done=1, of=2, unit="block"))
        tell(Event("nf4", 1, 2, "quantizing", done=2, of=2, unit="block"))
        tell(Event("nf4", 1, 2, "measuring", done=3, unit="run"))
        tell(Event("nf4", 1, 2, "measuring", done=1, of=8, unit="window"))
    assert [line[17:].partition("  ")[0] for line in said.getvalue().splitlines()] == [
        "quantizing",
        "quantizing block 1/2",
        "quantizing block 2/2",
        "measuring",
        "measuring run 3",
        "measuring window 1/8",
    ]


def test_a_comparison_in_a_terminal_is_one_bar(terminal: Terminal) -> None:
    with progress.plans(None) as tell:
        tell(Event("nf4", 1, 2, "quantizing", done=1, of=2, unit="block"))
        tell(Event("nf4", 1, 2, "done", seconds=3.0))
        tell(Event("int8", 2, 2, "measuring", done=3, unit="run"))
    assert "1/2  nf4         done in 3 s" in terminal.getvalue()
    assert "2/2  int8        measuring run" in terminal.getvalue()


def test_a_comparison_in_a_script_is_logged(said: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fewbit")
    with progress.plans(None) as tell:
        tell(Event("nf4", 1, 2, "measuring", done=3, unit="run"))
        tell(Event("nf4", 1, 2, "done", seconds=3.0))
    assert [record.message[17:] for record in caplog.records] == ["measuring", "done in 3 s"]
    assert not said.getvalue()


def lines_of(steps: int, seconds: float) -> list[int]:
    """The steps that have lines, where each of `steps` takes so many `seconds`."""
    now, lines = 0.0, list[str]()
    tell = progress.Lines("step", lines.append, lambda: now)
    for done in range(1, steps + 1):
        now += seconds
        tell(done, steps)
    return [int(line.split()[1].partition("/")[0]) for line in lines]


def test_slow_work_has_a_few_lines_a_minute() -> None:
    assert lines_of(40, 2.0) == [1, 9, 17, 25, 33, 40]


def test_very_long_work_has_a_line_a_hundredth() -> None:
    assert lines_of(1000, 20.0) == [*range(1, 1000, 10), 1000]


def test_the_time_left_counts_only_what_was_computed() -> None:
    now, lines = 0.0, list[str]()
    tell = progress.Lines("block", lines.append, lambda: now)
    tell(1, 4, "found", True)
    now = 20.0
    tell(2, 4)
    assert "left" not in lines[0]
    assert lines[1] == "block 2/4  20 s elapsed, 40 s left"


def test_tuning_counts_its_time_from_where_it_resumed(said: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (lambda: now, True))
    with progress.tuning(True) as tell:
        tell(75, 300, 0.5)
        now = 20.0
        tell(80, 300, 0.5)
    assert said.getvalue().splitlines() == [
        "step 75/300  held-out KL 0.5, found, from an interrupted run  0 s elapsed",
        "step 80/300  held-out KL 0.5  20 s elapsed, 14 min 40 s left",
    ]
