"""What all bodies of requests have in common. What is not supported is refused by its name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from fewbit.serving.failures import Failure

# Parameters of OpenAI's interface that this server does not have, with the values that change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "include_stop_str_in_output": (False,),
    # Those that only one endpoint has, in the other one:
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "echo": (False,),
    "messages": ([],),
    "prompt": ("", []),
}
_CHAT, _COMPLETIONS = "only in /v1/chat/completions", "only in /v1/completions"
_SAID = {
    "response_format": _CHAT,
    "tools": _CHAT,
    "functions": "use tools",
    "function_call": "use tool_choice",
    "messages": _CHAT,
    "echo": _COMPLETIONS,
    "prompt": _COMPLETIONS,
    "include_stop_str_in_output": "an answer ends before its stop sequence",
}
# They tell the server about the caller, and change no answer.
_LABELS = ("user", "safety_identifier", "prompt_cache_key", "metadata")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept, known = {}, {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in given.items():
            if value is None or name in _LABELS:
                continue
            if name in known:
                kept[name] = value
            elif name not in _WITHOUT_EFFECT:
                raise Failure(400, f"{name}: unknown parameter", "unknown_parameter", name)
            elif value not in _WITHOUT_EFFECT[name]:
                said = _SAID.get(name, "this server does not support it")
                raise Failure(400, f"{name}: {said}", "unsupported_parameter", name)
        return kept
