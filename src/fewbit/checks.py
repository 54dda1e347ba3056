"""Checks of values, each with a name, that raise ArgumentError."""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Callable, Sequence
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

from fewbit.errors import ArgumentError

Texts: TypeAlias = str | os.PathLike[str] | Sequence[str]


MOST = 2**31 - 1  # of whatever is counted


LAST_SEED = 2**32 - 1  # NumPy's generator, which transformers seeds too, takes no more


def wrong(name: str, value: object, wanted: str) -> ArgumentError:
    """The error for a value that an argument cannot have; `wanted` says what it can."""
    return ArgumentError(name, _brief.repr(value), wanted)


_brief = reprlib.Repr()


_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def whole(low: int, high: int = MOST) -> Callable[[str, Any], int]:
    """A check for whole numbers of any library, except truth values."""

    def check(name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool) or not low <= number <= high:
            raise wrong(name, value, f"a whole number from {low} to {high}")
        return number

    return check


def number(name: str, value: Any) -> float:
    """A finite number; which ones make sense, the verb says."""
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(float(value)):
        raise wrong(name, value, "a finite number")
    return float(value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    return value


def place(name: str, value: Any) -> str | Path:
    """A name or a path; a path-like object becomes a Path."""
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str) or not given or "\0" in given:
        raise wrong(name, value, "a name or a path")
    return given if isinstance(value, str) else Path(given)


def texts(name: str, value: Any) -> str | tuple[str, ...]:
    """What `calibration.load_text` takes: a name, a file's path, or the texts themselves."""
    if isinstance(value, (str, os.PathLike)):
        return str(place(name, value))
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not all(isinstance(each, str) for each in value):
        raise wrong(name, value, "the name of a text, a .txt, .jsonl or .json file, or a list of texts")
    if not any(each.strip() for each in value):
        raise wrong(name, value, "at least one text that is not empty")
    return tuple(value)
