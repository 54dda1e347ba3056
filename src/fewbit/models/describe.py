"""Describe a model from the headers of its files: schemes, share of quantized weights, sizes, how it was made."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.quantizers import auto

from fewbit.brief import brief
from fewbit.errors import FormatError
from fewbit.formats.base import by_quant_method
from fewbit.formats.containers.gguf import PLAIN, GgufFile
from fewbit.formats.containers.gguf_strings import Strings
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models import classes, decoded, foreign
from fewbit.models.building import building
from fewbit.models.gguf import towers
from fewbit.models.scales import GGUF_RECORD
from fewbit.models.source import Source
from fewbit.system.files import read_json

_SHOWN = 8  # values of a list of a GGUF file
_WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@brief
@dataclass(frozen=True)
class Inspection:
    """The contents of a model's files. Byte counts cover tensors only.

    schemes: scheme -> number of tensors. weights_bytes: quantized weights in canonical parts, the rest as stored (a
    kernel may need a little more, such as scales in a second dtype); weights that fewbit decodes while it loads the
    model count as decoded. file_bytes: tensors in the files. bits_per_weight: of the whole model, as stored.
    bits_per_weight_quantized: of the quantized weights, None without any.
    made: fewbit's record of how it made the model; empty for other models. metadata: all keys of a GGUF file.
    towers: name of a GGUF file with a vision or audio tower -> what it is for, or why fewbit does not read it.
    """

    name: str
    architecture: str
    format: str | None
    schemes: dict[str, int]
    parameters: int
    quantized_parameters: int
    weights_bytes: int
    file_bytes: int
    bits_per_weight: float
    bits_per_weight_quantized: float | None
    made: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    towers: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of all parameters that are quantized."""
        return self.quantized_parameters / max(self.parameters, 1)


def describe(source: Source) -> Inspection:
    """Describe the model of `source`. FormatError if its files contradict its config."""
    if source.gguf is not None:
        found = _of_gguf(source.name, GgufFile(source.files[0]), source.config["architectures"][0])
        return replace(found, towers={file.name: towers.about(file) for file in source.towers})
    config, checkpoint = source.config, Checkpoint(list(source.files))
    quantization = source.quantization
    schemes: Counter[str] = Counter()
    quantized, packed, plain = 0, 0, set(checkpoint.specs)
    format = by_quant_method(quantization["quant_method"]) if quantization else None
    if quantization and decoded.layout_of(quantization, checkpoint.specs) is not None:
        return _of_layout(source, checkpoint, quantization["quant_method"])
    if quantization and format is None:
        return _of_another(source, checkpoint, quantization["quant_method"])
    if format is not None and quantization is not None:
        for module, tensors in format.find(quantization, checkpoint.specs).items():
            suffixes = [suffix for suffix in format.metadata_suffixes if suffix in tensors]
            metadata = {suffix: checkpoint.get(f"{module}.{suffix}") for suffix in suffixes}
            scheme, shape = format.describe(tensors, quantization, module, metadata)
            schemes[str(scheme)] += 1
            quantized += prod(shape)
            packed += scheme.nbytes(shape)
            plain -= {f"{module}.{suffix}" for suffix in tensors}
        for fused, tensors in format.find_fused(quantization, checkpoint.specs).items():
            experts, scheme, shape = format.describe_fused(tensors, quantization, fused)
            schemes[str(scheme)] += 1
            quantized += experts * prod(shape)
            packed += experts * scheme.nbytes(shape)
            plain -= {f"{fused}{ending}" for ending in tensors}
    others = {name: checkpoint.specs[name] for name in plain}
    rest = sum(spec.nbytes for spec in others.values())
    parameters = quantized + sum(prod(spec.shape) for spec in others.values())
    return Inspection(
        name=source.name,
        architecture=str((config.get("architectures") or [config.get("model_type", "?")])[0]),
        format=format.name if format else None,
        schemes=dict(schemes),
        parameters=parameters,
        quantized_parameters=quantized,
        weights_bytes=packed + rest,
        file_bytes=sum(spec.nbytes for spec in checkpoint.specs.values()),
        bits_per_weight=8 * (packed + rest) / max(parameters, 1),
        bits_per_weight_quantized=8 * packed / quantized if quantized else None,
        made=_made(source),
    )


def _of_layout(source: Source, checkpoint: Checkpoint, method: str) -> Inspection:
    """Describe a model in a layout that fewbit decodes as it reads it."""
    config, stored = source.config, dict(checkpoint.specs)
    packed = decoded.found_in(source, checkpoint)
    parts = {part for each in packed.values() for part in each.parts.values()}
    unused = {name for each in packed.values() for name in each.unused}
    whole = sum(spec.nbytes for spec in stored.values())
    quantized = sum(each.numel for each in packed.values())
    others = [spec for name, spec in stored.items() if name not in parts | unused]
    parameters = quantized + sum(prod(spec.shape) for spec in others)
    return Inspection(
        name=source.name,
        architecture=str((config.get("architectures") or [config.get("model_type", "?")])[0]),
        format=method,
        schemes=dict(Counter(str(each.weight.codec) if each.weight else each.kind for each in packed.values())),
        parameters=parameters,
        quantized_parameters=quantized,
        weights_bytes=quantized * source.dtype.itemsize + sum(spec.nbytes for spec in others),  # decoded
        file_bytes=whole,
        bits_per_weight=8 * whole / max(parameters, 1),
        bits_per_weight_quantized=8 * sum(stored[part].nbytes for part in parts) / quantized if quantized else None,
    )


