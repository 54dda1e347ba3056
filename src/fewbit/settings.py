"""Groups of settings: frozen dataclasses whose fields carry their default, their check and their help.

Each group is defined once. The checks of the Python verbs, the group's docstring and the flags of the command line
(`cli/flags.py`) are all made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self, TypeAlias

from fewbit.registry import near

Check: TypeAlias = Callable[[str, Any], Any]


def setting(default: Any, check: Check, help: str) -> Any:
    """A field of a group. `check` takes the field's name and value, and returns the value normalized (`checks.py`)."""
    return field(default=default, metadata={"check": check, "help": help})


@dataclass(frozen=True)
class Settings:
    """Base class of the groups. Its constructor checks each field. If a field's default is None, None is valid."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        rows = [f"{name}: {each.metadata['help']}" for name, each in vars(cls).items() if isinstance(each, Field)]
        cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", *(f"    {row}" for row in rows)])

    def __new__(cls, *args: Any, **given: Any) -> Self:
        known = [each.name for each in fields(cls)]
        if (unknown := next((name for name in given if name not in known), None)) is not None:
            raise TypeError(f"{cls.__name__} has no field {unknown!r}. {near(unknown, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                object.__setattr__(self, each.name, each.metadata["check"](each.name, value))


def checks_of(group: type[Settings]) -> dict[str, Check]:
    """Field name -> check."""
    return {each.name: each.metadata["check"] for each in fields(group)}
