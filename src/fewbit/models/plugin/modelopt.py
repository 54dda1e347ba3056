"""A config class for ModelOpt's files. transformers has none, and would load their codes as weights."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

_METHOD = "modelopt"


class ModelOptConfig(QuantizationConfigMixin):
    """The quantization_config of a file, with every key."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)
        self.quant_method: Any = _METHOD  # transformers' enumeration of methods does not have it


def register() -> None:
    """Let transformers read the config of a file by this class, unless another one is registered."""
    mapping: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    mapping.setdefault(_METHOD, ModelOptConfig)
