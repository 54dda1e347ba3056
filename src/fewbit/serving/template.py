"""What a request gives the chat template besides messages and tools. What the template does not read is refused."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser

from fewbit.errors import PlanError
from fewbit.serving.asked import Chat
from fewbit.serving.failures import Failure

_OWN = ("messages", "tools", "add_generation_prompt", "continue_final_message")  # parameters of their own
_FUNCTIONS = ("raise_exception", "strftime_now")  # that transformers gives every template


def options(asked: Chat, tokenizer: Any) -> dict[str, Any]:
    """Arguments of `apply_chat_template`. Failure for one that the model's template does not read."""
    given = dict(asked.chat_template_kwargs)
    if given or asked.reasoning_effort is not None:
        read = _read(tokenizer, asked.offered)
        for name in given:
            if name in _OWN:
                raise _refused("chat_template_kwargs", f"send {name} as a parameter of its own")
            if name not in read:
                raise _refused("chat_template_kwargs", f"this model's chat template does not read {name}")
        if asked.reasoning_effort is not None:
            given |= _effort(asked.reasoning_effort, given, read)
    if asked.continue_final_message:
        return {**given, "continue_final_message": True, "add_generation_prompt": False}
    return {**given, "add_generation_prompt": asked.add_generation_prompt is not False}


def _effort(effort: str, given: dict[str, Any], read: set[str]) -> dict[str, Any]:
    """As vLLM, effort also switches thinking on or off, unless the request says it."""
    thinking: dict[str, Any] = {}
    if "enable_thinking" in read and "enable_thinking" not in given:
        thinking["enable_thinking"] = effort != "none"
    if "reasoning_effort" in given:
        raise _refused("reasoning_effort", "chat_template_kwargs has it, too")
    if "reasoning_effort" in read:
        return {"reasoning_effort": effort, **thinking}
    if "enable_thinking" not in read:
        raise _refused("reasoning_effort", "this model's chat template does not read it")
    if effort != "none":
        raise _refused("reasoning_effort", "this model's chat template knows no levels, only none")
    return thinking


def _read(tokenizer: Any, tools: list[dict[str, Any]]) -> set[str]:
    """The variables that the template of a request reads. PlanError if it is malformed, or none is the default."""
    try:
        return names(str(tokenizer.get_chat_template(tools=tools or None)))
    except (TemplateSyntaxError, ValueError) as error:
        raise PlanError(f"the model's chat template cannot be read: {error}") from error


def names(template: str) -> set[str]:
    """The variables that a chat template takes from outside. TemplateSyntaxError if it is malformed."""
    environment = Environment(extensions=[_Generation, loopcontrols])
    environment.globals |= dict.fromkeys(_FUNCTIONS)
    return meta.find_undeclared_variables(environment.parse(template))


class _Generation(Extension):
    """`{% generation %}` of transformers, around the answers of a chat."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares no class variable

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refused(param: str, why: str) -> Failure:
    return Failure(400, f"{param}: {why}", "unsupported_parameter", param)
