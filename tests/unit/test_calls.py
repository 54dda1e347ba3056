"""Calls of functions in answers, as families of models write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fewbit.errors import PlanError
from fewbit.models.decoding.calls import Call, Calls, in_template_with_tools, markup

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    for name in ("get_weather", "now")
]
# Pieces of the chat templates of the families, which say how to call.
QWEN = '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>'
QWEN_CODER = "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>"
LLAMA = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
MISTRAL = '{{- "[TOOL_CALLS] [" }}'
GEMMA = "{{ '<|tool_call>call:' + function['name'] + '{' }}"
PARIS = Call("get_weather", '{"city": "Paris", "days": 3}')
NOW = Call("now", "{}")
ARGUMENTS = '{"city": "Paris", "days": 3}'


class _Tokenizer:
    def __init__(self, template: str, response_template: Any = None) -> None:
        self.chat_template, self.response_template = template, response_template

    def get_chat_template(self, tools: Any) -> str:
        assert tools
        return self.chat_template

    def apply_chat_template(self, messages: Any, tools: Any = None, **_: Any) -> str:
        seen = json.dumps(tools) if tools and "tools" in self.chat_template else ""
        return seen + str(messages[-1]["content"])


CASES = {
    "qwen": (
        QWEN,
        f'I look.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "I look.",
        [PARIS, NOW],
    ),
    "qwen, arguments as text": (
        QWEN,
        f"<tool_call>{json.dumps({'name': 'get_weather', 'arguments': ARGUMENTS})}</tool_call>",
        "",
        [PARIS],
    ),
    "qwen, ended before the last mark": (QWEN, '<tool_call>\n{"name": "now", "arguments": {}}', "", [NOW]),
    "qwen coder": (
        QWEN_CODER,
        "I look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "I look.",
        [PARIS, NOW],
    ),
    "llama": (LLAMA, f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', "", [PARIS]),
    "llama, two": (
        LLAMA,
        f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}',
        "",
        [PARIS, NOW],
    ),
    "mistral 7": (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        [PARIS, NOW],
    ),
    "mistral 13": (
        MISTRAL,
        f"Wait.[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
        "Wait.",
        [PARIS, NOW],
    ),
    "mistral 11": (MISTRAL, f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{ARGUMENTS}", "", [PARIS]),
    "gemma": (GEMMA, '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>', "", [PARIS]),
}
TEXTS = {
    "no call": (QWEN, "a < b <tool and\n"),
    "not JSON": (QWEN, "<tool_call>{nope}</tool_call> after"),
    "not offered": (QWEN, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    "no arguments": (QWEN, '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    "not complete": (QWEN, 'Hi <tool_call>\n{"name": "get_weather", "argu'),
    "deep": (QWEN, "<tool_call>" + "[" * 5000 + "</tool_call>"),
    "not finite": (QWEN, '<tool_call>{"name": "now", "arguments": {"days": NaN}}</tool_call>'),
    "JSON": (LLAMA, '{"a": 1}'),
    "code": (LLAMA, "<|python_tag|>print(1)"),
    "braces": (LLAMA, "Hello {x}"),
    "half a mark": (MISTRAL, "hello [TOOL_CAL"),
    "lost": (MISTRAL, "[TOOL_CALLS]now"),
    "quotes": (GEMMA, "<|tool_call>call:now{days:}<tool_call|>"),
}


def _read(template: str, text: str, step: int) -> tuple[str, list[Call]]:
    calls = Calls(markup(_Tokenizer(template)), TOOLS)
    told = [calls.add(text[i : i + step]) for i in range(0, len(text), step)] + [calls.finish()]
    return "".join(each[0] for each in told), [call for each in told for call in each[1]]


@pytest.mark.parametrize("step", [1, 3, 10**6])
@pytest.mark.parametrize("case", CASES)
def test_calls_are_found_in_pieces_of_any_size(case: str, step: int) -> None:
    template, text, said, wanted = CASES[case]
    assert _read(template, text, step) == (said, wanted)


@pytest.mark.parametrize("step", [1, 3, 10**6])
@pytest.mark.parametrize("case", TEXTS)
def test_what_is_no_call_stays_text(case: str, step: int) -> None:
    template, text = TEXTS[case]
    assert _read(template, text, step) == (text, [])


def test_a_valid_call_before_an_invalid_one_counts() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n<tool_call>{"name": "now", '
    assert _read(QWEN, text, 1) == ('\n<tool_call>{"name": "now", ', [NOW])


def test_a_call_is_told_when_it_ends() -> None:
    calls, text = Calls(markup(_Tokenizer(QWEN)), TOOLS), '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert calls.add("Yes. ") == ("Yes.", [])  # the space may belong to the mark
    assert calls.add(text[:-1]) == ("", [])
    assert calls.add(text[-1]) == ("", [NOW])


def test_the_markup_of_the_tokenizer_comes_first() -> None:
    field = {"open": "<<", "close": ">>", "content": "json", "transform": {"type": "function", "function": "{content}"}}
    found = markup(_Tokenizer(QWEN, {"start_anchor": "x", "fields": {"tool_calls": field, "thinking": {}}}))
    calls = Calls(found, TOOLS)
    assert calls.add('<<{"name": "now", "arguments": {}}>>') == ("", [NOW])
    assert "<<" in found.marks


def test_templates_that_know_no_tools_are_refused() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(PlanError, match="no place for tools"):
        in_template_with_tools(_Tokenizer("{{ messages }}"), messages, TOOLS)
    assert "get_weather" in in_template_with_tools(_Tokenizer("{{ tools }}"), messages, TOOLS)
    with pytest.raises(PlanError, match="does not tell"):
        markup(_Tokenizer("{{ tools }}"))
