"""What the commands share: options, checks before anything heavy is imported, the text on stdin, and JSON."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
import typer.core

from fewbit.errors import PlanError

F = TypeVar("F", bound=Callable[..., None])

_STDIN = "-"
_TEXT = "A .txt or .jsonl file, - for stdin, or pydoc, tiny, wikitext2, c4"

Model = Annotated[str, typer.Argument(help="A folder, a Hub name (org/model), or tiny, the embedded model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")]
Calibrated = Annotated[
    str | None, typer.Option(help=f"Text to calibrate on. {_TEXT}. Default: tiny for the embedded model, else pydoc.")
]
Text = Annotated[
    str | None, typer.Option(help=f"Text to measure on. {_TEXT}. Default: tiny for the embedded model, else pydoc.")
]
Samples = Annotated[int, typer.Option(help="Number of calibration windows.")]
Length = Annotated[int, typer.Option(help="Tokens in a calibration window.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")]
Kernel = Annotated[
    str | None, typer.Option(help="Kernel for all quantized weights (fewbit list). Default: the best for each weight.")
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Adapter = Annotated[str | None, typer.Option(help="Folder of a LoRA adapter to put on MODEL. Default: none.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
SafetensorsOnly = Annotated[bool, typer.Option("--safetensors-only", help="Refuse weights in pickle files.")]


def _windows(value: str | int) -> int | None:
    return None if value == "all" else int(value)


Windows = Annotated[
    int | None, typer.Option(parser=_windows, metavar="N|all", help="Number of windows to measure on; all: every one.")
]


def early(command: F) -> F:
    """Decorate `command`: check its arguments first, so that a mistake is reported before PyTorch is imported."""

    @functools.wraps(command)
    def call(**given: Any) -> None:
        from fewbit.api import arguments

        for name, value in given.items():
            if value is not None and not isinstance(value, bool):  # typer has read flags
                arguments.check(name, value)
        command(**given)

    return call  # type: ignore[return-value]


def text_of(value: str | None) -> str | tuple[str] | None:
    """The value of a text option. For -, the text on stdin as a tuple of one."""
    return (stdin(),) if value == _STDIN else value


def prompt_of(value: str) -> str:
    """The prompt. For -, the text on stdin without its final newline. UTF-8 in every locale."""
    if value == _STDIN:
        return stdin().removesuffix("\n")
    try:
        return os.fsencode(value).decode()
    except UnicodeError:  # the prompt check raises the error later
        return value


def stdin() -> str:
    """All of stdin; PlanError if another option has read it."""
    from fewbit.system.files import decoded

    if sys.stdin is None or sys.stdin.closed:
        raise PlanError("- stands for stdin, which is closed", "Give a file.")
    data = sys.stdin.buffer.read()
    if not data:
        raise PlanError("- stands for stdin, which is empty", "Only one option can read it, and once.")
    return decoded(data, "stdin")


def printed(data: Any) -> None:
    """Print one JSON object on stdout, unless another rank prints for this process."""
    from fewbit.system import ranks

    if not ranks.silent():
        print(json.dumps(data, indent=1, allow_nan=False))


class WithMethodOptions(typer.core.TyperCommand):
    """A command whose help lists the options of the methods too."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        from fewbit.methods.base import options

        super().format_options(ctx, formatter)
        rows = [(each.flag, f"{', '.join(each.methods)}: {each.help}  [default: {each.shown}]") for each in options()]
        with formatter.section("Options of methods"):
            formatter.write_dl(rows)


def method_flags(command: Any, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """`arguments` of `command` without the flags that are options of a method, and those options as text.

    Methods are imported only if there is a flag that the command itself does not have, so that help stays quick.
    """
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    if all(not a.startswith("--") or a.partition("=")[0] in own for a in arguments):
        return arguments, {}
    from fewbit import registry
    from fewbit.methods.base import option_types

    types = option_types()
    rest, options, waiting = [], {}, list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or flag in own:
            rest.append(argument)
        elif types.get(name.removeprefix("no_")) is bool and not equals:
            said = waiting.pop(0) if waiting and waiting[0].lower() in ("true", "false") else "true"
            options[name.removeprefix("no_")] = "false" if name.startswith("no_") else said
        elif name in types:
            if not equals and not waiting:
                raise PlanError(f"{flag} needs a value")
            options[name] = value if equals else waiting.pop(0)
        else:
            known = [*own, *(f"--{option.replace('_', '-')}" for option in types)]
            raise registry.unknown("option of quantize", flag, known)
    return rest, options
