"""Conversions of names and tensors for a model that has linears where checkpoints have a fused tensor.

transformers converts a checkpoint's tensors while it loads them, and back while it saves. Two things differ for a
model with packed weights. A fused tensor of experts must become the weights of their linears. And a packed weight keeps
its own name in files, so what joined or split it in loading must not be undone in saving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from fewbit.errors import FewbitError, FormatError
from fewbit.models import conversions, experts
from fewbit.models.plugin.modules import put, without_place
from fewbit.nn.layers import slot
from fewbit.schemes.base import PartSpec

Refuse = Callable[[FewbitError], None]
Fused = Mapping[str, Mapping[str, PartSpec]]  # fused parameter -> ending -> header of a packed tensor that holds it
Describe = Callable[[str, Mapping[str, PartSpec]], tuple[int, ...]]


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


def put_fused(model: PreTrainedModel, fused: Fused, describe: Describe) -> dict[str, str]:
    """Replace the linears of experts whose weights lie in packed tensors. Returns linear -> its fused parameter.

    describe: gives the shape of the weights that such tensors hold, [experts, rows, columns]. FormatError if the model
    has no such parameter, or one of another shape.
    """
    found, modules = dict[str, str](), dict(model.named_modules())
    for parameter, tensors in fused.items():
        path, _, leaf = parameter.rpartition(".")
        module: Any = modules.get(path)
        if not isinstance(module, experts.SeparateExperts) or leaf not in module.shapes:
            said = f"the checkpoint has quantized tensors for {parameter}, which the model does not have"
            raise without_place(model, parameter, said)
        pieces, stored = list(experts.split(model, parameter)), describe(parameter, tensors)
        wanted = module.shapes[leaf]
        if pieces[0][2].transposed:
            wanted = (wanted[0], wanted[2], wanted[1])
        if stored != wanted:
            names = " and ".join(f"{parameter}{ending}" for ending in tensors)
            raise FormatError(f"{names} hold weights of shape {list(stored)}, config.json requires {list(wanted)}")
        rows = wanted[1]
        for name, _, piece in pieces:
            own = len(range(rows)[piece.rows])
            specs = {end: PartSpec((own, *spec.shape[2:]), spec.dtype) for end, spec in tensors.items()}
            linear = name.removesuffix(".weight")
            put(model, linear, specs, has_bias=False)  # it keeps the bias that it has
            found[linear] = parameter
    return found


def splitting_packed(model: PreTrainedModel, fused: Fused, refuse: Refuse) -> list[WeightConverter]:
    """A conversion for each packed tensor of `fused`, into the experts' tensors."""
    found = []
    for parameter, tensors in fused.items():
        pieces = list(experts.split(model, parameter))
        for ending in tensors:
            names = [f"{name.removesuffix('weight')}{slot(ending)}" for name, _, _ in pieces]
            source = _of_checkpoint(model, re.escape(f"{parameter}{ending}"))
            found.append(WeightConverter([source], names, [_SplitPacked(parameter, refuse, ending)]))
    return found


def joined(model: PreTrainedModel, state: dict[str, Tensor], fused: Fused) -> dict[str, Tensor]:
    """The tensors of `state`, with those of experts in the fused tensors that the checkpoint had."""
    for path, module in model.named_modules():
        for leaf, shape in module.shapes.items() if isinstance(module, experts.SeparateExperts) else ():
            parameter = f"{path}.{leaf}"
            for ending in fused.get(parameter, ("",)):
                whole: Tensor | None = None
                for name, expert, piece in experts.split(model, parameter):
                    own = state.pop(f"{name.removesuffix('weight')}{ending}" if ending else name)
                    stored = fused[parameter][ending].shape if ending else shape
                    whole = own.new_zeros(stored) if whole is None else whole
                    (replace(piece, transposed=False) if ending else piece).of(whole, expert).copy_(own)
                assert whole is not None
                state[f"{parameter}{ending}"] = whole
    return state


def _into_experts(model: PreTrainedModel, fused: str, source: str, *operations: ConversionOps) -> WeightConverter:
    """A conversion from a tensor that `source` matches to the experts' tensors. It may lack the base model's prefix."""
    names = [name for name, _, _ in experts.split(model, fused)]
    return WeightConverter([_of_checkpoint(model, source)], names, list(operations))


def _of_checkpoint(model: PreTrainedModel, source: str) -> str:
    """The pattern `source` of a name in the model, with or without the base model's prefix."""
    prefix = re.escape(f"{model.base_model_prefix}.")
    return rf"^(?:{prefix})?{source.removeprefix(prefix)}$"


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


class _SplitPacked(_SplitExperts):
    """Splits the packed tensor of a fused parameter into those of the experts' linears. The rows come first in it."""

    def __init__(self, fused: str, refuse: Refuse, ending: str) -> None:
        super().__init__(fused, refuse)
        self.ending = ending

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (given,) = input_dict.values()
        packed: Tensor = given[0] if isinstance(given, list) else given
        return {
            f"{name.removesuffix('weight')}{slot(self.ending)}": replace(piece, transposed=False)
            .of(packed, expert)
            .contiguous()
            for name, expert, piece in experts.split(kwargs["model"], self.fused)
        }


def kept(rules: Iterable[Any], packed: Collection[str]) -> list[Any]:
    """`rules` without those that saving must not undo: they would give the tensors of a `packed` layer other prefixes.

    Some made tensors of these layers by joining or splitting others. Some rename a weight or bias, but no scales.
    """
    some = {experts.of_any(name): name for name in packed}.values()  # one expert of each layer
    found = [each for each in rules if not _makes(each, some)]
    names = {name: dict.fromkeys(_ENDINGS, name) for name in some}  # layer -> ending -> prefix in the file
    partial = []
    for each in reversed(found):  # in this order they are undone
        if isinstance(each, WeightConverter):
            continue
        back = each.reverse_transform()
        renamed = {
            name: {end: back.rename_source_key(f"{own}.{end}")[0].removesuffix(f".{end}") for end, own in ends.items()}
            for name, ends in names.items()
        }
        if any(len(set(ends.values())) > 1 for ends in renamed.values()):
            partial.append(each)
        else:
            names = renamed
    return [each for each in found if each not in partial]


_ENDINGS = ("weight", "bias", "scale")


def _makes(conversion: Any, packed: Iterable[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    if any(isinstance(operation, _SplitExperts) for operation in conversion.operations):
        return True
    back = conversion.reverse_transform()
    return any(back.rename_source_key(f"{name}.weight")[1] is not None for name in packed)
