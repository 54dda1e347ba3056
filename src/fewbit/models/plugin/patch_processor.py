"""Lets `AutoProcessor.from_pretrained` make the processor of a folder with a GGUF model and its vision tower.

transformers has none for GGUF files, and would give the tokenizer alone. `fewbit.hook` applies this patch when the
module of AutoProcessor is imported.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from transformers.models.auto import processing_auto

from fewbit.models.plugin.patch_gguf_config import named


def register() -> None:
    """Wrap the method. The tokenizer is that of a model alone: one that `gguf_file` names, or without a tower."""
    cls: Any = processing_auto.AutoProcessor
    theirs = cls.from_pretrained
    if hasattr(theirs, "by_fewbit"):
        return
    inner = theirs.__func__

    @wraps(inner)
    def ours(kind: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        name = pretrained_model_name_or_path  # the parameter keeps transformers' name: callers may pass it by keyword
        if not kwargs.get("gguf_file") and named(name, kwargs) is not None:
            from fewbit.models import images, source

            found = source.with_tower(source.locate(Path(str(name)) / (kwargs.get("subfolder") or "")), None)
            if found.mmproj is not None:
                return images.load_processor(found)
        return inner(kind, name, **kwargs)

    ours.by_fewbit = True  # type: ignore[attr-defined]
    patched: Any = ours
    cls.from_pretrained = classmethod(patched)


register()
