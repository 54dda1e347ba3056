"""Makes transformers' `save_pretrained` and `push_to_hub` write the record and the card of a model with packed weights.

`fewbit.api.saved` makes them. A model without packed weights, and an adapter, are saved as before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fewbit import hook
from fewbit.models.patching import replace
from fewbit.nn.fused import packed_linears


def _origin(model: Any) -> Path | None:
    """The folder or the GGUF file that the packed weights of a model came from; None for another model."""
    if getattr(model, "_hf_peft_config_loaded", False) or not packed_linears(model):
        return None
    found: Path | None = getattr(getattr(model, "hf_quantizer", None), "origin", None)
    return found


def _save_pretrained(theirs: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Describe what is written. An upload is described by `_upload`."""
    writes = args[0] if args else kwargs.get("is_main_process", True)
    origin = _origin(self) if writes and not kwargs.get("push_to_hub") else None
    if origin is None:
        return theirs(self, save_directory, *args, **kwargs)
    with hook.saved().described(self, Path(save_directory), origin):
        return theirs(self, save_directory, *args, **kwargs)


def _upload(theirs: Any, self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Name the repository in the card."""
    if isinstance(self, PreTrainedModel) and (origin := _origin(self)) is not None:
        hook.saved().describe_upload(self, Path(working_dir), origin, repo_id, kwargs.get("token"))
    return theirs(self, working_dir, repo_id, *args, **kwargs)


def register() -> None:
    """Replace both methods."""
    replace(PreTrainedModel, "save_pretrained", _save_pretrained)
    replace(PreTrainedModel, "_upload_modified_files", _upload)
