"""The report as a page: whatever models wrote stays text, and every comparison gives one, an empty one too."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fewbit.measure.comparison import Comparison, Row
from fewbit.measure.intervals import Interval
from fewbit.report import page

REPORT = Path(__file__).parent.parent / "data" / "report.json"
EVIL = "</title></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\ud800"


@pytest.fixture
def comparison() -> Comparison:
    return Comparison.read(REPORT)


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts += data


def test_the_page_holds_every_plan_and_why_one_failed(comparison: Comparison) -> None:
    text = _Tags(page.page(comparison)).texts
    for row in comparison.rows:
        assert row.plan in text
        assert row.done or f"Failed: {row.reason}" in text


def test_nothing_that_a_model_or_a_file_says_becomes_markup(comparison: Comparison) -> None:
    rows = tuple(
        replace(row, plan=EVIL, what=EVIL, reason=EVIL, sample=EVIL, notes=(EVIL,), errors={f"{EVIL}.0.{EVIL}": 0.1})
        for row in comparison.rows
    )
    machine = replace(comparison.machine, cpu=EVIL, devices=(EVIL,))
    evil = replace(comparison, model=EVIL, architecture=EVIL, prompt=EVIL, date=EVIL, machine=machine, rows=rows)
    tags = _Tags(page.page(evil)).found
    assert [tag for tag, _ in tags if tag in ("script", "img", "iframe", "object")] == ["script"]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]


def test_nothing_points_outside_the_page(comparison: Comparison) -> None:
    tags = _Tags(page.page(comparison)).found
    links = [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href", "action")]
    assert links == ["data:,"]
    assert "url(" not in page.page(comparison)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_few_rows_make_a_page_too(comparison: Comparison, kept: int, tmp_path: Path) -> None:
    page.write(replace(comparison, rows=comparison.rows[:kept]), tmp_path)
    assert (tmp_path / "index.html").stat().st_size > 4000


def test_only_failed_rows_make_a_page_too(comparison: Comparison, tmp_path: Path) -> None:
    row = Row(plan="gptq-4bit", status="failed", reason="no memory")
    page.write(replace(comparison, rows=(row, row), calibration=None), tmp_path)
    text = _Tags((tmp_path / "index.html").read_text(encoding="utf-8")).texts
    assert "Failed: no memory" in text
    assert "What quality costs" not in text


def test_the_charts_are_files_of_their_own(comparison: Comparison, tmp_path: Path) -> None:
    notes = page.write(comparison, tmp_path)
    for name in ("quality-size", "quality-speed"):
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.attrib["role"] == "img"
        if not notes:
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert notes == [] or "was written" in notes[0]


def test_numbers_for_sorting_are_the_exact_ones(comparison: Comparison) -> None:
    cells = [a for tag, a in _Tags(page.page(comparison)).found if tag == "td" and a.get("data-of") == "kl"]
    losses = [row.loss.kl.value for row in comparison.rows if row.loss]
    assert [float(cell["data-value"] or "") for cell in cells] == losses


def test_the_best_of_a_column_is_bold_unless_all_are_alike(comparison: Comparison) -> None:
    def bold(shown: Comparison) -> list[str | None]:
        tags = _Tags(page.page(shown)).found
        return [a["data-of"] for tag, a in tags if tag == "td" and "best" in (a.get("class") or "").split()]

    assert bold(comparison).count("kl") == 1
    assert bold(replace(comparison, rows=(comparison.rows[0], comparison.rows[1], comparison.rows[1]))) == []


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("a dog ran", "a dog ran", 9),
        ("a dog ran", "a dot ran", 2),
        ("a dog", "a dog ran", 5),
        ("x", "y", 0),
        ("", "y", 0),
        ("There was", "There, was", 5),
        ("Lily\nran", "Lily\nwent", 5),
        ("Lily (a girl)", "Lily [a girl]", 5),
        ("Lily", "Lily's", 4),
        ("Lil", "Lily", 0),
        ("Übermut", "Über", 0),
        ("他去了学校", "他去了公园", 3),
    ],
)
def test_texts_part_at_a_word(text: str, other: str, same: int) -> None:
    assert page._agreed(text, other) == same


def timed(comparison: Comparison, plan: str, interval: Interval | None) -> Comparison:
    """The comparison with another interval of one plan's decoding."""

    def changed(row: Row) -> Row:
        if row.plan != plan or row.speed is None:
            return row
        return replace(row, speed=replace(row.speed, decode=replace(row.speed.decode, interval=interval)))

    return replace(comparison, rows=tuple(map(changed, comparison.rows)))


def test_the_fastest_is_named_where_intervals_part(comparison: Comparison) -> None:
    assert "Fastest decodinggptq-4bit88 tokens/s" in _Tags(page.page(comparison)).texts
    for interval in (Interval(61, 11.8, 87.0), None):
        text = _Tags(page.page(timed(comparison, "int8", interval))).texts
        assert "Fastest decodingno clear winner95 % intervals do not separate int8, gptq-4bit" in text


def test_noise_is_said_on_the_page(comparison: Comparison) -> None:
    assert "noisy" not in page.page(comparison)
    assert "speed is noisy here: decode of int8" in page.page(timed(comparison, "int8", Interval(61, 11.8, 87.0)))


def test_no_point_is_on_the_front_by_chance(comparison: Comparison) -> None:
    def fronts(shown: Comparison) -> list[str]:
        return re.findall(r"On the front: [^.]*\.(?: Undecided: [^.]*\.)?", _Tags(page.page(shown)).texts)

    made = replace(comparison, rows=comparison.rows[1:])  # the original beats them all
    size, speed = fronts(made)
    assert speed == "On the front: int8, gptq-4bit."
    noisy = fronts(timed(made, "int8", Interval(61, 11.8, 182.1)))
    assert noisy[0] == size
    assert noisy[1] == "On the front: int8. Undecided: q4_k_m, gptq-4bit."
    assert fronts(timed(made, "gptq-4bit", None))[1] == "On the front: int8. Undecided: gptq-4bit."


def test_memory_beside_weights_is_said_in_bytes(comparison: Comparison) -> None:
    text = _Tags(page.page(comparison)).texts
    assert "at rest +\u00a03.1\u00a0MB" in text
    assert "added by loading" in text
