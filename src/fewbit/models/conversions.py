"""How transformers renames, merges and splits a checkpoint's tensors while it loads a model.

If it splits a tensor into several parameters, such as fused q, k and v, each part becomes a view of the tensor under
the parameter's name. So it can be quantized by itself, and an output has it under that name, which transformers loads
without splitting.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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


def several_of_several(model: PreTrainedModel) -> str:
    """The tensors of a checkpoint of which transformers makes more than one parameter; "" if there are none."""
    several = [m for m in get_model_conversion_mapping(model) if len(m.target_patterns) > 1]
    many = [m for m in several if len(m.source_patterns) > 1 or not experts.unmerged([m])]
    return ", ".join(many[0].source_patterns) if many else ""


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


class Misfit(NamedTuple):
    """Why transformers cannot make a parameter of tensors of a checkpoint, and the names of those that are missing."""

    why: str
    lacking: list[str]


def misfits(
    model: PreTrainedModel, mapping: Conversions, made: Mapping[str, str], specs: Mapping[str, PartSpec]
) -> list[Misfit]:
    """What is wrong with the tensors of a checkpoint that transformers converts while loading.

    made: name of such a tensor -> the parameter that it becomes, or is a part of. specs: of the tensors by their names.
    """
    sources: dict[str, dict[str, PartSpec]] = {}
    for key, name in made.items():
        sources.setdefault(name, {})[key] = specs[key]
    found = (_misfit(model, mapping, name, own) for name, own in sources.items())
    return [each for each in found if each is not None]


def _misfit(model: PreTrainedModel, mapping: Conversions, name: str, specs: Mapping[str, PartSpec]) -> Misfit | None:
    """What is wrong with the tensors of the parameter `name`; None if they fit."""
    converter = converter_of(mapping, next(iter(specs)))
    if converter is None:
        return None
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    names = {
        key: rename_source_key(key, renamings, [converter], model.base_model_prefix, {name: None}) for key in specs
    }
    found = {str(pattern): key for key, (renamed, pattern) in names.items() if renamed == name and pattern}
    if len(found) < len(specs):
        return None  # some are loaded as they are, or are experts: several of these match one pattern
    tensors = {p: torch.empty(specs[key].shape, dtype=specs[key].dtype, device="meta") for p, key in found.items()}
    made, wanted = "cannot be joined", list(model.get_parameter(name).shape)
    with suppress(Exception):  # transformers' operations raise anything on a wrong shape
        (whole,) = _of_all(model, converter, name, tensors).values()
        if (shape := list(whole.shape)) == wanted:
            return None
        made = f"make one of shape {shape}"
    pattern, key = next(iter(found.items()))
    lacking = [
        key.replace(_literal(pattern), _literal(each)) for each in converter.source_patterns if each not in found
    ]
    shapes = " and ".join(f"{key} of shape {list(spec.shape)}" for key, spec in specs.items())
    return Misfit(f"{shapes} {made}; config.json requires {wanted} of {name}", lacking)


def _literal(pattern: str) -> str:
    return pattern.replace("\\.", ".")


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


def failure(info: Any) -> str | None:
    """What transformers could not load. info: what its loader returns."""
    for name, found, wanted in sorted(info.mismatched_keys):
        return f"{name} has shape {list(found)}, the model expects {list(wanted)}"
    for name, why in info.conversion_errors.items():
        return f"{name} cannot be made of the checkpoint's tensors: {str(why).splitlines()[-2:][0]}"
    return None
