"""The turns of a conversation, and the functions that the model may call, as clients send them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from fewbit.serving.body import Body
from fewbit.serving.failures import Failure

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Part(Body):
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


class Called(Body):
    """The function of a call. arguments: a JSON object, as text."""

    name: _Name
    arguments: str


class ToolCall(Body):
    """A call in an earlier answer, sent back."""

    id: str
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None  # pieces of a stream have it

    @property
    def turn(self) -> dict[str, Any]:
        """The call as a chat template takes it: its arguments are a mapping."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            said = f"messages: the arguments of the call {self.id} must be a JSON object"
            raise Failure(400, said, "invalid_value", "messages")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class Message(Body):
    """A turn. What a client sends back of an answer besides its text, such as `refusal`, is null and left out."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    tool_calls: list[ToolCall] | None = Field(None, fail_fast=True)
    tool_call_id: str | None = None
    name: str | None = None  # of a tool's function
    reasoning_content: str | None = None  # what an earlier answer thought; the chat template decides what it keeps

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        wrong = None
        if self.tool_calls and self.role != "assistant":
            wrong = "tool_calls: only in messages of the assistant"
        elif (self.tool_call_id is not None) != (self.role == "tool"):
            wrong = "tool_call_id belongs to the role tool, and is required there"
        elif self.name is not None and self.role != "tool":
            wrong = "name: only in messages of the role tool"
        elif self.reasoning_content is not None and self.role != "assistant":
            wrong = "reasoning_content: only in messages of the assistant"
        elif self.content is None and not self.tool_calls:
            wrong = "content: it is required"
        if wrong:
            raise Failure(400, f"messages: {wrong}", "invalid_value", "messages")
        return self

    @property
    def turn(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        given = self.content or ""
        text = given if isinstance(given, str) else "".join(part.text for part in given)
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            turn["tool_calls"] = [call.turn for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            turn["name"] = self.name
        if self.reasoning_content is not None:
            turn["reasoning_content"] = self.reasoning_content
        return turn


class Function(Body):
    """A function of the client. parameters: the JSON schema of its arguments; without, it has none."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(Body):
    type: Literal["function"]
    function: Function

    @property
    def described(self) -> dict[str, Any]:
        """The tool as a chat template takes it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        return {"type": "function", "function": {**function, "parameters": self.function.schema_}}


class Named(Body):
    name: _Name


class NamedTool(Body):
    """The choice of one function."""

    type: Literal["function"]
    function: Named
