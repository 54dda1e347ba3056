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
    # Of vLLM's and llama.cpp's interfaces:
    "cache_prompt": (True,),
    "grammar": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "include_reasoning": (True,),
    "json_schema": (),
    "length_penalty": (1,),
    "min_p": (0,),
    "n_predict": (-1,),
    "repeat_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    # Those that only one endpoint has, in the other one:
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "chat_template_kwargs": ({},),
    "reasoning_effort": (),
    "add_generation_prompt": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "messages": ([],),
    "prompt": ("", []),
}
_CHAT, _COMPLETIONS = "only in /v1/chat/completions", "only in /v1/completions"
_SCHEMA = "use response_format, which takes a JSON schema"
_SAID = {
    "response_format": _CHAT,
    "tools": _CHAT,
    "functions": "use tools",
    "function_call": "use tool_choice",
    "messages": _CHAT,
    "echo": _COMPLETIONS,
    "prompt": _COMPLETIONS,
    "chat_template_kwargs": _CHAT,
    "reasoning_effort": _CHAT,
    "add_generation_prompt": _CHAT,
    "continue_final_message": _CHAT,
    "grammar": _SCHEMA,
    "guided_choice": _SCHEMA,
    "guided_grammar": _SCHEMA,
    "guided_json": _SCHEMA,
    "guided_regex": _SCHEMA,
    "json_schema": _SCHEMA,
    "structured_outputs": _SCHEMA,
    "n_predict": "use max_tokens",
    "repeat_penalty": "use repetition_penalty, which counts the whole text",
    "stop_token_ids": "use stop, which takes special tokens as text",
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
