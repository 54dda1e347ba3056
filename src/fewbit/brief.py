"""How results look in Python: `repr` is one short line; a notebook shows a small table."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from fewbit.units import size

C = TypeVar("C", bound=type)

_TEXT = 60  # characters of a text that are shown
_LINE = 600  # characters of a line


def brief(cls: C) -> C:
    """Class decorator for dataclasses with long lists or dicts: `repr` shows their lengths instead of their items."""
    cls.__repr__ = _line  # type: ignore[assignment]
    setattr(cls, "_repr_html_", _table)  # noqa: B010 - a name that types do not know
    return cls


def _line(result: Any) -> str:
    line = f"{type(result).__name__}({', '.join(f'{name}={value}' for name, value in _shown(result, quoted=True))})"
    return line if len(line) <= _LINE else f"{line[:_LINE]}...)"


def _table(result: Any) -> str:
    rows = (
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(value)}</td></tr>"
        for name, value in _shown(result, quoted=False)
    )
    return f"<table><caption>{type(result).__name__}</caption>{''.join(rows)}</table>"


def _shown(result: Any, quoted: bool) -> Iterator[tuple[str, str]]:
    for field in fields(result):
        yield field.name, _value(field.name, getattr(result, field.name), quoted)


def _value(name: str, value: Any, quoted: bool) -> str:
    """A value in a few words; one within 95 % bounds (`value`, `low`, `high`) as the value and its bounds."""
    if isinstance(value, str):
        text = value if len(value) <= _TEXT else f"{value[: _TEXT - 3]}..."
        return repr(text) if quoted else text
    if isinstance(value, int) and not isinstance(value, bool) and name.endswith(("bytes", "peak")) and not quoted:
        return size(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | Sequence):
        return f"<{len(value)}>" if quoted else f"{len(value)} of them"
    if all(hasattr(value, part) for part in ("value", "low", "high")):
        return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"
    if is_dataclass(value):
        inner = ", ".join(f"{f.name}={_value(f.name, getattr(value, f.name), quoted)}" for f in fields(value))
        return f"{type(value).__name__}({inner})"[:240]
    return repr(value) if quoted or not isinstance(value, type(None)) else "none"
