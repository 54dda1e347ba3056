"""Argument checks. Each takes an argument's name and value, returns the value normalized, or raises ArgumentError."""

from __future__ import annotations

import ctypes
import importlib.util
import operator
import os
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from fewbit import names, units
from fewbit.errors import ArgumentError, PlanError

if TYPE_CHECKING:
    import torch

Texts: TypeAlias = str | os.PathLike[str] | Sequence[str]
Device: TypeAlias = "str | int | torch.device | None"
DType: TypeAlias = "str | torch.dtype | None"


MAX_COUNT = 2**31 - 1  # upper limit of every count


MAX_SEED = 2**32 - 1  # transformers also seeds NumPy, whose seeds end here


def invalid(name: str, value: object, expected: str) -> ArgumentError:
    """The error for an invalid argument value. `expected` describes the valid values."""
    return ArgumentError(name, _brief.repr(value), expected)


_brief = reprlib.Repr()


_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def integer(low: int, high: int = MAX_COUNT) -> Callable[[str, Any], int]:
    """A check for integers from `low` to `high`, of any library (NumPy, torch). It rejects booleans."""

    def check(name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool) or not low <= number <= high:
            raise invalid(name, value, f"an integer from {low} to {high}")
        return number

    return check


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite number, of any library, that a float can hold. A boolean is not a number."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and isfinite(float(value))
    except OverflowError:
        return False


def number(name: str, value: Any) -> float:
    """A finite number. Each verb checks the range itself."""
    if not is_finite(value):
        raise invalid(name, value, "a finite number")
    return float(value)


def above_0(name: str, value: Any) -> float:
    """A finite number above 0."""
    if not is_finite(value) or not value > 0:
        raise invalid(name, value, "a number above 0")
    return float(value)


def size(name: str, value: Any) -> int:
    """A number of bytes, given as a number or as text such as 8GB."""
    found = units.nbytes(value) if isinstance(value, str) else None
    if found is None and (isinstance(value, str) or not is_finite(value) or not value >= 1):
        raise invalid(name, value, "a size such as 8GB, 8GiB or 512MB")
    return found if found is not None else int(value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid(name, value, "True or False")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(name, value, "a string")
    return value


def path(name: str, value: Any) -> str | Path:
    """A name or a path, with the home folder for ~. A string stays a string; a path-like object becomes a Path."""
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str) or not given or "\0" in given:
        raise invalid(name, value, "a name or a path")
    given = names.expanded(given)
    return given if isinstance(value, str) else Path(given)


def file(name: str, value: Any) -> str | Path:
    """The path of a file. A folder is refused; whether there is such a file is checked later."""
    given = path(name, value)
    if os.path.isdir(given):
        raise invalid(name, str(given), "a file, and this is a folder")
    return given


CACHE_TYPES = {"float32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Types of a KV cache, and the bytes of a value in each."""


def cache_type(name: str, value: Any) -> str:
    found = text(name, value).lower()
    if found not in CACHE_TYPES:
        raise invalid(name, value, "a type of a KV cache: " + ", ".join(CACHE_TYPES))
    return found


_DTYPES = ("float16", "bfloat16", "float32", "float64")
_SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def device(name: str, value: Any) -> str | None:
    """A device by its name in lower case: cpu for cpu:0, cuda:1 for 1. Whether the machine has it is checked later."""
    if value is None:
        return None
    given = str(value).lower()
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        import torch

        if not isinstance(value, torch.device):
            raise invalid(name, value, 'a device such as "cpu", "cuda:1" or torch.device("cuda", 1)')
    if given.isdecimal():
        return f"cuda:{given}"
    return "cpu" if given == "cpu:0" else given


def gpu(name: str, value: str | None) -> None:
    """PlanError for a device other than the CPU on a machine without a GPU. Which GPUs there are is checked later."""
    if value not in (None, "auto", "cpu") and without_gpu():
        raise PlanError(f"`{name}={value}` is not available", "Available: cpu.")


@cache
def without_gpu() -> bool:
    """Whether PyTorch surely sees no GPU: it is built for the CPU, or it is built for CUDA and there is no driver.

    This must not import PyTorch, which takes seconds: its file version.py says what it is built for.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    built = dict(re.findall(r"^(cuda|hip)\b.*= *(.+)", text, re.MULTILINE))
    if "cuda" not in built or built.get("hip", "None") != "None":
        return False
    if built["cuda"] == "None":
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return not Path("/proc/driver/nvidia").exists()  # some systems have the library where only PyTorch looks
    return False


def dtype(name: str, value: Any) -> torch.dtype | str:
    """A floating-point torch dtype, or "auto"."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return "auto"
    bare = str(value).removeprefix("torch.")
    found = _SHORT.get(bare, bare)
    if found in _DTYPES:  # else a refusal need not wait for PyTorch
        import torch

        if isinstance(value, (str, torch.dtype)):
            return getattr(torch, found)  # type: ignore[no-any-return]
    raise invalid(name, value, f'"auto", or one of {", ".join(_DTYPES)}, as a name or of torch')
