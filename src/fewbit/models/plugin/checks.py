"""What is read of a quantized checkpoint before its weights: shapes and small scales, to check them, and other scales.

Large tensors of scales, such as those of the groups of a large model, are checked when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fewbit.errors import FormatError
from fewbit.formats.base import Format
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models import decoded
from fewbit.models.linears import shape_of
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import Codec, PartSpec

_SMALL = 1 << 20  # bytes of a tensor
_OF_CACHE = re.compile(r"(.+)\.[qkv]_(?:global_)?(?:scale|zero_point)")

Tensors = Mapping[
    str, Mapping[str, PartSpec]
]  # module or fused parameter, by its name in the files -> suffix -> header


def check(
    model: PreTrainedModel,
    format: Format,
    config: Mapping[str, Any],
    files: Iterable[str],
    found: tuple[Tensors, Tensors],
    stored_as: Mapping[str, str],
) -> None:
    """FormatError that names the tensor if a weight has another shape than the model, or a scale a wrong value.

    found: the quantized weights, and those of fused parameters. stored_as: module of the model -> name in the files.
    """
    checkpoint, module_of = Checkpoint([Path(file) for file in files]), {name: m for m, name in stored_as.items()}
    for stored, tensors in found[0].items():
        metadata = {s: checkpoint.get(f"{stored}.{s}") for s in format.metadata_suffixes if s in tensors}
        scheme, shape = format.describe(tensors, config, stored, metadata)
        linear: Any = model.get_submodule(module_of[stored])
        if shape != (wanted := shape_of(linear)):
            largest = max(tensors, key=lambda suffix: tensors[suffix].nbytes)
            raise FormatError(
                f"{stored}.{largest} holds a weight of shape {list(shape)}, config.json requires {list(wanted)}"
            )
        _check_scales(checkpoint, format, scheme, {s: (f"{stored}.{s}", spec) for s, spec in tensors.items()})
    for fused, tensors in found[1].items():
        _, scheme, _ = format.describe_fused(tensors, config, fused)
        _check_scales(checkpoint, format, scheme, {s: (f"{fused}{s}", spec) for s, spec in tensors.items()})


def _check_scales(
    checkpoint: Checkpoint, format: Format, scheme: Codec, tensors: Mapping[str, tuple[str, PartSpec]]
) -> None:
    scales, positive = decoded.scales_in(format, scheme, {suffix: spec for suffix, (_, spec) in tensors.items()})
    for suffix in scales:
        name, spec = tensors[suffix]
        if spec.nbytes <= _SMALL and (flaw := decoded.flaw_of(checkpoint.get(name), positive=suffix in positive)):
            raise FormatError(f"{name} {flaw}", decoded.DAMAGED)


def scales_of_cache(model: PreTrainedModel, files: Iterable[str], named: Mapping[str, str]) -> dict[str, Tensor]:
    """Name in the model -> tensor, of the scales of the KV cache that servers find beside an attention layer's weights.

    transformers drops tensors that the model has no place for. named: name in the files -> name in the model.
    """
    modules, own = dict(model.named_modules()), model.state_dict().keys()
    found = {
        name: key
        for key, name in named.items()
        if (match := _OF_CACHE.fullmatch(name)) and match[1] in modules and name not in own
    }
    found = {name: key for name, key in found.items() if not isinstance(modules[name.rpartition(".")[0]], QLinear)}
    if not found:
        return {}
    checkpoint = Checkpoint([Path(file) for file in files])
    return {name: checkpoint.get(key).clone() for name, key in found.items()}
