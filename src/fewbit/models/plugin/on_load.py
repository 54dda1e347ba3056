"""Quantizes the weights of an unquantized model while transformers reads them."""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import ConversionOps

from fewbit.errors import FewbitError
from fewbit.nn.layers import QLinear
from fewbit.system import heap


class QuantizeOnLoad(ConversionOps):
    """Quantizes a 16-bit weight when transformers' loader has put it on its device."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: object) -> QuantizeOnLoad:
        return self  # transformers copies conversions; all copies report to one quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        done = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path, _, leaf = name.rpartition(".")
            module = kwargs["model"].get_submodule(path)
            if leaf == "weight" and isinstance(module, QLinear) and module.placeholders:
                try:
                    if self.quantizer.failure is None:
                        with heap.trimmed():
                            self.quantizer.quantize(module, weight)
                except FewbitError as error:
                    self.quantizer._fail(error)
                weight = module.weight
            done[name] = weight
        return done
