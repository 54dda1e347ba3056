"""What clients may ask: the bodies of requests, checked. What is not supported is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from fewbit.models.decoding.continuous import Choosing
from fewbit.serving.failures import Failure

# Parameters of OpenAI's interface that this server does not have, with the values that change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
_SAID = {
    "n": "this server gives one answer to each request: send the request n times",
    "response_format": "only in /v1/chat/completions",
    "tools": "this server does not support it, because it parses no calls in an answer. Describe the functions in a "
    "message, and ask for JSON by response_format",
}
_SAID |= {"functions": _SAID["tools"]}
# They tell the server about the caller, and change no answer.
_LABELS = ("user", "safety_identifier", "prompt_cache_key", "metadata")

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Token = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]  # a token id, as keys of JSON are texts
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]


class _Body(BaseModel):
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


class StreamOptions(_Body):
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


class Asked(_Body):
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
    logit_bias: dict[_Token, _Bias] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Failure(400, "stream_options: only with stream", "invalid_value", "stream_options")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def shown(self) -> int | None:
        """How many likely tokens to report at each position; None reports nothing."""
        raise NotImplementedError

    def choosing(self, usual: Choosing) -> Choosing:
        """How the tokens are chosen. usual: what holds for what the request does not say."""
        return Choosing(
            temperature=usual.temperature if self.temperature is None else self.temperature,
            top_p=usual.top_p if self.top_p is None else self.top_p,
            top_k=usual.top_k if self.top_k is None else self.top_k,
            seed=self.seed,
            logprobs=self.shown,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
        )


class Part(_Body):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, given: Any) -> Any:
        if isinstance(given, dict) and (kind := given.get("type")) != "text":
            raise Failure(
                400, f"messages: parts of type {kind!r} are not supported", "unsupported_parameter", "messages"
            )
        return given


class Message(_Body):
    """A turn. What a client sends back of an answer besides its text, such as `refusal`, is null and left out."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def turn(self) -> dict[str, str]:
        """The message as a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(_Body):
    """A named schema. The answer follows it whether `strict` or not."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")


class ResponseFormat(_Body):
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

    messages: list[Message] = Field(min_length=1)
    response_format: ResponseFormat | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _alternatives(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise Failure(400, "top_logprobs: only with logprobs", "invalid_value", "top_logprobs")
        return self

    @property
    def shown(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def new(self) -> int | None:
        """Tokens of the answer at most; None is as many as the context has room for."""
        return self.max_completion_tokens or self.max_tokens


class Completion(Asked):
    """A body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def shown(self) -> int | None:
        return self.logprobs

    @property
    def new(self) -> int:
        """Tokens of the answer at most. OpenAI's default is 16."""
        return self.max_tokens or 16

    @property
    def one(self) -> str | list[int]:
        """The prompt, as text or token ids."""
        given: Any = self.prompt
        if isinstance(given, list) and given and not isinstance(given[0], int):
            if len(given) > 1:
                raise Failure(400, "prompt: one prompt for each request", "unsupported_parameter", "prompt")
            given = given[0]
        if not given:
            raise Failure(400, "prompt: it is empty", "invalid_value", "prompt")
        return given  # type: ignore[no-any-return]
