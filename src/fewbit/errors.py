"""The errors a user can meet, as one small tree.

Every error says what was wrong with the offending value and where (tensor, file or flag); its `hint` says what would
be right. `exit_code` is what the command line ends with.
"""

from __future__ import annotations


class FewbitError(Exception):
    """Base of all errors that fewbit raises on purpose.

    `message` says what is wrong and where; `hint`, where there is one, says what to do instead.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class PlanError(FewbitError):
    """The request cannot be carried out: unknown name, shape that does not fit, output folder in the way."""

    exit_code = 2


class ArgumentError(PlanError):
    """An argument has a value that it cannot have; `as_flag` says so to who wrote it on the command line."""

    def __init__(self, argument: str, shown: str, wanted: str) -> None:
        super().__init__(f"{argument}={shown}: give {wanted}")
        flag = _FLAGS.get(argument) or "--" + argument.replace("_", "-")
        self.as_flag = f"{flag} {shown}: give {wanted}"


_FLAGS = {"model": "MODEL", "prompt": "PROMPT", "out": "--output", "purpose": "--for"}


class FormatError(FewbitError):
    """A file or folder is not what it claims to be: truncated, contradictory, missing a part."""

    exit_code = 3


class NumericsError(FewbitError):
    """A number that must be finite is not."""

    exit_code = 4


class KernelError(FewbitError):
    """No kernel can serve a tensor here, or one gave a wrong result."""

    exit_code = 5


class OutputError(FewbitError):
    """A result cannot be written: the disk is full, or the place has gone. The hint says where the result is."""


class PeerError(FewbitError):
    """Another process of the same run has ended. `told`: it has said why itself."""

    exit_code = 6

    def __init__(self, message: str, hint: str = "", *, told: bool = False) -> None:
        super().__init__(message, hint)
        self.told = told
