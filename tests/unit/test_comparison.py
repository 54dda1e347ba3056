"""report.json: what is written is what is read, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewbit.comparison import KIND, SCHEMA_VERSION, Comparison
from fewbit.errors import FormatError

EXAMPLE = Path(__file__).parents[1] / "data" / "report.json"


@pytest.fixture
def data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(EXAMPLE.read_text())
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
        (lambda d: d.pop("kind"), "is no report of fewbit compare"),
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
    with pytest.raises(FormatError, match=r"report\.json is no report of fewbit compare"):
        Comparison.read(tmp_path)
