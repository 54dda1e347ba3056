"""Parameters of vLLM's and llama.cpp's servers that OpenAI's interface does not have, and `reasoning_effort`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import fewbit
from fewbit.serving import template
from fewbit.serving.failures import Failure
from tests.e2e.test_serve_thoughts import with_template
from tests.served import HELLO, Served, ask, raw, said, served, with_ends

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

EXACT = True
TEMPLATE = """{# enable_naps #}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}
{%- if reasoning_effort is defined %}[effort {{ reasoning_effort }}]{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LEVELS, SWITCH = TEMPLATE, TEMPLATE.replace("reasoning_effort", "mood")


@pytest.fixture(scope="module")
def levels(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model whose template reads `reasoning_effort` and `enable_thinking`."""
    with served(with_template(quantized, tmp_path_factory.mktemp("levels") / "tiny-4bit", LEVELS)) as made:
        yield made


def prompt_of(server: Served, monkeypatch: pytest.MonkeyPatch, **body: Any) -> str:
    """The prompt that a chat makes."""
    seen: list[Any] = []
    submit = server.service.engine.submit

    def kept(ids: Any, *rest: Any) -> str:
        seen.append(ids)
        return str(submit(ids, *rest))

    with monkeypatch.context() as patch:
        patch.setattr(server.service.engine, "submit", kept)
        status, answer = raw(
            server, "/v1/chat/completions", json.dumps({"messages": HELLO, "max_tokens": 1} | body).encode()
        )
    assert status == 200, answer
    return str(server.service.tokenizer.decode(seen[0]))


def refused(server: Served, **body: Any) -> tuple[str, str]:
    """The parameter and the message of the error 400."""
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    chat = {} if "prompt" in body else {"messages": HELLO}
    status, answer = raw(server, path, json.dumps({"max_tokens": 4} | chat | body).encode())
    assert status == 400
    return answer["error"]["param"], answer["error"]["message"]


def test_a_template_gets_its_arguments(levels: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = "<|im_start|>user\nHello there<|im_end|>\n"
    for more, wanted in (
        ({}, ""),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "[thinking False]"),
        ({"reasoning_effort": "low"}, "[thinking True][effort low]"),
        ({"reasoning_effort": "none"}, "[thinking False][effort none]"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": 7}}, "[thinking 7][effort high]"),
    ):
        assert prompt_of(levels, monkeypatch, **more) == f"{turn}{wanted}<|im_start|>assistant\n"
    assert prompt_of(levels, monkeypatch, add_generation_prompt=False) == turn
    talk = [*HELLO, {"role": "assistant", "content": "Well, "}]
    continued = prompt_of(levels, monkeypatch, messages=talk, continue_final_message=True)
    assert continued.rstrip() == f"{turn}<|im_start|>assistant\nWell,"


def test_a_message_is_continued(client: Any) -> None:
    whole = said(ask(client, new=12))
    begun = said(ask(client, new=5))
    talk = [*HELLO, {"role": "assistant", "content": begun}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat.completions.create(
        model="tiny-4bit", messages=talk, max_tokens=7, temperature=0, extra_body=more
    )
    assert begun + said(answer) == whole


def test_what_a_template_does_not_read_is_refused(server: Served, levels: Served) -> None:
    unread: tuple[dict[str, Any], ...] = (
        {"enable_naps": True},
        {"role": "user"},
        {"m": 1},
        {"tools": []},
        {"messages": []},
    )
    for given in unread:
        param, message = refused(levels, chat_template_kwargs=given)
        assert param == "chat_template_kwargs"
        assert next(iter(given)) in message
    assert refused(server, reasoning_effort="low")[1] == "reasoning_effort: this model's chat template does not read it"
    assert refused(server, chat_template_kwargs={"enable_thinking": False})[0] == "chat_template_kwargs"
    assert refused(levels, reasoning_effort="some")[0] == "reasoning_effort"
    both = {"reasoning_effort": "low"}
    assert refused(levels, reasoning_effort="low", chat_template_kwargs=both)[0] == "reasoning_effort"


@pytest.mark.parametrize("template", [{"rag": TEMPLATE, "tool_use": TEMPLATE}, {"default": "{{ '"}])
def test_a_template_that_cannot_be_used_is_named(template: dict[str, str], quantized: Path, tmp_path: Path) -> None:
    folder = with_template(quantized, tmp_path / "tiny-4bit", "")
    (folder / "chat_template.jinja").unlink()
    place = folder / "tokenizer_config.json"
    named = [{"name": name, "template": text} for name, text in template.items()]
    config = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps(config | {"chat_template": named}), encoding="utf-8")
    with served(folder, exact=True) as made:
        for more in ({}, {"reasoning_effort": "low"}, {"chat_template_kwargs": {"enable_thinking": True}}):
            param, message = refused(made, **more)
            assert param == "messages"
            assert message.startswith("the model's chat template ")


def test_variables_that_a_template_takes() -> None:
    """Not those that it sets itself, nor functions. A variable may be set only where it is not given."""
    text = """{% macro line(item) %}{{ item.role }}{{ style }}{% endmacro %}{% set lines = namespace(last=0) %}
    {% for m in messages %}{% generation %}{{ line(m) }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}
    {% endfor %}{% if mood is not defined %}{% set mood = strftime_now("%A") %}{% endif %}
    {% set thinking = thinking | default(true) %}{{ raise_exception(mood) if thinking }}"""
    assert template.names(text) == {"messages", "mood", "style", "thinking"}


def test_a_switch_has_no_levels() -> None:
    read = template.names(SWITCH)
    assert template._effort("none", {}, read) == {"enable_thinking": False}
    with pytest.raises(Failure) as raised:
        template._effort("low", {}, read)
    assert raised.value.message == "reasoning_effort: this model's chat template knows no levels, only none"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"continue_final_message": True}, "continue_final_message", "must be a text of the assistant"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "not with add_generation_prompt",
        ),
        ({"min_tokens": 5}, "min_tokens", "more than the 4 of max_tokens"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"repeat_penalty": 1.1}, "repeat_penalty", "use repetition_penalty"),
        ({"guided_json": {"type": "object"}}, "guided_json", "use response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs", "use response_format"),
        ({"min_p": 0.1}, "min_p", "does not support"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos", "its JSON is complete"),
        ({"min_tokens": 2, "response_format": {"type": "json_object"}}, "min_tokens", "its JSON is complete"),
        ({"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "only in /v1/chat/completions"),
        ({"prompt": "a", "reasoning_effort": "low"}, "reasoning_effort", "only in /v1/chat/completions"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "only in /v1/chat/completions"),
    ],
)
def test_what_is_not_supported_is_named(body: dict[str, Any], param: str, words: str, server: Served) -> None:
    assert refused(server, **body)[0] == param
    assert words in refused(server, **body)[1]


def test_values_without_effect_are_accepted(client: Any) -> None:
    plain: dict[str, Any] = {"min_p": 0, "repeat_penalty": 1.0, "stop_token_ids": [], "use_beam_search": False}
    plain |= {"repetition_penalty": 1.0, "min_tokens": 0, "ignore_eos": False, "chat_template_kwargs": {}}
    assert said(ask(client, extra_body=plain)) == said(ask(client))


def test_a_repetition_penalty_is_that_of_transformers(client: Any, server: Served, quantized: Path) -> None:
    model = fewbit.load(quantized, device="cpu", dtype="float32")
    for penalty in (1.3, 0.7):
        answer = ask(client, new=12, logprobs=True, extra_body={"repetition_penalty": penalty})
        text = server.service.tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
        ids = server.service.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].long()
        begin, processor = ids.shape[1], RepetitionPenaltyLogitsProcessor(penalty)
        with torch.inference_mode():
            for _ in range(12):
                logits = model(input_ids=ids).logits[:, -1].float()
                ids = torch.cat([ids, processor(ids, logits).argmax(-1, keepdim=True)], 1)
        assert said(answer) == server.service.tokenizer.decode(ids[0, begin:], skip_special_tokens=True)
    assert said(ask(client, new=12)) != said(ask(client, new=12, extra_body={"repetition_penalty": 1.3}))


def test_a_request_replaces_the_models_penalty(quantized: Path, client: Any, tmp_path: Path) -> None:
    folder = with_ends(quantized, tmp_path / "tiny-4bit", [])
    place = folder / "generation_config.json"
    place.write_text(json.dumps({"repetition_penalty": 0.5}), encoding="utf-8")
    with served(folder, exact=True) as own, own.client() as theirs:
        assert said(ask(theirs, new=24)) != said(ask(client, new=24))
        for penalty in (1.0, 1.3):
            more = {"repetition_penalty": penalty}
            assert said(ask(theirs, new=24, extra_body=more)) == said(ask(client, new=24, extra_body=more))


def test_ends_are_ignored_or_come_late(quantized: Path, client: Any, server: Served, tmp_path: Path) -> None:
    """The model ends with the fourth token of its answer."""
    usual = ask(client, new=12, logprobs=True)
    tokens = [each.token for each in usual.choices[0].logprobs.content]
    assert tokens[3] not in tokens[:3]
    end = server.service.tokenizer.convert_ids_to_tokens(
        server.service.tokenizer("".join(tokens[:4]), add_special_tokens=False)["input_ids"]
    )[3]
    folder = with_ends(quantized, tmp_path / "tiny-4bit", server.service.tokenizer.convert_tokens_to_ids(end))
    with served(folder, exact=True) as made, made.client() as theirs:
        early = ask(theirs, new=12)
        assert (early.choices[0].finish_reason, said(early)) == ("stop", "".join(tokens[:3]))
        ignored = ask(theirs, new=12, extra_body={"ignore_eos": True})
        assert (ignored.choices[0].finish_reason, said(ignored)) == ("length", said(usual))
        assert ask(theirs, new=12, extra_body={"min_tokens": 3}).choices[0].message == early.choices[0].message
        for least in (4, 12):
            late = ask(theirs, new=12, extra_body={"min_tokens": least})
            assert late.usage.completion_tokens >= least
            assert said(late).startswith("".join(tokens[:3]))


def test_ends_that_no_token_has_are_left_out(quantized: Path, client: Any, tmp_path: Path) -> None:
    folder = with_ends(quantized, tmp_path / "tiny-4bit", [-1, 10**6])
    with served(folder, exact=True) as made, made.client() as theirs:
        assert said(ask(theirs, extra_body={"min_tokens": 3})) == said(ask(client))


def test_tokens_before_min_tokens_have_their_places(server: Served) -> None:
    """A token that would end the answer, too."""
    end, name = next((token, text) for token, text in server.service.special.items() if text == "<|im_end|>")
    body = {"prompt": "Hello there", "max_tokens": 10, "temperature": 0, "echo": True, "logprobs": 0, "min_tokens": 9}
    places = []
    for more in ({}, {"stop": name}):
        given = json.dumps(body | more | {"logit_bias": {str(end): 6}}).encode()
        scores = raw(server, "/v1/completions", given)[1]["choices"][0]["logprobs"]
        assert name in scores["tokens"][:-3]
        places.append(scores["text_offset"])
    assert places[0] == places[1]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences_wait_for_min_tokens(stream: bool, client: Any) -> None:
    answer = ask(client, new=14, logprobs=True)
    tokens, whole = [each.token for each in answer.choices[0].logprobs.content], said(answer)
    assert "".join(tokens) == whole
    for least in (1, 5, 9):
        for stop in (whole[:2], tokens[least - 1], (tokens[least - 1] + tokens[least])[1:-1], tokens[least]):
            place = whole.find(stop, max(len("".join(tokens[:least])) - len(stop) + 1, 0))
            more: dict[str, Any] = {"stop": stop, "extra_body": {"min_tokens": least}, "stream": stream}
            if stream:
                with ask(client, new=14, **more) as chunks:
                    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            else:
                text = said(ask(client, new=14, **more))
            assert text == (whole if place < 0 else whole[:place])
