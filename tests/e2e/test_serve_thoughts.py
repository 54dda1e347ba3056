"""Answers of models that think before they answer, asked by OpenAI's own client."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbit.serving.thoughts import Thoughts
from tests.browser import Tab
from tests.served import HELLO, ask, said, scripted, served, until

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
service = pytest.importorskip("fewbit.serving.service")

# As Qwen3's template, shorter. R1's also begins the thoughts.
QWEN = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
R1 = QWEN + "<think>\n"
THOUGHT = "First I count.\nThen <b> I add."
ANSWER = "It is 4.\n\nSee <think>."


def with_template(model: Path, out: Path, template: str) -> Path:
    shutil.copytree(model, out)
    for place in out.glob("chat_template*"):
        place.unlink()
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    return out


@pytest.fixture(scope="module", params=[QWEN, R1], ids=["qwen", "r1"])
def server(request: pytest.FixtureRequest, quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    place = tmp_path_factory.mktemp("thoughts") / "tiny-4bit"
    with served(with_template(quantized, place, request.param)) as made:
        made.service.opened = request.param == R1
        yield made


def streamed(client: Any, **more: Any) -> tuple[str, str]:
    with ask(client, new=100, stream=True, **more) as stream:
        deltas = [choice.delta for chunk in stream for choice in chunk.choices]
    assert not any(delta.content and getattr(delta, "reasoning_content", None) for delta in deltas)
    return "".join(getattr(d, "reasoning_content", None) or "" for d in deltas), "".join(
        d.content or "" for d in deltas
    )


def test_thoughts_are_apart_from_the_answer(server: Any, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = "" if server.service.opened else "<think>\n"
    scripted(server, monkeypatch, f"{begin}{THOUGHT}\n</think>\n\n{ANSWER}")
    cases: tuple[dict[str, Any], ...] = ({}, {"logprobs": True})
    for more in cases:
        message = ask(client, new=100, **more).choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, ANSWER)
        assert streamed(client, **more) == (THOUGHT, ANSWER)


@pytest.mark.parametrize("together", [False, True])
def test_tokens_come_with_their_part_of_the_answer(
    together: bool, server: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if thoughts and answer come in one piece."""
    piece = service.Answer.piece

    def late(answer: Any) -> Any:
        news = answer._news
        return piece(answer) if news.finished or news.complete else service.Piece("", (), None)

    if together:
        monkeypatch.setattr(service.Answer, "piece", late)
    thoughts = f"{'' if server.service.opened else '<think>'}{THOUGHT}</think>"
    for text, wanted in ((f"{thoughts} {ANSWER}", {True: thoughts, False: f" {ANSWER}"}), (ANSWER, None)):
        if wanted is None and server.service.opened:
            continue
        scripted(server, monkeypatch, text)
        found = {True: "", False: ""}
        with ask(client, new=100, stream=True, logprobs=True) as stream:
            for choice in [choice for chunk in stream for choice in chunk.choices if choice.logprobs]:
                tokens = "".join(each.token for each in choice.logprobs.content)
                found["reasoning_content" in choice.delta.model_extra] += tokens
        assert found == (wanted or {True: "", False: text})


def test_thoughts_may_have_no_end_or_not_come(server: Any, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = "" if server.service.opened else "<think>"
    scripted(server, monkeypatch, f"{begin}{THOUGHT} </thi")
    choice = ask(client, new=100).choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == (f"{THOUGHT} </thi", "")
    assert streamed(client) == (f"{THOUGHT} </thi", "")
    scripted(server, monkeypatch, f"</think>{ANSWER}" if server.service.opened else ANSWER)
    answer = ask(client, new=100)
    assert (said(answer), "reasoning_content" in answer.choices[0].message.model_extra) == (ANSWER, False)
    assert streamed(client) == ("", ANSWER)


def test_the_page_shows_thoughts_apart(server: Any, tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    thought = f"{THOUGHT} {'w' * 80}"
    scripted(server, monkeypatch, f"{'' if server.service.opened else '<think>'}{thought}</think>{ANSWER}")
    tab.complaints.clear()
    tab.look(400, 700)
    tab.open(f"{server.address}/")
    tab.run("document.getElementById('message').value = 'Hello'")
    tab.run("document.getElementById('message').focus()")
    tab.key("Enter", 13, "\r")
    until(lambda: tab.run("document.querySelector('.assistant')?.textContent") == ANSWER)
    assert tab.run("[...document.querySelectorAll('.thought')].map((each) => each.open)") == [False]
    assert tab.run("document.querySelector('.thought div').textContent") == thought
    assert tab.run("document.querySelector('.thought').nextSibling.className") == "turn assistant"
    tab.run("document.querySelector('.thought').open = true")
    for width in (400, 1280):
        tab.look(width, 700)
        assert tab.run("document.querySelector('main').scrollWidth") <= width
    assert tab.complaints == []


def test_an_answer_in_json_has_no_thoughts(server: Any, client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert "".join(said(ask(client, new=50, response_format=form)).split()) == '{"a":1}'


def test_earlier_thoughts_go_to_the_template(server: Any, client: Any) -> None:
    def tokens(**more: Any) -> int:
        turns: list[Any] = [*HELLO, {"role": "assistant", "content": "Four.", **more}, *HELLO]
        made = client.chat.completions.create(model="tiny-4bit", messages=turns, max_tokens=1)
        return int(made.usage.prompt_tokens)

    assert tokens(reasoning_content=THOUGHT) > tokens() + 5
    with pytest.raises(openai.BadRequestError, match="only in messages of the assistant"):
        client.chat.completions.create(
            model="tiny-4bit", messages=[{"role": "user", "content": "x", "reasoning_content": "y"}]
        )


def test_without_marks_it_is_all_text(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(quantized) as plain, plain.client() as client:
        scripted(plain, monkeypatch, f"<think>{THOUGHT}</think>{ANSWER}")
        assert said(ask(client, new=100)) == f"<think>{THOUGHT}</think>{ANSWER}"


@pytest.mark.parametrize("inside", [False, True])
def test_any_cut_of_the_text_gives_the_same(inside: bool) -> None:
    text = f"{'' if inside else ' <think>'}\n {THOUGHT}  < \n\n</think>\n {ANSWER} "
    for size in range(1, len(text) + 1):
        reader = Thoughts(inside=inside)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        found = [reader.add(piece, final=i == len(pieces)) for i, piece in enumerate(pieces, 1)]
        assert ("".join(a for a, _ in found), "".join(b for _, b in found)) == (f"{THOUGHT}  <", f"{ANSWER} ")
