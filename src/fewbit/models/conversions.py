"""How transformers renames, merges and splits a checkpoint's tensors while it loads a model.

If it splits a tensor into several parameters, such as fused q, k and v, each part becomes a view of the tensor under
the parameter's name. So it can be quantized by itself, and an output has it under that name, which transformers loads
without splitting.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fewbit.errors import FormatError, PlanError
from fewbit.models import experts
from fewbit.schemes.base import PartSpec

Conversions = Sequence[WeightRenaming | WeightConverter]
# Name endings of tensors that only older checkpoints have: models now compute these values.
_COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "attention.bias", "attention.masked_bias")


def placed(
    model: PreTrainedModel, keys: Iterable[str], expected: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Two maps, checkpoint name -> model name: of the tensors that `expected` contains, and of all others.

    Tensors of older checkpoints that models now compute are in neither.
    """
    mapping, prefix = mapping_of(model), model.base_model_prefix
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    found, without, computed = dict[str, str](), dict[str, str](), {name for name, _ in model.named_buffers()}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:  # transformers does not rename such a key either
            name, _ = rename_source_key(key, [], [], prefix, expected)
        if name in expected:
            found[key] = name
        elif not {name, f"{prefix}.{name}"} & computed and not name.endswith(_COMPUTED):
            without[key] = name
    return found, without


def owned(name: str, prefix: str, modules: Container[str]) -> bool:
    """Whether the tensor `name` belongs to one of `modules`. Their names may start with the base model's `prefix`."""
    return owner(name) in modules or f"{prefix}.{owner(name)}" in modules


def owner(name: str) -> str:
    """The module that the tensor `name` belongs to."""
    module, inside, _ = name.partition(".weight.")  # parts of a packed weight may be named `weight.PART`
    return module if inside else name.rpartition(".")[0]


def mapping_of(model: PreTrainedModel) -> list[WeightRenaming | WeightConverter]:
    """How transformers renames and merges a checkpoint's tensors for this model."""
    known = [m for m in get_model_conversion_mapping(model) if isinstance(m, (WeightRenaming, WeightConverter))]
    return experts.unmerged(known) if experts.are_separate(model) else known


def converter_of(mapping: Conversions, key: str) -> WeightConverter | None:
    """The entry of transformers' conversion mapping that computes a parameter from the checkpoint's tensor `key`."""
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    if not converters:
        return None
    _, pattern = rename_source_key(key, [m for m in mapping if isinstance(m, WeightRenaming)], converters)
    return next((m for m in converters if pattern in m.source_patterns), None)


def parts_of(
    model: PreTrainedModel, mapping: Conversions, key: str, first: str, spec: PartSpec
) -> Iterator[tuple[str, Callable[[Any], Tensor]]]:
    """Name and view of each parameter that the checkpoint's tensor `key` is split into; nothing if it is not split.

    `first` is the model's name for `key`. A view takes a lazy handle of the tensor, as `Checkpoint.add_view` does.
    """
    converter = converter_of(mapping, key)
    if converter is None or len(converter.target_patterns) < 2 or len(converter.source_patterns) > 1:
        return
    split = partial(converted, model, converter, first)
    try:
        names = list(split(torch.empty(spec.shape, dtype=spec.dtype, device="meta")))
    except Exception as error:  # transformers' operations raise anything on a wrong shape
        raise FormatError(f"{key} of shape {list(spec.shape)} cannot be split: {error}") from None
    for name in names:
        yield name, partial(_part, split, name)


def _part(split: Callable[[Tensor], dict[str, Tensor]], name: str, handle: Any) -> Tensor:
    return split(handle[...])[name]


def after_conversion(
    model: PreTrainedModel, mapping: Conversions, key: str, name: str, view: Callable[[Any], Tensor]
) -> Callable[[Any], Tensor]:
    """`view`, a part of the parameter `name`, as a part of the checkpoint's tensor `key`, which may be converted first.

    Views take a lazy handle of the tensor, as `Checkpoint.add_view` does.
    """
    converter = converter_of(mapping, key)
    if converter is None:
        return view
    if len(converter.source_patterns) > 1 or len(converter.target_patterns) > 1:
        raise PlanError(
            f"transformers makes {name} of {' and '.join(converter.source_patterns)} while loading, which fewbit does "
            "not support yet"
        )
    return partial(_part_after, partial(converted, model, converter, name), view)


def _part_after(convert: Callable[[Tensor], dict[str, Tensor]], view: Callable[[Any], Tensor], handle: Any) -> Tensor:
    (tensor,) = convert(handle[...]).values()
    return view(tensor)


def converted(model: PreTrainedModel, converter: WeightConverter, first: str, tensor: Tensor) -> dict[str, Tensor]:
    """What transformers makes of a checkpoint's tensor, by the names of parameters. `first`: the first of them."""
    return _of_all(model, converter, first, {converter.source_patterns[0]: tensor})


def merged(model: PreTrainedModel, keys: Iterable[str], name: str, slice: Callable[[str], Any]) -> Merged:
    """The parameter `name`, of the tensors `keys` of a checkpoint. slice: gives a lazy handle of one of these."""
    return Merged(model, mapping_of(model), name, {key: slice(key) for key in keys})


@dataclass(frozen=True)
class Merged:
    """A lazy handle of the parameter `name`, which transformers makes of several tensors of a checkpoint.

    handles: lazy handles of these tensors, by their names.
    """

    model: PreTrainedModel
    mapping: Conversions
    name: str
    handles: Mapping[str, Any]

    def __getitem__(self, index: Any) -> Tensor:
        converter = converter_of(self.mapping, next(iter(self.handles)))
        if converter is None:
            raise PlanError(f"{self.name} is {' and '.join(self.handles)} in the checkpoint")
        renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        tensors = {}
        for key, handle in self.handles.items():
            _, pattern = rename_source_key(key, renamings, [converter])
            tensors[str(pattern)] = handle[...]
        (whole,) = _of_all(self.model, converter, self.name, tensors).values()
        return whole[index]

    def get_shape(self) -> list[int]:
        return list(self.model.get_parameter(self.name).shape)


def _of_all(
    model: PreTrainedModel, converter: WeightConverter, first: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What transformers makes of tensors of a checkpoint, by the names of parameters.

    first: the first of these names. tensors: by the patterns of the converter that their names match.
    """
    own: Any = deepcopy(converter)
    for pattern, tensor in tensors.items():
        own.add_tensor(first, first, pattern, partial(_itself, tensor))
    found = own.convert(first, model=_WithFused(model), config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _WithFused:
    """A model for transformers' conversions, which read the shapes of parameters. Fused experts have theirs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_parameter(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        shapes = getattr(self.model.get_submodule(path), "shapes", {})
        if leaf not in shapes:
            return self.model.get_parameter(name)
        return torch.empty(shapes[leaf], dtype=torch.float32, device="meta")
