"""Replaces methods of transformers and PEFT, each once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any


def replace(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Let `owner.name` call `ours(theirs, ...)`, where `theirs` is the function that was there. Once for each `ours`.

    A class method, a static method or a property stays what it is. `theirs` of a class method takes the class first.
    """
    found: Any = inspect.getattr_static(owner, name)
    theirs = getattr(found, "fget", None) or getattr(found, "__func__", found)
    done, key = getattr(theirs, "by_fewbit", ()), f"{ours.__module__}.{ours.__qualname__}"
    if key in done:
        return

    @wraps(theirs)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ours(theirs, *args, **kwargs)

    vars(replacement)["by_fewbit"] = (*done, key)
    setattr(owner, name, replacement if theirs is found else type(found)(replacement))
