"""Writes a GGUF file from the finished tensors of a run or conversion.

A quantized weight is written as its blocks, with rows permuted to GGUF's order. Vectors and position embeddings are
float32, as llama.cpp requires. Other unquantized matrices are float32, or float16 as llama.cpp's quantizer writes them;
a conversion keeps bfloat16. Tensors are in the order of llama.cpp's quantizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import NumericsError, PlanError
from fewbit.formats.containers.gguf import Entry, GgufWriter
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models import scales
from fewbit.models.gguf import config as gguf_config
from fewbit.models.gguf import names as gguf_names
from fewbit.models.gguf.header import Header
from fewbit.pipeline.settled import Settled, finite
from fewbit.pipeline.write_folder import folded
from fewbit.plans import mixtures
from fewbit.plans.plan import Resolved

_QUANTIZATION_VERSION = 2  # version of the block types: ggml's GGML_QNT_VERSION


@dataclass(frozen=True)
class Planned:
    """A tensor of the file. `name`: its name in the model. `key`: its name in the checkpoint. `module`: the name of its
    module if it is quantized, else None."""

    entry: Entry
    name: str
    key: str
    module: str | None


def planned(settled: Settled) -> list[Planned]:
    """The model's tensors in the file, in the file's order."""
    skeleton, resolved = settled.skeleton, settled.resolved
    routes, tensors = gguf_names.routes(skeleton.config), []
    for key, name, spec in skeleton.passed_through():
        if name not in routes:
            raise PlanError(f"GGUF has no name for {name} of a model of type {skeleton.config.model_type!r}")
        route, module = routes[name], name.removesuffix(".weight")
        assignment = resolved.assignments.get(module) if name.endswith(".weight") else None
        if assignment is not None:
            entry = Entry(route.name, str(assignment.scheme), assignment.shape)
        else:
            shape = spec.shape[::-1] if route.transposed else spec.shape
            vector = len(shape) < 2 or route.name == "position_embd.weight"
            own = {torch.float32: "f32", torch.bfloat16: "bf16" if settled.exact else "f16"}.get(spec.dtype, "f16")
            entry = Entry(route.name, "f32" if vector else own, shape)
        tensors.append(Planned(entry, name, key, module if assignment is not None else None))
    return sorted(tensors, key=lambda each: mixtures.order(each.entry.name))


def metadata(header: Header, resolved: Resolved, record: Mapping[str, Any]) -> dict[str, Any]:
    """The file's keys: the model's config, its tokenizer, and the `record` of how the file was made."""
    return {
        **header.metadata,
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": file_type(resolved),
        scales.GGUF_RECORD: json.dumps(record),
    }


def file_type(resolved: Resolved) -> int:
    """llama.cpp's file type number of the plan's mixture, or of the scheme that has the most weights."""
    for rule in resolved.plan.rules:
        if rule.scheme is not None and rule.scheme.startswith(mixtures.PREFIX):
            return mixtures.MIXTURES[rule.scheme.removeprefix(mixtures.PREFIX)].file_type
    if not resolved.assignments:
        return 1
    sizes: dict[str, int] = {}
    for a in resolved.assignments.values():
        sizes[str(a.scheme)] = sizes.get(str(a.scheme), 0) + a.shape[0] * a.shape[1]
    return mixtures.file_type(max(sizes, key=lambda scheme: sizes[scheme]))


def nbytes(settled: Settled) -> int:
    """Bytes of all tensors of the file."""
    extra = sum(4 * tensor.numel() for tensor in gguf_config.extra_tensors(settled.skeleton.config).values())
    return extra + sum(each.entry.spec.nbytes for each in planned(settled))


def write(path: Path, settled: Settled, blocks: Checkpoint, header: Header, record: Mapping[str, Any]) -> int:
    """Write the file at `path`, with a `record` of how it was made. Returns the bytes of all tensors.

    blocks: the tensors that differ from the source's, by their names in the model. Each is read once.
    """
    skeleton, resolved = settled.skeleton, settled.resolved
    routes, tensors, extra = header.routes, planned(settled), header.extra
    entries = [Entry(name, "f32", tuple(tensor.shape)) for name, tensor in extra.items()]
    entries += [each.entry for each in tensors]
    own = folded(skeleton, blocks)
    keys = metadata(header, resolved, {**record, "scales": scales.to_record(own)}) | scales.to_metadata(own)
    with GgufWriter(path, keys, entries) as writer:
        for name, tensor in extra.items():
            writer.add(name, tensor.float())
        for each in tensors:
            route = routes[each.name]
            if each.module is not None:
                (suffix,) = resolved.format.specs(each.entry.shape, resolved.assignments[each.module].scheme)  # type: ignore[arg-type]
                packed = blocks.get(f"{each.module}.{suffix}")
                writer.add(each.entry.name, packed if route.rows is None else packed[route.rows])
            else:
                place, key = (blocks, each.name) if each.name in blocks.specs else (skeleton.checkpoint, each.key)
                writer.add(each.entry.name, _plain(route.to_file(place.get(key)), each))
    return sum(entry.spec.nbytes for entry in entries)


def _plain(tensor: Tensor, each: Planned) -> Tensor:
    values = tensor.to(each.entry.spec.dtype)
    if not finite(values):
        raise NumericsError(f"{each.name} has values beyond the range of {each.entry.type}")
    return values
