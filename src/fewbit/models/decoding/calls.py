"""Calls of functions in a model's answer: which markup the model writes, and the calls in a text that grows.

A chat template that knows tools shows the model how to write a call. The markup is that of the tokenizer's
`response_template` if it has one; else it is recognized by a mark in the chat template. `_KNOWN` lists the marks.
transformers' `ResponseParser` finds the markup; it is no stable interface, and only this file uses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.errors import PlanError
from fewbit.models.decoding.generate import in_template


@dataclass(frozen=True)
class Call:
    """A call of a function. arguments: a JSON object, as text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Markup:
    """How a model writes calls. field: as in a `response_template`; it has one entry for each call, or for several.

    read: the calls in the value of the field, each {"name", "arguments"}. marks: text around calls; special tokens in
    it belong to the answer.
    """

    field: Mapping[str, Any]
    read: Callable[[Any], Sequence[Any]]
    marks: str


def _one(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _mistral(text: str) -> Sequence[Any]:
    """A JSON list, or `NAME[ARGS]{...}` for each call. An id may stand before [ARGS]."""
    if text.startswith("["):
        return _one(json.loads(text))
    calls = []
    one = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*\})\s*", re.DOTALL)
    for each in text.split("[TOOL_CALLS]"):
        if (found := one.fullmatch(each)) is None:
            raise ValueError("no call")
        calls.append({"name": found[1], "arguments": json.loads(found[2])})
    return calls


def _llama(text: str) -> Sequence[Any]:
    """JSON objects with a semicolon or only white space between them."""
    calls, place = [], 0
    while place < len(text):
        value, place = json.JSONDecoder().raw_decode(text, place)
        calls.append(value)
        while place < len(text) and text[place] in "; \n\t\r":
            place += 1
    return calls


_CALLED = {"name": "{name}", "arguments": "{content}"}
# The first mark that a chat template has decides.
_KNOWN = (
    (  # Gemma 4
        r"<\|tool_call>call:",
        Markup(
            {
                "open_pattern": r"\s*<\|tool_call>call:(?P<name>\w+)",
                "close": "<tool_call|>",
                "content": "json",
                "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
                "transform": _CALLED,
            },
            _one,
            '<|tool_call><tool_call|><|"|>',
        ),
    ),
    (  # Qwen3-Coder, Qwen3.5
        r"<function=",
        Markup(
            {
                "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "content": "xml-inline",
                "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
                # This form has the types of the arguments read from the functions' schemas.
                "transform": {"function": _CALLED},
            },
            _one,
            "<tool_call></tool_call>",
        ),
    ),
    (  # Hermes, Qwen2.5, Qwen3
        r"<tool_call>",
        Markup(
            {"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "content": "json"},
            _one,
            "<tool_call></tool_call>",
        ),
    ),
    (  # Mistral
        r"\[TOOL_CALLS\]",
        Markup({"open_pattern": r"\s*\[TOOL_CALLS\]", "content": "text"}, _mistral, "[TOOL_CALLS][ARGS][CALL_ID]"),
    ),
    (  # Llama 3: the whole answer is JSON
        r'<\|python_tag\|>|"parameters":',
        Markup(
            {"open_pattern": r"\A\s*(?:<\|python_tag\|>\s*)?(?=\{)", "content": "text"},
            _llama,
            "<|python_tag|>",
        ),
    ),
)


def in_template_with_tools(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any] | None = None,
) -> str:
    """A conversation and the functions that the model may call, in the chat template: see `in_template`.

    tools: as in OpenAI's interface. PlanError if the template has no place for them.
    """
    text = in_template(tokenizer, messages, tools, options)
    if text == in_template(tokenizer, messages, options=options):
        raise PlanError("this model's chat template has no place for tools", "Describe them in a message.")
    return text


def markup(tokenizer: Any) -> Markup:
    """How the model writes calls. PlanError if neither the tokenizer nor its chat template tells."""
    stated = getattr(tokenizer, "response_template", None)
    if isinstance(stated, Mapping) and isinstance(field := stated.get("fields", {}).get("tool_calls"), Mapping):
        return Markup(field, _one, json.dumps(field, ensure_ascii=False).replace("\\", ""))
    template = tokenizer.get_chat_template(tools=[{}])
    for mark, known in _KNOWN:
        if re.search(mark, template):
            return known
    raise PlanError(
        "the chat template does not tell how this model writes calls: it has none of the known marks",
        "Use `tool_choice` with a function's name or `required`.",
    )


class Calls:
    """Finds the calls in an answer. What is no call of an offered function, or is not valid, stays text."""

    def __init__(self, markup: Markup, tools: Sequence[Mapping[str, Any]]) -> None:
        """tools: the offered functions, as in OpenAI's interface."""
        self._read = markup.read
        self._names = {tool["function"]["name"] for tool in tools}
        self._parser: Any = _parser({**markup.field, "repeats": True}, tools)
        self._pending = ""  # since the last text or call that was told

    def add(self, text: str) -> tuple[str, list[Call]]:
        """The text and the calls that are known after `text` was appended."""
        return self._told(text, lambda character: self._parser.feed(character))

    def finish(self) -> tuple[str, list[Call]]:
        """The rest, when nothing more comes."""
        if self._parser is None:
            return "", []
        return self._told([""], lambda _: self._parser.finalize()[1])

    def _told(self, pieces: str | list[str], events: Callable[[str], Any]) -> tuple[str, list[Call]]:
        text, calls = "", list[Call]()
        for place, piece in enumerate(pieces):  # single characters, so that `_pending` is exact
            if self._parser is None:
                return text + "".join(pieces[place:]), calls
            self._pending += piece
            try:
                for event in events(piece):
                    if event["type"] == "region_chunk" and event["field"] == "content":
                        text += event["text"]
                        self._pending = self._pending[len(event["text"]) :]
                    elif event["type"] == "region_close" and event["field"] == "tool_calls":
                        calls += self._checked(event["value"])
                        self._pending = ""
            except (ValueError, KeyError, TypeError, RecursionError):  # no call after all
                text, self._pending, self._parser = text + self._pending, "", None
        return text, calls

    def _checked(self, value: Any) -> list[Call]:
        made = []
        for each in self._read(value):
            function = each.get("function", each) if isinstance(each, dict) else {}
            given = function.get("arguments", function.get("parameters", {}))
            arguments = json.loads(given) if isinstance(given, str) else given
            if function.get("name") not in self._names or not isinstance(arguments, dict):
                raise ValueError("no call of an offered function")
            made.append(Call(function["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False)))
        return made


def _parser(field: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> Any:
    from transformers.utils.chat_parsing.response_parser import ResponseParser

    fields = {"tool_calls": dict(field), "content": {"content": "text"}}
    return ResponseParser({"start_anchor": "\0", "fields": fields}, prefix="", tools=[dict(tool) for tool in tools])
