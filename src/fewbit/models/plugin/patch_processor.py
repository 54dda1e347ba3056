"""Lets `AutoProcessor` make the processor of a folder with a GGUF model and its vision tower.

`AutoProcessor` would give the tokenizer alone. `fewbit.hook` applies this patch when its module is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.models.auto import processing_auto

from fewbit.errors import PlanError
from fewbit.models.patching import replace
from fewbit.models.plugin.patch_gguf_config import LOCATING, named

if TYPE_CHECKING:
    from fewbit.models.source import Source

# Arguments without a meaning here, as the processor is made of the two files, with pillow. Pipelines give some
_IDLE = {*LOCATING, "trust_remote_code", "use_fast", "backend", "config", "code_revision", "dtype"}


def with_tower(name: Any, options: Any) -> Source | None:
    """The model of a folder with a GGUF model and a vision tower; None for others, and if `gguf_file` names a file."""
    if options.get("gguf_file") or named(name, options) is None:
        return None
    from fewbit.models import source

    found = source.with_tower(source.locate(Path(str(name)) / (options.get("subfolder") or "")), None)
    return found if found.mmproj is not None else None


def _from_pretrained(theirs: Any, kind: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
    name = pretrained_model_name_or_path  # the parameter keeps transformers' name: callers may pass it by keyword
    if (found := with_tower(name, kwargs)) is None:
        return theirs(kind, name, **kwargs)
    if others := [key for key in sorted(kwargs.keys() - _IDLE) if not key.startswith("_")]:
        raise PlanError(
            f"AutoProcessor makes the processor of {name} from GGUF files, without {', '.join(others)}",
            "Set it on the processor, such as processor.tokenizer.padding_side = 'left', or put "
            "preprocessor_config.json beside the tower's file.",
        )
    from fewbit.models import images

    return images.load_processor(found)


def register() -> None:
    """Replace the method. The tokenizer is that of a model alone: one that `gguf_file` names, or without a tower."""
    replace(processing_auto.AutoProcessor, "from_pretrained", _from_pretrained)


register()