def _of_another(source: Source, checkpoint: Checkpoint, method: str) -> Inspection:
    """Describe a model that another back end of transformers reads, from its config and the dtypes of its tensors.

    A parameter counts as quantized, unless the file has a tensor of its name and shape with at least 16 bits.
    """
    if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        error = foreign.unread(method)
        raise FormatError(f"{source.folder}: {error.message}", error.hint)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    try:
        kind = AutoConfig.for_model(**config)
        with building(), torch.device("meta"):
            model = classes.build(kind)
    except Exception as error:  # a model's code can raise anything on a wrong config
        raise FormatError(
            f"{source.folder / 'config.json'} describes no causal LM and no multimodal LM: {error}"
        ) from None
    parameters = quantized = plain = 0
    count = 0
    for name, parameter in model.named_parameters():
        spec = checkpoint.specs.get(name)
        parameters += parameter.numel()
        if spec is not None and spec.shape == tuple(parameter.shape) and spec.dtype in _WIDE:
            plain += spec.nbytes
        else:
            quantized, count = quantized + parameter.numel(), count + 1
    whole = sum(spec.nbytes for spec in checkpoint.specs.values())
    return Inspection(
        name=source.name,
        architecture=str((config.get("architectures") or [config.get("model_type", "?")])[0]),
        format=method,
        schemes={method: count},
        parameters=parameters,
        quantized_parameters=quantized,
        weights_bytes=whole,
        file_bytes=whole,
        bits_per_weight=8 * whole / max(parameters, 1),
        bits_per_weight_quantized=8 * (whole - plain) / quantized if quantized else None,
    )


def describe_tower(file: GgufFile) -> Inspection:
    """Describe a file with a vision or audio tower (mmproj)."""
    found = _of_gguf(str(file.path), file, "vision or audio tower (mmproj)")
    return replace(found, towers={file.path.name: towers.about(file.path)})


def _of_gguf(name: str, file: GgufFile, architecture: str) -> Inspection:
    schemes: Counter[str] = Counter()
    parameters = quantized = packed = 0
    for entry in file.entries.values():
        parameters += prod(entry.shape)
        if entry.type not in PLAIN:
            schemes[entry.type] += 1
            quantized += prod(entry.shape)
            packed += entry.spec.nbytes
    return Inspection(
        name=name,
        architecture=architecture,
        format="gguf",
        schemes=dict(schemes),
        parameters=parameters,
        quantized_parameters=quantized,
        weights_bytes=file.nbytes,
        file_bytes=file.nbytes,
        bits_per_weight=8 * file.nbytes / max(parameters, 1),
        bits_per_weight_quantized=8 * packed / quantized if quantized else None,
        made=_of_keys(file),
    )


def shown_keys(file: GgufFile) -> dict[str, Any]:
    """All keys of a GGUF file, as JSON has them. A long list is its length and its first values."""
    found: dict[str, Any] = {}
    for key, value in file.metadata.items():
        value = value.tolist() if isinstance(value, (np.ndarray, Strings)) else value
        long = isinstance(value, list) and len(value) > _SHOWN
        found[key] = {"length": len(value), "first": value[:_SHOWN]} if long else value
    return found


def _made(source: Source) -> dict[str, Any]:
    """The record that fewbit wrote when it made the model; empty for other models."""
    file = source.folder / "fewbit.json"
    try:
        return _checked(read_json(file), str(file))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise FormatError(f"{file} is not a valid record of fewbit: {error}") from None


def _of_keys(file: GgufFile) -> dict[str, Any]:
    """The record in the metadata of a GGUF file; empty for other models."""
    if (text := file.metadata.get(GGUF_RECORD)) is None:
        return {}
    where = f"{file.path}: {GGUF_RECORD}"
    try:
        return _checked(json.loads(text), where)
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}") from None


def _checked(record: Any, where: str) -> dict[str, Any]:
    nothing = type(None)
    kinds: dict[str, tuple[type, ...]] = {
        "versions": (dict,),
        "plan": (dict,),
        "tensors": (list,),
        "notes": (list,),
        "calibration": (dict, nothing),
    }
    try:
        for key, kind in kinds.items():
            if not isinstance(record[key], kind):
                raise TypeError(f"{key} is {record[key]!r}")
    except (KeyError, TypeError) as error:
        raise FormatError(f"{where} is not a valid record of fewbit: {error}") from None
    return dict(record)
