"""`AutoTokenizer.from_pretrained(..., gguf_file=...)` by fewbit's reader, for the architectures that it loads.

Patched is that one method, by `fewbit.hook` when transformers' module of it is imported.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers.models.auto import tokenization_auto

from fewbit.models.plugin_config import gguf_file


def register() -> None:
    """Put fewbit before the method."""
    cls: Any = tokenization_auto.AutoTokenizer
    theirs = cls.from_pretrained
    if hasattr(theirs, "by_fewbit"):
        return
    inner = getattr(theirs, "__func__", None)

    @wraps(theirs)
    def ours(kind: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name = pretrained_model_name_or_path  # callers may name this argument
        if (file := kwargs.get("gguf_file")) and (found := gguf_file(name, file, kwargs)) is not None:
            from fewbit.models.gguf_tokenizer import to_tokenizer

            return to_tokenizer(found)
        return inner(kind, name, *args, **kwargs) if inner is not None else theirs(name, *args, **kwargs)

    ours.by_fewbit = True  # type: ignore[attr-defined]
    cls.from_pretrained = classmethod(ours)


register()
