"""Conversions of names and tensors for a model that has linears where checkpoints have a fused tensor.

transformers converts a checkpoint's tensors while it loads them, and back while it saves. Two things differ for a
model with packed weights. A fused tensor of experts must become the weights of their linears. And a packed weight keeps
its own name in files, so what joined or split it in loading must not be undone in saving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from fewbit.errors import FewbitError, FormatError
from fewbit.models import conversions, experts

Refuse = Callable[[FewbitError], None]


def splitting(model: PreTrainedModel, quantize: ConversionOps, refuse: Refuse) -> list[WeightConverter]:
    """A conversion for each fused tensor of experts that a checkpoint of `model` may have: into the experts' tensors.

    `quantize` packs those that are to be packed. `refuse` gets the error for a fused tensor of another shape.
    """
    found = []
    mapping = experts.unmerged(get_model_conversion_mapping(model))
    single = [
        m for m in mapping if isinstance(m, WeightConverter) and len(m.source_patterns) == len(m.target_patterns) == 1
    ]
    for path, module in model.named_modules():
        for tensor in module.shapes if isinstance(module, experts.SeparateExperts) else ():
            fused = f"{path}.{tensor}"
            # Of checkpoints with the parameter itself, and of those that have it in another form.
            found.append(_into_experts(model, fused, re.escape(fused), _SplitExperts(fused, refuse), quantize))
            for each in single:
                target = each.target_patterns[0].replace("\\.", ".")
                if fused.endswith(target):
                    source = re.escape(fused.removesuffix(target)) + each.source_patterns[0]
                    operation = _SplitExperts(fused, refuse, each)
                    found.insert(0, _into_experts(model, fused, source, operation, quantize))
    return found


def _into_experts(model: PreTrainedModel, fused: str, source: str, *operations: ConversionOps) -> WeightConverter:
    """A conversion from a tensor that `source` matches to the experts' tensors. It may lack the base model's prefix."""
    prefix = re.escape(f"{model.base_model_prefix}.")
    names = [name for name, _, _ in experts.split(model, fused)]
    return WeightConverter([rf"^(?:{prefix})?{source.removeprefix(prefix)}"], names, list(operations))


class _SplitExperts(ConversionOps):
    """Splits a fused tensor of experts into the weights or biases of their linears, after conversion by `before`."""

    def __init__(self, fused: str, refuse: Refuse, before: WeightConverter | None = None) -> None:
        self.fused, self.refuse, self.before = fused, refuse, before

    def __deepcopy__(self, memo: object) -> _SplitExperts:
        return self  # transformers copies a conversion for each tensor; `refuse` belongs to a whole model

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (given,) = input_dict.values()
        fused: Tensor = given[0] if isinstance(given, list) else given
        model = kwargs["model"]
        if self.before is not None:
            (fused,) = conversions.converted(model, self.before, self.fused, fused).values()
        path, _, tensor = self.fused.rpartition(".")
        wanted = model.get_submodule(path).shapes[tensor]
        if tuple(fused.shape) != wanted:
            self.refuse(FormatError(f"{self.fused} has shape {list(fused.shape)}, config.json requires {list(wanted)}"))
            return {}
        return {name: piece.of(fused, expert).contiguous() for name, expert, piece in experts.split(model, self.fused)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("packed experts stay separate in files")


def kept(rules: Iterable[Any], packed: Collection[str]) -> list[Any]:
    """`rules` without those that saving must not undo, as they made tensors of `packed` layers."""
    return [each for each in rules if not _makes(each, packed)]


def _makes(conversion: Any, packed: Collection[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    if any(isinstance(operation, _SplitExperts) for operation in conversion.operations):
        return True
    back = conversion.reverse_transform()
    return any(back.rename_source_key(f"{name}.weight")[1] is not None for name in packed)
