"""report.json: what is written is what is read, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import FormatError
from fewbit.measure.comparison import KIND, SCHEMA_VERSION, Comparison, Timing, leaders, winners
from fewbit.measure.intervals import Interval

EXAMPLE = Path(__file__).parents[1] / "data" / "report.json"


@pytest.fixture
def data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    return found


def test_a_report_is_read_as_it_was_written(data: dict[str, Any]) -> None:
    read = Comparison.from_json(data)
    assert json.loads(json.dumps(read.to_json())) == data
    assert Comparison.from_json(read.to_json()) == read == Comparison.read(EXAMPLE) == Comparison.read(EXAMPLE.parent)
    assert list(data)[:2] == ["kind", "schema_version"]
    assert (data["kind"], data["schema_version"]) == (KIND, SCHEMA_VERSION)


def test_what_a_later_version_adds_is_ignored(data: dict[str, Any]) -> None:
    read = Comparison.from_json(data)
    data["new"] = 1
    data["rows"][0]["speed"]["new"] = {}
    assert Comparison.from_json(data) == read


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("kind"), "is not a report of fewbit compare"),
        (lambda d: d.update(schema_version=0), "schema_version 0, this fewbit reads and writes 1"),
        (lambda d: d.pop("rows"), "lacks rows"),
        (lambda d: d.update(rows={}), "rows is '{}', which has the wrong type"),
        (lambda d: d["rows"][0].update(status="perhaps"), "status is 'perhaps', expected one of 'done', 'failed'"),
        (
            lambda d: d["rows"][1]["speed"]["decode"].update(median="fast"),
            r"rows\[1\]: speed: decode: median is 'fast'",
        ),
        (lambda d: d["rows"][1]["weights"].update(at_rest=True), "at_rest is 'True'"),
        (lambda d: d["rows"][1].update(errors={"a": None}), "errors.a is 'None'"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], change: Any, words: str) -> None:
    change(data)
    with pytest.raises(FormatError, match=words):
        Comparison.from_json(data, "there/report.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '{"kind": "another"}'])
def test_a_foreign_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=r"report\.json is not a report of fewbit compare"):
        Comparison.read(tmp_path)


def test_a_report_without_intervals_is_read(data: dict[str, Any]) -> None:
    for row in data["rows"]:
        for timing in (row["speed"] or {}).values():
            if isinstance(timing, dict):
                del timing["interval"]
    read = Comparison.from_json(data)
    assert all(row.speed.decode.interval is None for row in read.rows if row.speed)
    assert read.noise is None


@pytest.mark.parametrize(
    ("values", "interval"),
    [
        ([1, 2, 3, 4, 5], None),
        ([6, 1, 5, 2, 4, 3], Interval(3.5, 1, 6)),
        ([1, 2, 3, 4, 5, 6, 7, 8, 900], Interval(5, 2, 8)),  # one run that was disturbed is left out
        (list(range(1, 31)), Interval(15.5, 10, 21)),
    ],
)
def test_the_interval_of_a_median(values: list[float], interval: Interval | None) -> None:
    assert Timing.of(values).interval == interval


A, B, C, ZERO = Interval(1, 0.5, 1.5), Interval(2, 1.4, 2.5), Interval(9, 8, 10), Interval(0, 0, 0)


@pytest.mark.parametrize(
    ("found", "more_is_better", "first", "won"),
    [
        ([A, B, C], False, [0, 1], []),
        ([A, B, C], True, [2], [2]),
        ([A, C], False, [0], [0]),
        ([A, None, C], False, [0, 1], []),
        ([None, None], True, [], []),
        ([ZERO, ZERO, A], False, [0, 1], [0, 1]),  # exactly alike, as bytes may be
        ([ZERO, ZERO], False, [0, 1], []),
        ([A], False, [0], []),
        ([], False, [], []),
    ],
)
def test_a_winner_is_told_apart_from_all_others(
    found: list[Interval | None], more_is_better: bool, first: list[int], won: list[int]
) -> None:
    assert leaders(found, more_is_better=more_is_better) == first
    assert winners(found, more_is_better=more_is_better) == won


def test_noise_is_said(data: dict[str, Any]) -> None:
    assert Comparison.from_json(data).noise is None
    data["rows"][2]["speed"]["decode"]["interval"].update(low=11.8, high=82.1)
    data["rows"][3]["speed"]["prefill"]["interval"].update(low=3000)
    noise = Comparison.from_json(data).noise
    assert noise is not None
    assert "decode of nf4 and 1 more, 11.8 to 82.1 tokens/s after 9 runs" in noise
