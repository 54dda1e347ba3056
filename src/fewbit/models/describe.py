"""What is in a model's files, read from their headers alone: schemes, shares, sizes, and how it was made."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

from fewbit.errors import FormatError
from fewbit.formats.base import by_quant_method
from fewbit.formats.gguf import PLAIN, GgufFile
from fewbit.formats.safetensors import Checkpoint
from fewbit.models.source import Source


@dataclass(frozen=True)
class Inspection:
    """Bytes are those of tensors.

    `weights_bytes` counts quantized weights in their canonical parts and the rest as stored (a kernel may keep a little
    more, such as scales in a second type); `file_bytes` is what the files hold. Bits per weight are of the quantized
    weights and of the whole model.
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

    @property
    def share(self) -> float:
        """Share of all parameters that are quantized."""
        return self.quantized_parameters / max(self.parameters, 1)


def describe(source: Source) -> Inspection:
    """The inspection of a located model; FormatError where its files contradict its config."""
    if source.gguf is not None:
        return _of_gguf(source)
    config, checkpoint = source.config, Checkpoint(list(source.files))
    quantization = source.quantization
    schemes: Counter[str] = Counter()
    quantized, packed, plain = 0, 0, set(checkpoint.specs)
    format = by_quant_method(quantization["quant_method"]) if quantization else None
    if quantization and format is None:
        raise FormatError(f"quantization method {quantization['quant_method']!r} is not one that fewbit reads")
    if format is not None and quantization is not None:
        for module, tensors in format.find(quantization, checkpoint.specs).items():
            told = {suffix: checkpoint.get(f"{module}.{suffix}") for suffix in format.told_by if suffix in tensors}
            scheme, shape = format.describe(tensors, quantization, module, told)
            schemes[str(scheme)] += 1
            quantized += prod(shape)
            packed += scheme.nbytes(shape)
            plain -= {f"{module}.{suffix}" for suffix in tensors}
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


def _of_gguf(source: Source) -> Inspection:
    file, config = GgufFile(source.files[0]), source.config
    schemes: Counter[str] = Counter()
    parameters = quantized = packed = 0
    for entry in file.entries.values():
        parameters += prod(entry.shape)
        if entry.type not in PLAIN:
            schemes[entry.type] += 1
            quantized += prod(entry.shape)
            packed += entry.spec.nbytes
    return Inspection(
        name=source.name,
        architecture=config["architectures"][0],
        format="gguf",
        schemes=dict(schemes),
        parameters=parameters,
        quantized_parameters=quantized,
        weights_bytes=file.nbytes,
        file_bytes=file.nbytes,
        bits_per_weight=8 * file.nbytes / max(parameters, 1),
        bits_per_weight_quantized=8 * packed / quantized if quantized else None,
    )


def _made(source: Source) -> dict[str, Any]:
    """What fewbit recorded when it made the model; empty for others'."""
    file = source.folder / "fewbit.json"
    try:
        record = json.loads(file.read_text())
        nothing = type(None)
        kinds: dict[str, tuple[type, ...]] = {
            "versions": (dict,),
            "plan": (dict,),
            "tensors": (list,),
            "notes": (list,),
            "calibration": (dict, nothing),
        }
        for key, kind in kinds.items():
            if not isinstance(record[key], kind):
                raise TypeError(f"{key} is {record[key]!r}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file} is no record of how fewbit made a model: {error}") from None
    return dict(record)
