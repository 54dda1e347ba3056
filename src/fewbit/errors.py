"""The exceptions that fewbit raises, as one small class tree.

The message says which value is wrong and where it is (tensor, file or flag). The hint says how to fix it.
`exit_code` is the exit status of the command line.
"""

from __future__ import annotations


class FewbitError(Exception):
    """Base class of all errors that fewbit raises on purpose.

    `message` says what is wrong and where. `hint` says what to do instead; it may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class PlanError(FewbitError):
    """The request cannot be carried out: an unknown name, a shape that does not fit, an output folder that exists."""

    exit_code = 2


class ArgumentError(PlanError):
    """An argument has an invalid value. `as_flag` is the same message with the argument's command-line flag."""

    def __init__(self, argument: str, shown: str, expected: str) -> None:
        super().__init__(f"{argument}={shown}: expected {expected}")
        flag = _FLAGS.get(argument) or "--" + argument.replace("_", "-")
        self.as_flag = f"{flag} {shown}: expected {expected}"


_FLAGS = {"model": "MODEL", "prompt": "PROMPT", "out": "--output", "purpose": "--for"}


class FormatError(FewbitError):
    """A file or folder is malformed: truncated, contradictory, or missing a part."""

    exit_code = 3


class NumericsError(FewbitError):
    """A number is NaN, infinite or out of range where computation needs a finite one."""

    exit_code = 4


class KernelError(FewbitError):
    """No kernel on this machine supports a tensor, or a kernel returned a wrong result."""

    exit_code = 5


class OutputError(FewbitError):
    """A result cannot be written: the disk is full, or the folder is gone. The hint says where the result is."""


class PeerError(FewbitError):
    """Another process of the same run has ended. `reported`: that process has already printed the reason."""

    exit_code = 6

    def __init__(self, message: str, hint: str = "", *, reported: bool = False) -> None:
        super().__init__(message, hint)
        self.reported = reported
