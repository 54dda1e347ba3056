"""Tools in fewbit serve, asked by OpenAI's own client. What the demo model cannot write, a grammar makes it write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.served import HELLO, Served, ask, raw, said, scripted, served

openai = pytest.importorskip("openai")
jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("fastapi")

# As Qwen2.5's template, shorter.
TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call><|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": \
{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9, "minimum": 1}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
CALLS = 'Ok.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>\n' + (
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def server(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import shutil

    model = tmp_path_factory.mktemp("tools") / "tiny-4bit"
    shutil.copytree(quantized, model)
    for place in model.glob("chat_template*"):
        place.unlink()
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    models.edit_json(model / "config.json", max_position_embeddings=1024)
    with served(model) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with server.client() as made:
        yield made


@pytest.fixture
def write(server: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`write(text)` makes all answers that text."""

    def patched(text: str) -> None:
        scripted(server, monkeypatch, text)

    return patched


def _calls(calls: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls or []]


WANTED = [("get_weather", {"city": "Paris", "days": 3}), ("now", {})]


def test_calls_in_an_answer(client: Any, write: Any) -> None:
    write(CALLS)
    choice = ask(client, new=200, tools=TOOLS).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Ok.")
    assert _calls(choice.message.tool_calls) == WANTED
    ids = [call.id for call in choice.message.tool_calls]
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    assert len(set(ids)) == 2
    one = ask(client, new=200, tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert _calls(one.message.tool_calls) == WANTED[:1]
    # Without tools, or where the model may not call, the same text is text.
    assert said(ask(client, new=200)) == CALLS
    none = ask(client, new=200, tools=TOOLS, tool_choice="none")
    assert (said(none), none.choices[0].finish_reason) == (CALLS, "stop")


def test_calls_in_a_stream(client: Any, write: Any) -> None:
    write(CALLS)
    with client.chat.completions.stream(
        model="tiny-4bit", messages=HELLO, max_tokens=200, temperature=0, tools=TOOLS, n=2
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    for choice in final.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Ok.")
        assert _calls(choice.message.tool_calls) == WANTED
    assert len(final.choices) == 2
    done = [event.name for event in events if event.type == "tool_calls.function.arguments.done"]
    assert sorted(done) == ["get_weather", "get_weather", "now", "now"]


def test_an_answer_without_a_call(client: Any, write: Any) -> None:
    for text in ("Just text. <tool", CALLS.partition("</tool_call>")[0].replace("get_weather", "evil")):
        write(text)
        choice = ask(client, new=200, tools=TOOLS).choices[0]
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", text, None)


def test_logprobs_beside_calls(client: Any, write: Any, server: Served) -> None:
    write(CALLS)
    whole = ask(client, new=200, tools=TOOLS, logprobs=True)
    tokens = [each.token for each in whole.choices[0].logprobs.content]
    assert "".join(tokens) == CALLS
    with ask(client, new=200, tools=TOOLS, logprobs=True, stream=True) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    assert [each.token for c in choices if c.logprobs for each in c.logprobs.content] == tokens


def test_a_conversation_with_calls(client: Any, write: Any, server: Served) -> None:
    write(CALLS)
    first = ask(client, new=200, tools=TOOLS).choices[0].message
    turns: list[Any] = [*HELLO, first]
    turns += [{"role": "tool", "tool_call_id": call.id, "content": "sunny 1"} for call in first.tool_calls]
    seen: list[str] = []
    tokenize = server.service.tokenizer
    write("Fine.")
    server.service.tokenizer = _Spy(tokenize, seen)
    try:
        second = client.chat.completions.create(
            model="tiny-4bit", messages=turns, max_tokens=20, temperature=0, tools=TOOLS
        )
    finally:
        server.service.tokenizer = tokenize
    assert said(second) == "Fine."
    assert second.choices[0].finish_reason == "stop"
    (text,) = seen
    assert text.count("<tool_response>sunny 1</tool_response>") == 2
    assert '"arguments": {"city": "Paris", "days": 3}' in text
    assert json.dumps(TOOLS[0]["function"]["parameters"]["required"]) in text


class _Spy:
    def __init__(self, tokenizer: Any, seen: list[str]) -> None:
        self._tokenizer, self._seen = tokenizer, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **more: Any) -> Any:
        self._seen.append(text)
        return self._tokenizer(text, **more)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_come(stream: bool, client: Any) -> None:
    """The grammar of its arguments; the model chooses what they say."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, finish in (("required", "tool_calls"), (named, "stop")):
        for seed in range(3):
            more: dict[str, Any] = {"tool_choice": choice, "tools": TOOLS, "temperature": 1.5, "seed": seed}
            answer = ask(client, new=200, stream=stream, **more)
            if stream:
                with answer:
                    choices = [chunk.choices[0] for chunk in answer]
                calls = [call for each in choices for call in each.delta.tool_calls or []]
                told = choices[-1].finish_reason, "".join(each.delta.content or "" for each in choices)
            else:
                calls = answer.choices[0].message.tool_calls
                told = answer.choices[0].finish_reason, answer.choices[0].message.content or ""
            assert told == (finish, "")
            ((name, arguments),) = _calls(calls)
            jsonschema.validate(arguments, PLACE if name == "get_weather" else {"maxProperties": 0})
    cut = ask(client, new=2, tool_choice=named, tools=TOOLS).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
    assert cut.message.content.startswith("{")


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "custom", "unknown"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
        ({"tools": [*TOOLS, TOOLS[1]]}, "tools", "same name"),
        ({"tool_choice": "required"}, "tool_choice", "only with tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "'required'"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            "no function other",
        ),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "not with tools"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {"type": "string"}}}}],
                "tool_choice": "required",
            },
            "tools",
            "Unimplemented keys",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages", "required"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages",
            "JSON object",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]}, "tools", "half"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_bad_tools_are_named(change: dict[str, Any], param: str, words: str, server: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 4} | change
    status, answer = raw(server, "/v1/chat/completions", json.dumps(body).encode())
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]


def test_a_template_that_knows_no_tools(quantized: Path) -> None:
    """The demo model's own."""
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    with served(quantized) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="no place for tools") as caught:
            ask(client, tools=TOOLS)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")
        turns: list[Any] = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}, *HELLO]
        with pytest.raises(openai.BadRequestError, match="leaves out the calls of get_weather"):
            client.chat.completions.create(model="tiny-4bit", messages=turns, max_tokens=4)
        assert ask(client, tools=TOOLS, tool_choice="none", new=3).usage.completion_tokens == 3
