"""LoRA over packed weights of every scheme: y = QLinear(x) + scale · B A x, with PEFT's own layers, configs and files.

PEFT chooses its LoRA layer by the class of the linear that it finds. A `QLinear` is an `nn.Linear`, so that PEFT counts
it as one ("all-linear"), and gets the layer below, PEFT's own for linears but for what reads or writes the weight
itself: that holds codes. Importing this module registers the layer; `fewbit.hook` does so when PEFT is imported.
"""

from __future__ import annotations

import sys
from copy import copy
from functools import wraps
from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.utils import other
from torch import nn

from fewbit.errors import PlanError
from fewbit.nn.layers import QEmbedding, QLinear

_INITS = (True, False, "gaussian", "orthogonal", "eva")  # those that do not factor or change the weight


class QLoraLinear(Linear):
    """LoRA around a `QLinear`, which stays as it is."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = copy(config)
        config.fan_in_fan_out = False  # packed weights are [N, K], those of GPT-2's Conv1D too
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        known = super().lora_variants
        return {key: known[key] for key in ((), ("use_dora",))}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; PlanError if its config asks for the weight in another form than packed."""
        if config.init_lora_weights not in _INITS:
            raise PlanError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weights, and packed ones stay as they are",
                f"Use one of {', '.join(map(repr, _INITS))}.",
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PlanError: the sum of a packed weight and an adapter lies on no grid, and would have to be rounded again."""
        raise PlanError(
            "an adapter cannot be merged into packed weights without rounding them again",
            "Use fewbit merge OUT ADAPTER -o MERGED, or fewbit.merge: both merge in 16 bits, then quantize on request.",
        )


def register() -> None:
    """Let every `LoraConfig` send `QLinear` to the layer above, and PEFT prepare packed models for training."""
    config: Any = LoraConfig
    prepare = config.__post_init__

    @wraps(prepare)
    def with_ours(self: LoraConfig) -> None:
        prepare(self)
        self._register_custom_module({QLinear: QLoraLinear})

    config.__post_init__ = with_ours
    theirs: Any = other.prepare_model_for_kbit_training

    # PEFT knows models of few bits by a flag. transformers, accelerate and PEFT itself take the same flag for a reason
    # to import bitsandbytes, so that a model has it only here.
    @wraps(theirs)
    def prepared(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, (QLinear, QEmbedding)) for module in model.modules()):
            return theirs(model, *args, **kwargs)
        model.is_loaded_in_8bit = True
        try:
            return theirs(model, *args, **kwargs)
        finally:
            del model.is_loaded_in_8bit

    name = "prepare_model_for_kbit_training"
    for module in list(sys.modules.values()):  # PEFT's own packages hold it too, and whoever imported it before
        if getattr(module, "__dict__", {}).get(name) is theirs:
            setattr(module, name, prepared)


register()
