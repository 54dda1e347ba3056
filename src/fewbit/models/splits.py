"""Checkpoint tensors that transformers splits into several parameters while it loads a model, such as fused q, k and v.

Each part becomes a view of the checkpoint's tensor under the parameter's name. So it can be quantized by itself, and an
output has it under that name, which transformers loads without splitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fewbit.errors import FormatError, PlanError
from fewbit.schemes.base import PartSpec

Mapping = Sequence[WeightRenaming | WeightConverter]


def converter_of(mapping: Mapping, key: str) -> WeightConverter | None:
    """The entry of transformers' conversion mapping that computes a parameter from the checkpoint's tensor `key`."""
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    if not converters:
        return None
    _, pattern = rename_source_key(key, [m for m in mapping if isinstance(m, WeightRenaming)], converters)
    return next((m for m in converters if pattern in m.source_patterns), None)


def parts_of(
    model: PreTrainedModel, mapping: Mapping, key: str, first: str, spec: PartSpec
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
    model: PreTrainedModel, mapping: Mapping, key: str, name: str, view: Callable[[Any], Tensor]
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
    own: Any = deepcopy(converter)
    own.add_tensor(first, first, own.source_patterns[0], lambda: tensor)
    found = own.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
