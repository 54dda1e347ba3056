"""The documentation site: it builds without a warning, loads nothing from elsewhere, and every page is reachable."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.main import get_command

import fewbit
from fewbit.cli.app import app
from tests.browser import Tab
from tests.limits import HANG

pytest.importorskip("mkdocs")
pytest.importorskip("material")

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (
    "index.html",
    "tutorials/gptq.html",
    "reference/command-line.html",
    "reference/api.html",
    "howto/choose.html",
    "benchmarks/2026-11-gguf.html",
    "examples.html",
)


class Links(HTMLParser):
    """`found`: what a page links to or loads. `ids`: its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        if id := said.get("id"):
            self.ids.add(id)
        if tag == "a" and (link := said.get("href")):
            self.found.append(link)
        if link := said.get("src") or (said.get("href") if tag == "link" else None):
            self.loaded.append(link)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """A server of the site on this machine: browsers allow no search in pages that are opened as files."""
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools"), "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def read(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def test_every_page_is_reached_and_every_link_leads_to_one(site: Path) -> None:
    pages = {page.resolve(): read(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 60
    reached, left = set(), [(site / "index.html").resolve()]
    while left:
        page = left.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in pages[page].found:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            to = (page.parent / unquote(path)).resolve() if path else page
            to = to / "index.html" if to.is_dir() else to
            assert to.exists(), f"{page.name}: {link}"
            if to.suffix == ".html":
                assert not anchor or unquote(anchor) in pages[to].ids, f"{page.name}: {link}"
                left.append(to)
    assert reached == set(pages)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for link in read(page).loaded:
            assert not re.match(r"[a-z]+:|//", link) or link.startswith("data:"), f"{page.name}: {link}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_pages_that_are_made_say_what_is_in_the_code(site: Path) -> None:
    page = site / "reference" / "command-line.html"
    assert {f"fewbit-{name}" for name in get_command(app).commands} <= read(page).ids  # type: ignore[attr-defined]
    assert "Default: gptq-4bit." in page.read_text(encoding="utf-8")
    ids = read(site / "reference" / "api.html").ids
    assert {f"fewbit.{name}" for name in fewbit.__all__} <= ids
    assert {"quality", "interval", "tensorreport"} <= ids  # types of fields of results
    assert 'id="plans-title"' in (site / "howto" / "choose.html").read_text(encoding="utf-8")
    results = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert results == {path.stem for path in (site / "benchmarks").glob("2*.html")}
    for stem in results:
        text = (site / "benchmarks" / f"{stem}.html").read_text(encoding="utf-8")
        marks = (ROOT / "benchmarks" / "results" / f"{stem}.md").read_text(encoding="utf-8").count("<!-- chart")
        assert text.count('<div class="figure"') >= marks, stem
        assert "<!-- chart" not in text, stem
    scripts = read(site / "examples.html").ids
    assert {path.name.replace(".", "") for path in (ROOT / "examples" / "scripts").glob("*.py")} <= scripts
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("NF4" in entry["text"] for entry in index["docs"])


@pytest.mark.parametrize("width", [390, 1300])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_fit_the_window(address: str, tab: Tab, width: int, dark: bool) -> None:
    """In a browser: nothing is wider than the window, and the colors are those that the system prefers."""
    tab.look(width, dark=dark)
    for page in SHOWN:
        tab.open(f"{address}/{page}")
        assert tab.run("document.documentElement.scrollWidth") <= width, page
        assert tab.run("document.body.dataset.mdColorScheme") == ("slate" if dark else "default"), page
    assert not [url for url in tab.requests if not url.startswith((address, "data:", "blob:", "about:"))]


def test_the_search_finds_a_page(address: str, tab: Tab) -> None:
    tab.look(1300)
    tab.open(f"{address}/index.html")
    tab.run("document.querySelector('.md-search__input').focus()")
    tab.send("Input.insertText", text="double quantization")
    end = time.monotonic() + HANG
    while not tab.run("document.querySelectorAll('.md-search-result__item').length"):
        assert time.monotonic() < end, "the search found nothing"
        time.sleep(0.1)
