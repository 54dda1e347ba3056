"""The exceptions that fewbit raises, as one small class tree.

The message says which value is wrong and where it is (tensor, file or flag). The hint says how to fix it.
`exit_code` is the exit status of the command line.
"""

from __future__ import annotations

import re

_QUOTED = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")  # an argument in a message: `length=1`, `overwrite`
# Arguments whose flags have other names. With a value, and without.
_FLAGS = {"model": "MODEL", "prompt": "PROMPT", "out": "-o", "purpose": "--for", "fuse": "--fuse", "images": "--image"}
_FLAGS |= {"repo": "REPO"}


def in_python(text: str) -> str:
    """A message for Python: the quotes around `length=1` go."""
    return _QUOTED.sub(lambda found: found[0] if found[2] is None else found[0].strip("`"), text)


def in_flags(text: str) -> str:
    """A message for the command line: `length=1` becomes --length 1, `overwrite=True` becomes --overwrite."""

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        flag = _FLAGS.get(name) or f"--{name.replace('_', '-')}"
        if name == "fuse" and value is not None:
            return f"--max-length {value}"
        return flag if value in (None, "True") else f"{flag} {value}"

    return _QUOTED.sub(flag, text)


class FewbitError(Exception):
    """Base class of all errors that fewbit raises on purpose.

    `message` says what is wrong and where. `hint` says what to do instead; it may be empty. Both name
    arguments in backquotes, such as `length=1`: `str` shows them as Python, `in_flags` as the command line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return in_python(f"{self.message}\n{self.hint}" if self.hint else self.message)


class PlanError(FewbitError):
    """The request cannot be carried out: an unknown name, a shape that does not fit, an output folder that exists."""

    exit_code = 2


class ArgumentError(PlanError):
    """An argument has an invalid value."""

    def __init__(self, argument: str, shown: str, expected: str) -> None:
        super().__init__(f"`{argument}={shown}`: expected {expected}")


class FormatError(FewbitError):
    """A file or folder is malformed: truncated, contradictory, or missing a part."""

    exit_code = 3


class NumericsError(FewbitError):
    """A number is NaN, infinite or out of range where computation needs a finite one."""

    exit_code = 4


class KernelError(FewbitError):
    """No kernel on this machine supports a tensor, or a kernel returned a wrong result."""

    exit_code = 5


class NotBetter(FewbitError):
    """The work is done, and its result is not better than the input. Nothing is written."""

    exit_code = 7


class OutputError(FewbitError):
    """A result cannot be written: the disk is full, or the folder is gone. The hint says where the result is."""


class PeerError(FewbitError):
    """Another process of the same run has ended. `reported`: that process has already printed the reason."""

    exit_code = 6

    def __init__(self, message: str, hint: str = "", *, reported: bool = False) -> None:
        super().__init__(message, hint)
        self.reported = reported
