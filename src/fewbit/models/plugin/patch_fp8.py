"""Refuse FP8 checkpoints whose weights transformers would load wrong.

transformers 5.24 ignores scales unless they are called `weight_scale_inv`, `scale` or `qscale_weight`. On a CPU and on
older GPUs it dequantizes, and takes the size of a block as the rows of the weight divided by the rows of the scales.
That is wrong if the last blocks are smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from fewbit.errors import FormatError
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.formats.layouts.fp8 import FP8
from fewbit.models.source import read_config

_KNOWN = ("_scale_inv", ".scale", ".qscale_weight")  # endings of names of scales
INSTEAD = "Load it by fewbit.load, which decodes it right, or quantize it by fewbit.quantize."


class CheckedFP8Quantizer(FineGrainedFP8HfQuantizer):
    """transformers' own, which first raises FormatError for weights that it would load wrong."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        files = [Path(file) for file in checkpoint_files or () if file.endswith(".safetensors")]
        if self.pre_quantized and files:
            check(files, dequantized=bool(self.quantization_config.dequantize))
        theirs: Any = super()._process_model_before_weight_loading
        return theirs(model, checkpoint_files=checkpoint_files, **kwargs)


def check(files: list[Path], *, dequantized: bool) -> None:
    """FormatError if transformers would load one of the FP8 weights in `files` wrong."""
    config = read_config(files[0].parent).get("quantization_config")
    config = config if isinstance(config, dict) else {}
    checkpoint = Checkpoint(files)
    try:
        found = FP8().find(config, checkpoint.specs, checkpoint.get)
    except FormatError:  # of a kind that only transformers knows
        return
    for name, packed in found.items():
        scale, reason = packed.parts["scale"], ""
        if not scale.endswith(_KNOWN):
            reason = f"it ignores the scales {scale}"
        elif dequantized and "block" in packed.kind and _is_ragged(packed.shape[-2:], config["weight_block_size"]):
            reason = f"{config['weight_block_size']}, the block of {scale}, does not divide {list(packed.shape)}"
        if reason:
            raise FormatError(f"{files[0].parent}: transformers would load {name} wrong: {reason}", INSTEAD)


def _is_ragged(shape: Sequence[int], block: Sequence[int]) -> bool:
    """Whether the last of several blocks is smaller than the others."""
    return any(size > own and size % own for size, own in zip(shape, block, strict=True))


def register() -> None:
    """Replace transformers' quantizer for FP8, unless another one is registered."""
    mapping: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    if mapping.get("fp8") is FineGrainedFP8HfQuantizer:
        mapping["fp8"] = CheckedFP8Quantizer
