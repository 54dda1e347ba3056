"""What the commands share: options that belong to no group of settings, options of methods, and JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
import typer.core

from fewbit import checks
from fewbit.errors import PlanError

Fuse = Annotated[
    bool | None,
    typer.Option("--fuse/--no-fuse", help="Fuse linears that share an input. Default: on a GPU, or with --max-length."),
]
MaxLength = Annotated[
    int | None, typer.Option(help="Fuse, for so many tokens of all prompts and answers. Default: as many as needed.")
]


def fused(fuse: bool | None, max_length: int | None) -> int | bool | None:
    """`Loading.fuse` for --fuse/--no-fuse and --max-length. PlanError for both --no-fuse and a length."""
    if max_length is not None and fuse is False:
        raise PlanError(
            "--max-length has no effect with --no-fuse",
            "Leave out one of them: it is the size of a fused model's cache.",
        )
    return fuse if max_length is None else max_length


Model = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, a Hub name (org/model), tiny, or smollm2 if installed.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text to measure on: a .txt or .jsonl file, - for stdin, or pydoc, tiny, wikitext2, c4. "
        "Default: tiny for the embedded model, else pydoc."
    ),
]
Output = Annotated[
    str | None, typer.Option("-o", "--output", help="Folder or .gguf file to make. Required unless --dry-run.")
]
Imatrix = Annotated[str | None, typer.Option(help="Importance matrix (.gguf, .dat) to use in place of calibration.")]
MaxShard = Annotated[
    str | None, typer.Option(help="Split a GGUF file into files of at most this size, such as 2GB. Default: one file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what each tensor would become. Write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
SafetensorsOnly = Annotated[bool, typer.Option("--safetensors-only", help="Refuse weights in pickle files.")]


def _windows(value: str | int) -> int | None:
    if value == "all":
        return None
    try:
        return int(value)
    except ValueError:
        raise checks.invalid("samples", value, "an integer above 0, or all") from None


Windows = Annotated[
    int | None, typer.Option(parser=_windows, metavar="N|all", help="Number of windows to measure on; all: every one.")
]


def check_output(output: str | None, *, dry_run: bool) -> None:
    """PlanError if a command has nowhere to write, or if a name is none."""
    if output is not None:
        checks.path("out", output)
    elif not dry_run:
        raise PlanError("no output folder", "Say where to: -o OUT. Or use --dry-run.")


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
            raise PlanError(f"quantize has no option {flag!r}", registry.near(flag, known))
    return rest, options
