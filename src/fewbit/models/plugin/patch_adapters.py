"""Makes transformers' own `load_adapter` and `save_pretrained` handle the scales of AWQ.

They rescale an adapter when it is loaded, and record the scales when it is saved. `models/adapters/refit.py` does the
same for PEFT's `PeftModel`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fewbit.models import scales
from fewbit.models.patching import replace
from fewbit.models.source import name_of


def _load_adapter(
    theirs: Any, self: Any, peft_model_id: Any = None, adapter_name: str | None = None, **kwargs: Any
) -> Any:
    """After loading, rescale the adapter to the model's scales."""
    result = theirs(self, peft_model_id, adapter_name, **kwargs)
    if peft_model_id is not None:
        from fewbit.models.adapters.refit import fit  # PEFT is an extra

        name, folder = adapter_name or "default", Path(peft_model_id).absolute()
        fit(self, name, self.peft_config[name], folder if folder.is_dir() else None)
    return result


def _save_pretrained(theirs: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """After saving an adapter, record the model's scales beside it."""
    adapted = getattr(self, "_hf_peft_config_loaded", False)
    for config in self.peft_config.values() if adapted else ():
        if config.base_model_name_or_path == self.name_or_path:
            config.base_model_name_or_path = name_of(self) or None
    result = theirs(self, save_directory, *args, **kwargs)
    folder = Path(save_directory)
    if adapted and folder.is_dir() and (known := scales.of_model(self)):
        scales.write_record(folder, known, name_of(self))
    return result


def register() -> None:
    """Replace both methods."""
    replace(PreTrainedModel, "load_adapter", _load_adapter)
    replace(PreTrainedModel, "save_pretrained", _save_pretrained)
