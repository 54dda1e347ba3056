"""What an answer says: text, or calls of functions. Each reader gets the text as it grows."""

from __future__ import annotations

import json
from typing import Any, Protocol

from fewbit.errors import PlanError
from fewbit.models.decoding.calls import Call, Calls, markup
from fewbit.serving.asked import Chat, Completion
from fewbit.serving.failures import Failure


class Reader(Protocol):
    """`add` and `finish` give the text and the calls that are known since the last time."""

    def add(self, text: str) -> tuple[str, list[Call]]: ...

    def finish(self) -> tuple[str, list[Call]]: ...


class Plain:
    """All of it is text."""

    def add(self, text: str) -> tuple[str, list[Call]]:
        return text, []

    def finish(self) -> tuple[str, list[Call]]:
        return "", []


class Forced:
    """All of it is one call, as a grammar has it. If it is not complete, it stays text."""

    def __init__(self, name: str | None) -> None:
        """name: of the function, if only its arguments are written."""
        self._name, self._text = name, ""

    def add(self, text: str) -> tuple[str, list[Call]]:
        self._text += text
        return "", []

    def finish(self) -> tuple[str, list[Call]]:
        try:
            value: Any = json.loads(self._text)
            name, arguments = (self._name, value) if self._name else (value["name"], value["arguments"])
        except ValueError:
            return self._text, []
        return "", [Call(str(name), json.dumps(arguments, ensure_ascii=False))]


class _First:
    """Only the first call."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._found = reader, False

    def add(self, text: str) -> tuple[str, list[Call]]:
        return self._only(self._reader.add(text))

    def finish(self) -> tuple[str, list[Call]]:
        return self._only(self._reader.finish())

    def _only(self, read: tuple[str, list[Call]]) -> tuple[str, list[Call]]:
        calls = [] if self._found else read[1][:1]
        self._found = self._found or bool(calls)
        return read[0], calls


def reader(tokenizer: Any, asked: Chat | Completion) -> tuple[Reader, str | None]:
    """The reader of an answer, and the special tokens that are a part of its text; None is none.

    Failure if this server does not know how the model writes calls.
    """
    if not isinstance(asked, Chat) or not (tools := asked.offered):
        return Plain(), None
    if asked.forced:
        return Forced(asked.one_function), None
    try:
        known = markup(tokenizer)
    except PlanError as error:
        raise Failure(400, f"tools: {error.message}", "unsupported_parameter", "tools") from error
    found: Reader = Calls(known, tools)
    return found if asked.parallel_tool_calls else _First(found), known.marks
