"""Makes transformers' `save_pretrained` and `push_to_hub` write the record and the card of a model with packed weights.

`fewbit.api.saved` makes them. A model without packed weights, and an adapter, are saved as before.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fewbit import hook
from fewbit.nn.fused import packed_linears


def _origin(model: Any) -> Path | None:
    """The folder or the GGUF file that the packed weights of a model came from; None for another model."""
    if getattr(model, "_hf_peft_config_loaded", False) or not packed_linears(model):
        return None
    found: Path | None = getattr(getattr(model, "hf_quantizer", None), "origin", None)
    return found


def _describing(theirs: Any) -> Any:
    """Wrap transformers' `save_pretrained` (`theirs`). An upload is described by `_naming`."""

    @wraps(theirs)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        writes = args[0] if args else kwargs.get("is_main_process", True)
        origin = _origin(self) if writes and not kwargs.get("push_to_hub") else None
        if origin is None:
            return theirs(self, save_directory, *args, **kwargs)
        with hook.saved().described(self, Path(save_directory), origin):
            return theirs(self, save_directory, *args, **kwargs)

    save_pretrained.by_fewbit = True  # type: ignore[attr-defined]
    return save_pretrained


def _naming(theirs: Any) -> Any:
    """Wrap `_upload_modified_files` (`theirs`): the card names the repository."""

    @wraps(theirs)
    def upload(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PreTrainedModel) and (origin := _origin(self)) is not None:
            hook.saved().describe_upload(self, Path(working_dir), origin, repo_id, kwargs.get("token"))
        return theirs(self, working_dir, repo_id, *args, **kwargs)

    upload.by_fewbit = True  # type: ignore[attr-defined]
    return upload


def register() -> None:
    """Patch `PreTrainedModel`, once."""
    model: Any = PreTrainedModel
    if not hasattr(model._upload_modified_files, "by_fewbit"):
        model.save_pretrained = _describing(model.save_pretrained)
        model._upload_modified_files = _naming(model._upload_modified_files)
