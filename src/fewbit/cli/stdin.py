"""The text on stdin, which - stands for."""

from __future__ import annotations

import os
import sys

from fewbit.errors import PlanError

STDIN = "-"


def text_of(value: str | None) -> str | tuple[str] | None:
    """The value of a text option. For -, the text on stdin as a tuple of one."""
    return (stdin(),) if value == STDIN else value


def prompt_of(value: str) -> str:
    """The prompt. For -, the text on stdin without its final newline. UTF-8 in every locale."""
    if value == STDIN:
        return stdin().removesuffix("\n")
    try:
        return os.fsencode(value).decode()
    except UnicodeError:  # the prompt check raises the error later
        return value


def stdin(what: str = "- stands for stdin, which", hint: str = "Only one option can read stdin, and only once.") -> str:
    """All of stdin; PlanError if there is nothing, as when another option has read it. what, hint: for the error."""
    from fewbit.system.files import decoded

    if sys.stdin is None or sys.stdin.closed:
        raise PlanError(f"{what} is closed", hint)
    data = sys.stdin.buffer.read()
    if not data:
        raise PlanError(f"{what} is empty", hint)
    return decoded(data, "stdin")
