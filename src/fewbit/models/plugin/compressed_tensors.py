"""A config class for compressed-tensors that works without the package of that name, and keeps every key of a file."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.utils import quantization_config as theirs
from transformers.utils.quantization_config import QuantizationMethod

_LOADING = ("dequantize", "use_optimized_inference")


class CompressedTensorsConfig(theirs.CompressedTensorsConfig):
    """The quantization_config of a file. transformers' own class of this name needs the package to parse it.

    transformers compares the names of classes where a user passes a config too, so this class has the same name.
    """

    def __init__(self, **settings: Any) -> None:
        self.dequantize = bool(settings.pop("dequantize", False)) or settings.pop("run_compressed", None) is False
        self.use_optimized_inference = False
        self.quantization_config = None
        vars(self).update(settings)
        self.quant_method = QuantizationMethod.COMPRESSED_TENSORS

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k not in (*_LOADING, "quantization_config")}
        return {**own, "quant_method": QuantizationMethod.COMPRESSED_TENSORS.value}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @property
    def is_quantized(self) -> bool:
        return True

    @property
    def is_quantization_compressed(self) -> bool:
        return True

    @property
    def has_fp8_modules(self) -> bool:
        return False


def register() -> None:
    """Let transformers read the config of a file by this class."""
    mapping: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    mapping["compressed-tensors"] = CompressedTensorsConfig
