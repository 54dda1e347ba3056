"""Answers in JSON, asked for by OpenAI's own client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.models.decoding.choosing import within
from tests.served import HELLO, PROMPTS, Served, ask, raw, said, served, until, with_ends

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("openai")
pytest.importorskip("fastapi")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "gr\u00fcn", "\U0001f642"]}, "minItems": 1, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}},
}


def schema(given: Any) -> dict[str, Any]:
    """A `response_format`."""
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": given}}


def deep(levels: int) -> Any:
    """A schema of arrays in arrays."""
    made: Any = {"type": "string"}
    for _ in range(levels):
        made = {"type": "array", "items": made}
    return made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_follow_a_schema(temperature: float, stream: bool, client: Any) -> None:
    texts = []
    for seed in range(4):
        more = {"temperature": temperature, "seed": seed, "response_format": schema(PERSON), "stream": stream}
        answer = ask(client, PROMPTS[seed], 120, **more)
        if stream:
            with answer:
                choices = [chunk.choices[0] for chunk in answer]
            texts.append("".join(each.delta.content or "" for each in choices))
            assert choices[-1].finish_reason == "stop"
        else:
            texts.append(said(answer))
            assert answer.choices[0].finish_reason == "stop"
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) > 1


def test_an_answer_is_an_object_if_it_has_room(client: Any, server: Served) -> None:
    given: dict[str, Any] = {
        "response_format": {"type": "json_object"},
        "temperature": 100,
    }
    # At this temperature, all tokens are about equally likely.
    answers = [ask(client, new=8, seed=seed, **given) for seed in range(24)]
    finished = [said(each) for each in answers if each.choices[0].finish_reason == "stop"]
    assert len(finished) > 1
    assert all(isinstance(json.loads(text), dict) for text in finished)
    cut = ask(client, new=3, response_format={"type": "json_object"})
    assert (cut.choices[0].finish_reason, said(cut)[0], cut.usage.completion_tokens) == ("length", "{", 3)
    text = ask(client, response_format={"type": "text"})
    assert said(text) == said(ask(client))
    assert server.service.engine.unfinished == 0


def test_a_schema_limits_nobody_else(client: Any, server: Served) -> None:
    wanted = [said(ask(client, PROMPTS[i % 5], 30)) for i in range(5)]
    limited = said(ask(client, new=120, response_format=schema(PERSON)))
    with ThreadPoolExecutor(10) as pool:
        with server.held():
            free = [pool.submit(ask, client, PROMPTS[i], 30) for i in range(5)]
            bound = [pool.submit(ask, client, new=120, response_format=schema(PERSON)) for _ in range(5)]
            until(lambda: server.service.engine.unfinished == 10)
        assert [said(answer.result()) for answer in free] == wanted
        assert [said(answer.result()) for answer in bound] == [limited] * 5


def test_a_limited_answer_ends_by_the_end_token(tmp_path: Path, quantized: Path) -> None:
    """A number may be followed by another digit or by the end, which has two tokens here."""
    ending = with_ends(quantized, tmp_path / "tiny-4bit", [0, 7])
    with served(ending) as server, server.client() as client:
        numbers = schema({"type": "integer", "minimum": 10**6, "maximum": 10**7})
        answers = [ask(client, new=20, temperature=1, seed=seed, response_format=numbers) for seed in range(5)]
        assert {answer.choices[0].finish_reason for answer in answers} == {"stop"}
        assert all(10**6 <= int(said(answer)) <= 10**7 for answer in answers)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"type": "xml"}, "'json_schema'"),
        ({"type": "json_schema"}, "needed there"),
        ({"type": "text", "json_schema": {"name": "x"}}, "belongs to"),
        (schema({"type": "nope"}), "Invalid type: nope"),
        (schema({"type": "string", "pattern": "("}), "unclosed group"),
        (schema({"not": {"type": "string"}}), "Unimplemented keys"),
        (schema({"$ref": "https://example.com/x"}), "does not fetch"),
        (schema({"$ref": "#"}), "no answer can follow"),
        (schema({"const": float("nan")}), "line 1"),
        (schema(deep(200)), "recursion limit"),
        (schema([]), "dictionary"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_bad_schema_is_named_before_any_work(given: Any, words: str, server: Served) -> None:
    server.steps.clear()
    body = {"messages": HELLO, "max_tokens": 4, "response_format": given}
    status, answer = raw(server, "/v1/chat/completions", json.dumps(body).encode())
    error = answer["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", "response_format")
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert not server.steps
    status, answer = raw(server, "/v1/completions", json.dumps({"prompt": "x", "response_format": given}).encode())
    assert (status, answer["error"]["param"]) == (400, "response_format")


def test_a_request_fails_alone(client: Any, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matcher may reach a limit in the middle of an answer."""
    from fewbit.errors import PlanError
    from fewbit.serving.grammar import Grammar

    wanted, accept, seen = said(ask(client, new=20)), Grammar.accept, []

    def limited(self: Grammar, token: int) -> None:
        seen.append(token)
        if len(seen) == 5:
            raise PlanError("too complex")
        accept(self, token)

    monkeypatch.setattr(Grammar, "accept", limited)
    with ThreadPoolExecutor(2) as pool:
        with server.held():
            free = pool.submit(ask, client, new=20)
            bound = pool.submit(ask, client, new=20, response_format=schema(PERSON))
            until(lambda: server.service.engine.unfinished == 2)
        with pytest.raises(Exception, match="too complex") as caught:
            bound.result()
        assert said(free.result()) == wanted
    assert caught.value.status_code == 500  # type: ignore[attr-defined]
    assert server.service.engine.unfinished == 0


def test_what_is_not_allowed_is_never_chosen() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float32, device="cpu")
    assert int(within(scores, scores, b"\x00\x00\xc8\x01").argmax()) == 2
    assert within(scores, scores, b"\x00\xc8")[2:].isneginf().all()  # rows of the embedding that no token has
    assert int(within(scores, scores, b"\x00" * 4 + b"\xc8" * 9).argmax()) == 4
    suppressed = scores.clone()
    suppressed[3] = -torch.inf
    assert int(within(suppressed, scores, b"\x00\x00\x00\xc8").argmax()) == 3
