"""The chat page in a real browser: it streams, stops, shows errors, and fits a phone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser import Tab
from tests.limits import HANG
from tests.served import Served, served

pytest.importorskip("fastapi")

ANSWERS = "[...document.querySelectorAll('.turn.assistant')].map((each) => each.textContent)"
LAST = "[...document.querySelectorAll('.turn')].at(-1)?.textContent"
IDLE = "document.getElementById('stop').hidden"


@pytest.fixture(scope="module")
def server(tab: Tab, quantized: Path) -> Iterator[Served]:
    """A server that wants a key."""
    with served(quantized, api_key="secret") as made:
        yield made


@pytest.fixture
def page(tab: Tab, server: Served) -> Iterator[Tab]:
    """The page with the key. Afterwards the browser has asked nobody else, and has nothing to complain of."""
    tab.requests.clear()
    tab.complaints.clear()
    tab.look(1280)
    tab.open(server.address + "/")
    until(tab, "!document.getElementById('settings').hidden")  # the list of models was refused
    assert len(tab.complaints) == 1  # by the browser itself
    assert "401" in tab.complaints.pop()
    put(tab, "key", "secret")
    put(tab, "temperature", "0")
    put(tab, "most", "12")
    until(tab, "document.getElementById('model').textContent === 'tiny-4bit'")
    yield tab
    assert tab.complaints == []
    assert all(url.startswith((server.address, "data:,")) for url in tab.requests)


def until(tab: Tab, script: str, also: Callable[[], bool] = lambda: True) -> None:
    end = time.monotonic() + HANG
    while not (tab.run(script) and also()):
        assert time.monotonic() < end, script
        time.sleep(0.02)


def put(tab: Tab, field: str, value: str) -> None:
    at = f"document.getElementById('{field}')"
    tab.run(f"{at}.value = {json.dumps(value)}; {at}.dispatchEvent(new Event('change'))")


def send(tab: Tab, text: str) -> None:
    put(tab, "message", text)
    tab.run("document.getElementById('message').focus()")
    tab.key("Enter", 13, "\r")


def test_it_streams_and_remembers_the_conversation(page: Tab, server: Served) -> None:
    with server.client(api_key="secret") as client:
        turns = [{"role": "user", "content": "Hello <b>there</b>"}]
        given = {"model": "tiny-4bit", "temperature": 0, "max_tokens": 12}
        first = client.chat.completions.create(messages=turns, **given).choices[0].message.content
        turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
        second = client.chat.completions.create(messages=turns, **given).choices[0].message.content
    steps = len(server.steps)
    send(page, "Hello <b>there</b>")
    until(page, f"{ANSWERS}[0]?.length > 0", lambda: len(server.steps) > steps)
    until(page, IDLE)
    send(page, "And then?")
    until(page, f"{IDLE} && {ANSWERS}.length === 2")
    assert page.run(ANSWERS) == [first, second]
    assert page.run("document.querySelector('.turn.user').textContent") == "Hello <b>there</b>"
    assert page.run("document.querySelectorAll('.turn b').length") == 0
    assert "maximum of tokens" in page.run("document.getElementById('said').textContent")
    page.run("document.getElementById('new').click()")
    assert page.run("document.querySelectorAll('.turn').length") == 0


def test_stop_ends_the_answer_on_the_server_too(page: Tab, server: Served) -> None:
    put(page, "most", "400")
    send(page, "Tell me a story.")
    until(page, f"{ANSWERS}[0]?.length > 0")
    with server.held():
        page.run("document.getElementById('stop').click()")
        until(page, IDLE, lambda: server.service.engine.unfinished == 0)
    assert "stopped" in page.run("document.getElementById('said').textContent")
    text = page.run(ANSWERS)[0]
    put(page, "most", "3")
    send(page, "Go on")  # what came stays in the conversation
    until(page, f"{IDLE} && {ANSWERS}.length === 2")
    assert page.run(ANSWERS)[0] == text


def test_errors_are_shown_and_the_message_is_not_lost(page: Tab) -> None:
    put(page, "most", "500")
    send(page, "Too much " * 20)
    until(page, f"{IDLE} && {LAST}.includes('exceeds the context of 512')")
    assert page.run("document.getElementById('message').value").startswith("Too much")
    put(page, "key", "wrong")
    send(page, "Hello")
    until(page, f"{IDLE} && {LAST}.includes('API key is wrong')")
    assert page.run("document.activeElement.id") == "key"
    assert page.run("document.querySelector('.error').getAttribute('role')") == "alert"
    assert all("400" in each or "401" in each for each in page.complaints)  # the browser's own lines
    page.complaints.clear()


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_the_window(width: int, page: Tab) -> None:
    page.look(width, 700)
    send(page, "Hello " + "w" * 300)
    until(page, f"{IDLE} && {ANSWERS}.length > 0")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.documentElement.scrollHeight") <= 700  # the conversation scrolls, and not the page
    for each in ("send", "message", "new", "key"):
        place = f"document.getElementById('{each}').getBoundingClientRect()"
        assert 0 <= page.run(f"{place}.left") < page.run(f"{place}.right") <= width
        assert page.run(f"{place}.bottom") <= 700
        assert page.run(f"{place}.height") >= 40  # a finger finds it


def test_light_and_dark_are_readable(page: Tab) -> None:
    send(page, "Hello")
    until(page, f"{IDLE} && {ANSWERS}.length > 0")
    colours = (
        "['body', '.soft', '.turn.user', '#send', 'label'].map((each) => {{ const of = (node, name) => {{ const c = "
    )
    colours += "getComputedStyle(node)[name]; return c === 'rgba(0, 0, 0, 0)' && node.parentElement ? "
    colours += "of(node.parentElement, name) : c; }}; const node = document.querySelector(each); "
    colours += "return [of(node, 'color'), of(node, 'backgroundColor')]; }})"
    for dark in (False, True):
        page.look(1280, dark=dark)
        for ink, paper in page.run(colours.format()):
            assert contrast(ink, paper) >= 4.5, (dark, ink, paper)
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2."""
    lights = sorted(_light(each) for each in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _light(colour: str) -> float:
    parts = [int(each) / 255 for each in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_page_is_one_file_that_may_load_nothing(server: Served, tmp_path: Path) -> None:
    import urllib.request

    with urllib.request.urlopen(server.address + "/") as answer:
        policy, html = answer.headers["content-security-policy"], answer.read().decode()
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in html.replace("http-equiv", "")
