"""The report in a real browser: it renders, sorts, complains of nothing and asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fewbit.measure.comparison import Comparison
from fewbit.report import page as html
from tests.browser import Tab

REPORT = Path(__file__).parent.parent / "data" / "report.json"
EVIL = "<script>document.title = 'taken'</script><img src='https://example.com/x' onerror='document.title=1'>"
PLANS = "[...document.querySelectorAll('tbody th')].map((th) => th.firstChild.textContent)"
NUMBERS = "[...document.querySelectorAll('tbody td[data-of={}]')].map((td) => Number(td.dataset.value))"


@pytest.fixture
def page(tab: Tab, tmp_path: Path) -> Iterator[Path]:
    """A report of a comparison whose texts attack it, opened; afterwards the browser has no complaints to tell."""
    comparison = Comparison.read(REPORT)
    rows = tuple(replace(row, sample=EVIL, what=EVIL) for row in comparison.rows)
    html.write(replace(comparison, model=EVIL, rows=rows), tmp_path)
    tab.requests.clear()
    tab.complaints.clear()
    tab.look(1280)
    tab.open(tmp_path / "index.html")
    yield tmp_path / "index.html"
    assert tab.complaints == []
    assert tab.requests == [(tmp_path / "index.html").as_uri()]


def test_it_renders_and_texts_stay_texts(tab: Tab, page: Path) -> None:
    assert tab.run("document.querySelector('h1').textContent") == EVIL
    assert EVIL in tab.run("document.title")
    assert tab.run("document.querySelectorAll('img').length") == 0
    assert tab.run("document.querySelectorAll('.sample').length") == 5
    assert tab.run("[...document.querySelectorAll('svg.wide circle')].length") == 10
    assert tab.run("[...document.querySelectorAll('svg')].every((s) => s.getAttribute('role') === 'img')")


def test_a_click_sorts_and_failed_rows_stay_last(tab: Tab, page: Path) -> None:
    header = "document.querySelector('th[data-column={}]')"
    decode = header.format("decode")
    for order in ("descending", "ascending"):  # the better end comes first
        tab.run(f"{decode}.querySelector('button').click()")
        numbers = tab.run(NUMBERS.format("decode"))
        assert numbers == sorted(numbers, reverse=order == "descending")
        assert tab.run(f"{decode}.getAttribute('aria-sort')") == order
        assert tab.run(PLANS)[-1] == "awq-4bit"
    assert tab.run("document.querySelectorAll('[aria-sort]').length") == 1
    tab.run(f"{header.format('plan')}.querySelector('button').click()")
    assert tab.run(PLANS) == sorted(tab.run(PLANS))


def test_the_keyboard_sorts(tab: Tab, page: Path) -> None:
    tab.run("document.querySelector('th[data-column=disk] button').focus()")
    tab.key("Enter", 13, "\r")
    numbers = tab.run(NUMBERS.format("disk"))
    assert numbers == sorted(numbers)
    tab.key("Tab", 9)
    assert tab.run("document.activeElement.closest('th').dataset.column") == "bits"


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_width_makes_the_page_wider_than_the_window(tab: Tab, page: Path, width: int) -> None:
    tab.look(width)
    assert tab.run("document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('svg.{}')].every((s) => getComputedStyle(s).display === 'block')"
    assert tab.run(shown.format("narrow" if width < 640 else "wide"))


@pytest.mark.parametrize("width", [390, 768, 1024, 1280, 1600, 2560])
def test_the_table_is_not_cut_without_a_cue(tab: Tab, page: Path, width: int) -> None:
    tab.look(width)
    tab.open(page)
    tab.requests.pop()
    place = "document.querySelector('.scroll')"
    cue = "getComputedStyle(document.querySelector('.more')).display"
    cut = tab.run(f"{place}.scrollWidth > {place}.clientWidth + 1")
    assert tab.run(cue) == ("block" if cut else "none")
    assert not (cut and width >= 1600)
    if width >= 1280:
        for memory in ("loading", "generating", "resident"):
            cell = f"document.querySelector('td[data-of={memory}]').getBoundingClientRect()"
            assert 0 < tab.run(f"{cell}.left") < tab.run(f"{cell}.right") <= width
    tab.run(f"{place}.scrollTo(1e6, 0)")
    tab.run(f"{place}.dispatchEvent(new Event('scroll'))")
    assert tab.run(cue) == "none"  # at its end nothing more is to be seen


def test_light_and_dark(tab: Tab, page: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    tab.look(1280, dark=True)
    dark = tab.run(paper)
    tab.look(1280)
    assert (tab.run(paper), dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")
