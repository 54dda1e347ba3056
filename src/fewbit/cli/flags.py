"""Makes the flags of a command from groups of settings, and checks all of them before anything heavy is imported.

A command takes a group as one parameter, such as `tuning: Tuning`. typer sees a flag for each field of the group: its
default, its help and its check are those of the field. `Annotated[Loading, Fields("device", "kernel")]` makes flags of
these fields only, and `Fields(text="calibration")` makes the field `text` the flag --calibration.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from fewbit import checks
from fewbit.cli.stdin import STDIN, text_of
from fewbit.errors import in_flags
from fewbit.settings import Settings
from fewbit.system import publish, ranks
from fewbit.texts import sources

C = TypeVar("C", bound=Callable[..., None])
_ARGUMENTS = {"output": "out", "image": "images"}  # the verbs' names of what commands call otherwise
_MAY_BE_EMPTY = ("prompt", "system")
_TYPES = {"int": int, "float": float, "bool": bool}  # a flag of another type is text


def _check_filled(name: str, value: Any) -> None:
    """ArgumentError for an empty value, as of a variable of the shell that is not set: it is not the default."""
    if value == "":
        raise checks.invalid(name, value, "a value; leave the option out for its default")


class Fields:
    """The fields of a group that are flags of a command, and the names of those flags that differ from the field's."""

    def __init__(self, *names: str, **renamed: str) -> None:
        self.flags = {name: name for name in names} | renamed


@dataclass(frozen=True)
class _Flag:
    name: str  # of the parameter of the command
    field: Field[Any]

    @property
    def is_text(self) -> bool:
        """Whether the flag takes a text to calibrate on: a name, a file, or - for stdin."""
        return self.field.metadata["check"] is sources.checked_or_self

    def parameter(self, default: Any) -> inspect.Parameter:
        """The parameter that typer makes the flag from."""
        default = (",".join(default) or None) if isinstance(default, tuple) else default
        kind = _TYPES.get(str(self.field.type).split(" | ")[0], str)
        help = in_flags(self.field.metadata["help"])
        if self.is_text:
            help = help.replace("file, or ", "file, - for stdin, or ")
        names = (f"--{self.name.replace('_', '-')}",) if default is False else ()  # an off switch needs no --no-
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind if default is not None else kind | None, typer.Option(*names, help=help)],
        )

    def value(self, given: Any) -> Any:
        """The value of the field, checked under the flag's name."""
        _check_filled(self.name, given)
        if str(self.field.type).startswith("tuple"):
            given = tuple(part.strip() for part in (given or "").split(",") if part.strip())
        if given == STDIN and self.is_text:
            return given
        if given is not None or self.field.default is not None:
            found = self.field.metadata["check"](self.name, given)
            if self.field.metadata["check"] is checks.device:
                checks.gpu(self.name, found)
        return given


def checked(command: C) -> C:
    """Decorate `command`: give its groups of settings flags, and check its arguments before PyTorch is imported."""
    hints = get_type_hints(command, include_extras=True)
    parameters, groups = list[inspect.Parameter](), dict[str, tuple[Settings, list[_Flag]]]()
    for name, parameter in inspect.signature(command).parameters.items():
        group, *chosen = get_args(hints[name]) or (hints[name],)
        if not (isinstance(group, type) and issubclass(group, Settings)):
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        default = group() if parameter.default is inspect.Parameter.empty else parameter.default
        flags = [
            _Flag(names, each)
            for each in fields(group)
            if (names := chosen[0].flags.get(each.name) if chosen else each.name)
        ]
        groups[name] = default, flags
        parameters += [flag.parameter(getattr(default, flag.field.name)) for flag in flags]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        from fewbit.api import arguments

        values = {
            name: {flag.field.name: flag.value(given.pop(flag.name)) for flag in flags}
            for name, (_, flags) in groups.items()
        }
        for name, value in given.items():
            if name in ("text", "data") and value == STDIN:
                continue
            if value is not None and not isinstance(value, bool):  # typer has read flags
                found = arguments.check(_ARGUMENTS.get(name, name), value)
                given[name] = found if isinstance(found, str) else value  # a path is complete from here on
                if name not in _MAY_BE_EMPTY:
                    _check_filled(name, value)
        if given.get("output") and "overwrite" in given and not given.get("dry_run"):
            # Only one of several processes may try to make the output, as in the verb.
            check = publish.check_free if ranks.silent() else publish.check_output
            check(given["output"], overwrite=given["overwrite"])
        for name, (default, flags) in groups.items():
            values[name] |= {flag.field.name: text_of(values[name][flag.field.name]) for flag in flags if flag.is_text}
            given[name] = type(default)(**vars(default) | values[name])
        command(**given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    return call  # type: ignore[return-value]
