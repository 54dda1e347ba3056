"""LoRA over packed weights of every scheme: y = QLinear(x) + scale · B A x, with PEFT's own layers, configs and files.

PEFT chooses its LoRA layer by the class of the linear. A `QLinear` is an `nn.Linear`, so PEFT includes it in
"all-linear" and wraps it in `QLoraLinear`. That class is PEFT's own layer for linears, except where PEFT would read or
write the weight, which holds packed codes. Importing this module registers the layer; `fewbit.hook` imports it with
PEFT.
"""

from __future__ import annotations

import sys
from copy import copy
from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.utils import other
from torch import nn

from fewbit.errors import PlanError
from fewbit.models.patching import replace
from fewbit.nn.layers import QEmbedding, QLinear

INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")  # initializations that leave the weight unchanged


class QLoraLinear(Linear):
    """LoRA around a `QLinear`, whose packed weight stays unchanged."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = copy(config)
        config.fan_in_fan_out = False  # packed weights are always [N, K], also where GPT-2's Conv1D has [K, N]
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. PlanError if its initialization would change the packed weight."""
        if config.init_lora_weights not in INITS:
            raise PlanError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weights, but packed weights cannot change",
                f"Use one of {', '.join(map(repr, INITS))}.",
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always PlanError: the sum of packed weight and adapter is off the quantization grid and needs rounding."""
        raise PlanError(
            "an adapter cannot be merged into packed weights without rounding them again",
            "Use fewbit merge OUT ADAPTER -o MERGED, or fewbit.merge: both merge in 16 bits, then quantize on request.",
        )


def _with_ours(theirs: Any, self: LoraConfig) -> None:
    theirs(self)
    self._register_custom_module({QLinear: QLoraLinear})


def _prepare(theirs: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    if not any(isinstance(module, (QLinear, QEmbedding)) for module in model.modules()):
        return theirs(model, *args, **kwargs)
    # PEFT recognizes quantized models by a flag. transformers, accelerate and PEFT import bitsandbytes when they see
    # that flag, so it is set only during this call.
    model.is_loaded_in_8bit = True
    try:
        return theirs(model, *args, **kwargs)
    finally:
        del model.is_loaded_in_8bit


def register() -> None:
    """Make every `LoraConfig` wrap `QLinear` in `QLoraLinear`, and let PEFT prepare packed models for training."""
    replace(LoraConfig, "__post_init__", _with_ours)
    name, theirs = "prepare_model_for_kbit_training", other.prepare_model_for_kbit_training
    for module in list(sys.modules.values()):  # modules of PEFT and others may have imported the function already
        if getattr(module, "__dict__", {}).get(name) is theirs:
            replace(module, name, _prepare)


register()
