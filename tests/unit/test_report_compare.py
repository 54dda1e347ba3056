"""The table of a comparison: what it shows, what it marks, and that it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fewbit import units
from fewbit.measure.comparison import Comparison, Row, Timing
from fewbit.measure.intervals import Interval
from fewbit.report import columns, comparison, page

EXAMPLE = Comparison.read(Path(__file__).parents[1] / "data" / "report.json")


def shown(compared: Comparison, capsys: pytest.CaptureFixture[str], folder: str | None = "there") -> str:
    comparison.comparison(compared, folder)
    return capsys.readouterr().out


def line_of(plan: str, text: str) -> str:
    return " ".join(line for line in text.splitlines() if line.split()[:1] == [plan])


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_large_numbers_fit_too(capsys: pytest.CaptureFixture[str]) -> None:
    def large(row: Row) -> Row:
        if row.weights is None or row.speed is None or row.loss is None or row.generating is None:
            return row
        return replace(
            row,
            disk_bytes=141_000_000_000,
            weights=replace(row.weights, at_rest=141_000_000_000),
            generating=replace(row.generating, process=143_000_000_000),
            speed=replace(row.speed, load=321.0, prefill=replace(row.speed.prefill, median=31_412.0)),
            loss=replace(row.loss, perplexity=Interval(12345.6, 12000, 13000), kl=Interval(11.234, 10, 12)),
            quantizing=replace(row.quantizing, seconds=7000.0) if row.quantizing else None,
        )

    text = shown(replace(EXAMPLE, rows=tuple(map(large, EXAMPLE.rows))), capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_the_best_quantized_row_is_marked_not_the_original(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(EXAMPLE, capsys)
    assert "*" not in line_of("bf16", text)
    kl = {row.plan: row.loss.kl.value for row in EXAMPLE.rows if row.loss and row.plan != "bf16"}
    best = min(kl, key=lambda plan: kl[plan])
    assert f"*{columns.within(next(r.loss.kl for r in EXAMPLE.rows if r.plan == best and r.loss))}" in line_of(
        best, text
    )
    assert text.count("*100.0%") == 0


def test_a_failed_row_shows_why(capsys: pytest.CaptureFixture[str]) -> None:
    failed = Row("awq-4bit", "failed", reason="out of memory: 9 [bold]bytes[/bold]")
    text = shown(replace(EXAMPLE, rows=(*(r for r in EXAMPLE.rows if r.plan != "awq-4bit"), failed)), capsys)
    assert "awq-4bit failed: out of memory: 9 [bold]bytes[/bold]" in text


def test_it_says_what_was_reused_and_where_the_report_is(capsys: pytest.CaptureFixture[str]) -> None:
    fresh = replace(EXAMPLE, rows=tuple(replace(row, reused=False) for row in EXAMPLE.rows))
    assert "reused" not in shown(fresh, capsys)
    text = shown(replace(fresh, rows=tuple(replace(row, reused=True) for row in fresh.rows)), capsys)
    assert f"{len(fresh.rows)} of {len(fresh.rows)} rows are reused from an earlier comparison." in text
    assert "the report is in there" in text
    assert "the report is in" not in shown(fresh, capsys, None)


def test_samples_that_agree_stand_together(capsys: pytest.CaptureFixture[str]) -> None:
    rows = tuple(replace(row, sample=" the  same\nwords") for row in EXAMPLE.rows if row.done)
    text = " ".join(shown(replace(EXAMPLE, rows=rows), capsys).split())
    assert f"by {', '.join(row.plan for row in rows)}: the same words" in text


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.0312, 0.0290, 0.0333), ".031±.002"),
        (Interval(0.000254, 0.00024, 0.00027), "2.5e-4±1e-5"),
        (Interval(2.9671, 2.6, 3.3), "3.0±.3"),
        (Interval(10.52, 10.2, 10.9), "10.5±.4"),
        (Interval(11.2, 9.0, 13.0), "11±2"),
    ],
)
def test_an_interval_is_rounded_to_what_it_knows(interval: Interval, text: str) -> None:
    assert columns.within(interval) == text


def test_the_page_and_the_terminal_write_the_same_rate(capsys: pytest.CaptureFixture[str]) -> None:
    def timed(row: Row) -> Row:
        return replace(row, speed=replace(row.speed, prefill=Timing(1234, 1000, 2000, 3))) if row.speed else row

    compared = replace(EXAMPLE, rows=tuple(map(timed, EXAMPLE.rows)))
    done = sum(row.speed is not None for row in EXAMPLE.rows)
    assert shown(compared, capsys).count("1,234") == page.page(compared).count(">1,234<") == done


def faster(row: Row, median: float, low: float, high: float) -> Row:
    """The row with another speed of decoding."""
    assert row.speed is not None
    decode = Timing(median, low, high, 9, Interval(median, low, high))
    return replace(row, speed=replace(row.speed, decode=decode))


def test_the_fastest_is_marked_where_intervals_part(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(EXAMPLE, capsys)
    assert "*88±3" in line_of("gptq-4bit", text)
    assert text.count("*88") == 1
    rows = tuple(faster(row, 61, 11.8, 87.1) if row.plan == "int8" else row for row in EXAMPLE.rows)
    noisy = shown(replace(EXAMPLE, rows=rows), capsys)
    assert "88±3" in noisy
    assert "*88" not in noisy
    assert "note: speed is noisy here: decode of int8, 11.8 to 87.1 tokens/s after 9 runs" in " ".join(noisy.split())


def test_what_is_measured_once_has_no_best(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(EXAMPLE, capsys)
    for row in EXAMPLE.rows:
        if row.speed is not None:
            assert f"*{units.duration(row.speed.load)}" not in text
            assert f"*{units.size(columns.peak(row) or 0)}" not in text
