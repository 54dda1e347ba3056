"""What clients may ask: the bodies of requests, checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from fewbit.models.decoding.choosing import Choosing
from fewbit.serving.body import Body
from fewbit.serving.failures import Failure
from fewbit.serving.messages import Message, NamedTool, Tool

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Token = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]  # a token id, as keys of JSON are texts
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if self.include_obfuscation:
            raise Failure(
                400,
                "stream_options.include_obfuscation: this server does not pad the pieces of a stream",
                "unsupported_parameter",
                "stream_options",
            )
        return self


class Asked(Body):
    """What chat and completions have in common."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    seed: _Seed | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    logit_bias: dict[_Token, _Bias] = Field(default_factory=dict, max_length=1024)
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Failure(400, "stream_options: only with stream", "invalid_value", "stream_options")
        if self.new is not None and self.min_tokens > self.new:
            raise Failure(400, f"min_tokens: more than the {self.new} of max_tokens", "invalid_value", "min_tokens")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def answers(self) -> int:
        """The number of answers."""
        return self.n

    @property
    def new(self) -> int | None:
        """Tokens of the answer at most; None is as many as the context has room for."""
        raise NotImplementedError

    @property
    def scored(self) -> bool:
        """Whether the prompt's log probabilities are reported too."""
        return False

    @property
    def shown(self) -> int | None:
        """How many likely tokens to report at each position; None reports nothing."""
        raise NotImplementedError

    def choosing(self, usual: Choosing, choice: int = 0) -> Choosing:
        """How the tokens of one of `n` answers are chosen. usual: what holds for what the request does not say."""
        return Choosing(
            temperature=usual.temperature if self.temperature is None else self.temperature,
            top_p=usual.top_p if self.top_p is None else self.top_p,
            top_k=usual.top_k if self.top_k is None else self.top_k,
            seed=None if self.seed is None else self.seed + choice,
            logprobs=self.shown,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


class JsonSchema(Body):
    """A named schema. The answer follows it whether `strict` or not."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Failure(
                400,
                "response_format: json_schema belongs to the type json_schema, and is needed there",
                "invalid_value",
                "response_format",
            )
        return self

    @property
    def schema_(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for plain text."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_


class Chat(Asked):
    """A body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    response_format: ResponseFormat | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field([], max_length=128, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=64)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _alternatives(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise Failure(400, "top_logprobs: only with logprobs", "invalid_value", "top_logprobs")
        names, wrong = [tool.function.name for tool in self.tools], None
        if len(set(names)) < len(names):
            raise Failure(400, "tools: two functions have the same name", "invalid_value", "tools")
        if self.forced and not names:
            wrong = "only with tools"
        elif self.one_function and self.one_function not in names:
            wrong = f"there is no function {self.one_function} in tools"
        if wrong:
            raise Failure(400, f"tool_choice: {wrong}", "invalid_value", "tool_choice")
        if self.offered and self.response_format is not None and self.response_format.schema_ is not None:
            said = "response_format: not with tools that the model may call"
            raise Failure(400, said, "unsupported_parameter", "response_format")
        return self

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.schema_ is not None and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            said = f"{name}: not with {self.schema_[0]}, as the answer ends where its JSON is complete"
            raise Failure(400, said, "unsupported_parameter", name)
        if self.continue_final_message:
            last, wrong = self.messages[-1], None
            if self.add_generation_prompt:
                wrong = "not with add_generation_prompt, which begins a new message"
            elif last.role != "assistant" or not str(last.turn["content"]).strip() or last.tool_calls:
                wrong = "the last message must be a text of the assistant"
            if wrong:
                said = f"continue_final_message: {wrong}"
                raise Failure(400, said, "invalid_value", "continue_final_message")
        return self

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The functions that the model may call, as a chat template takes them."""
        return [] if self.tool_choice == "none" else [tool.described for tool in self.tools]

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in ("none", "auto")

    @property
    def one_function(self) -> str | None:
        """The function that the answer must call, if the request names one."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def schema_(self) -> tuple[str, dict[str, Any]] | None:
        """The JSON schema of the answer and the parameter that it comes from; None for plain text."""
        if not self.forced:
            schema = None if self.response_format is None else self.response_format.schema_
            return None if schema is None else ("response_format", schema)
        functions = [tool.function for tool in self.tools]
        if self.one_function:
            return "tools", next(each.schema_ for each in functions if each.name == self.one_function)
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": each.name}, "arguments": each.schema_},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for each in functions
        ]
        return "tools", {"anyOf": calls}

    @property
    def shown(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def new(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class Completion(Asked):
    """A body of /v1/completions."""

    prompt: Any  # a list of prompts, after its check
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.max_tokens == 0 and not self.scored:
            raise Failure(400, "max_tokens: 0 only with echo and logprobs", "invalid_value", "max_tokens")
        return self

    @property
    def answers(self) -> int:
        return len(self.prompt) * self.n

    @property
    def scored(self) -> bool:
        return self.echo and self.logprobs is not None

    @property
    def shown(self) -> int | None:
        return self.logprobs

    @property
    def new(self) -> int:
        """Tokens of the answer at most. OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @field_validator("prompt")
    @classmethod
    def _listed(cls, given: Any) -> list[str | list[int]]:
        """The prompts, each as text or token ids."""
        # By hand: for a long list with errors, pydantic takes a minute.
        several = isinstance(given, list) and given and isinstance(given[0], str | list)
        prompts: list[Any] = given if several else [given]
        for prompt in prompts:
            if prompt in ("", []):
                raise Failure(400, "prompt: it is empty", "invalid_value", "prompt")
            if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(x) is int for x in prompt)):
                said = "prompt: it must be a text or a list of token ids, or a list of these"
                raise Failure(400, said, "invalid_value", "prompt")
        return prompts
