"""Writes a GGUF file from the finished tensors of a run or conversion.

A quantized weight is written as its blocks, with rows permuted to GGUF's order. Vectors and position embeddings are
float32, as llama.cpp requires. Other unquantized matrices are float32, or float16 as llama.cpp's quantizer writes them;
a conversion keeps bfloat16. Tensors are in the order of llama.cpp's quantizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import NumericsError, PlanError
from fewbit.formats.containers import gguf_split
from fewbit.formats.containers.gguf import Entry, GgufWriter
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models import conversions, scales
from fewbit.models.gguf import names as gguf_names
from fewbit.models.gguf.header import Header, advised, extra_tensors
from fewbit.models.skeleton import Skeleton
from fewbit.pipeline.settled import Settled, finite
from fewbit.pipeline.write_folder import folded
from fewbit.plans import mixtures
from fewbit.plans.plan import Resolved
from fewbit.schemes.base import PartSpec
from fewbit.schemes.ggml.table import BLOCK_TYPES

# Matrices that llama.cpp requires in 32 bits: tables of positions, routers of experts, short convolutions, and the
# small parameters of state-space layers.
_IN_32_BITS = (
    "position_embd.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "exp_probs_b.bias",
    "ssm_conv1d.weight",
    "shortconv.conv.weight",
    "indexer.proj.weight",
    "altup_correct_coef.weight",
    "altup_predict_coef.weight",
    "ssm_a",
    "ssm_d",
    "ssm_norm.weight",
)
_QUANTIZATION_VERSION = 2  # version of the block types: ggml's GGML_QNT_VERSION


@dataclass(frozen=True)
class Planned:
    """A tensor of the file. `name`: its name in the model. `key`: its name in the checkpoint. `module`: the name of its
    module if it is quantized, else None. `more`: the other experts of a tensor that holds those of a layer."""

    entry: Entry
    name: str
    key: str
    module: str | None
    more: tuple[Planned, ...] = ()


@advised()
def planned(settled: Settled) -> list[Planned]:
    """The model's tensors in the file, in the file's order."""
    skeleton, resolved = settled.skeleton, settled.resolved
    routes, tensors = gguf_names.routes(skeleton.config), []
    _check_numbers(skeleton, routes)
    for key, name, spec in _tensors(skeleton):
        if name not in routes:
            raise PlanError(f"GGUF has no name for {name} of a model of type {skeleton.config.model_type!r}")
        route, module = routes[name], name.removesuffix(".weight")
        if route.listed is not None:
            continue
        assignment = resolved.assignments.get(module) if name.endswith(".weight") else None
        if assignment is not None:
            rows, columns = assignment.shape
            entry = Entry(route.name, str(assignment.scheme), (route.height or rows, columns))
        else:
            shape = route.shape_in_file(spec.shape)
            spec = skeleton.multiplied.get(key, spec)
            vector = len(shape) < 2 or route.name.endswith(_IN_32_BITS)
            own = {torch.float32: "f32", torch.bfloat16: "bf16" if settled.exact else "f16"}.get(spec.dtype, "f16")
            entry = Entry(route.name, "f32" if vector else own, shape)
        tensors.append(Planned(entry, name, key, module if assignment is not None else None))
    tensors = _stacked(tensors, routes, exact=settled.exact)
    return sorted(tensors, key=lambda each: mixtures.order(each.entry.name))


def _tensors(skeleton: Skeleton) -> Iterator[tuple[str, str, PartSpec]]:
    """(checkpoint name, model name, spec) of every tensor of the model, split and merged as transformers has it."""
    keys: dict[str, list[str]] = {}
    for key, name in skeleton.name_of.items():
        keys.setdefault(name, []).append(key)
    for key, name, spec in skeleton.passed_through({*skeleton.splits, *skeleton.merged}):
        if name not in skeleton.merged or name in skeleton.splits:
            yield key, name, spec
            continue
        if name not in skeleton.checkpoint.specs:
            own = conversions.merged(skeleton.model, keys[name], name, skeleton.checkpoint.slice)
            skeleton.checkpoint.add(name, replace(spec, shape=tuple(own.get_shape())), own)
        yield name, name, skeleton.checkpoint.specs[name]


def _check_numbers(skeleton: Skeleton, routes: Mapping[str, gguf_names.Route]) -> None:
    """PlanError if the checkpoint lacks a number that the file has as a key."""
    wanted = {name for name, route in routes.items() if route.listed is not None}
    if lacking := wanted - {name for _, name, _ in _tensors(skeleton)}:
        raise PlanError(f"the checkpoint has no {min(lacking)}; a GGUF file has this number of every layer")


def _stacked(tensors: Sequence[Planned], routes: Mapping[str, gguf_names.Route], *, exact: bool) -> list[Planned]:
    """The tensors, with those of all experts of a layer, and others that a file has as one tensor, together.

    PlanError if these differ in their scheme.

    exact: the schemes are those of a conversion, not of a plan.
    """
    found = [each for each in tensors if routes[each.name].expert is None]
    groups: dict[str, list[Planned]] = {}
    for each in tensors:
        if routes[each.name].expert is not None:
            groups.setdefault(each.entry.name, []).append(each)
    for group in groups.values():
        group.sort(key=lambda each: routes[each.name].expert or 0)
        first, *more = group
        if other := next((each for each in more if each.entry.type != first.entry.type), None):
            what = "all experts of a layer" if not routes[first.name].heights else f"{len(group)} matrices of a layer"
            raise PlanError(
                f"a GGUF file holds {what} in one tensor of one type, and "
                f"{first.name} {'becomes' if exact else 'gets'} {first.entry.type}, {other.name} {other.entry.type}",
                "No one type holds both unchanged. `requantize=True` with a plan for GGUF quantizes them anew."
                if exact
                else "Give the plan rules that match all of these.",
            )
        whole = first.entry._replace(shape=routes[first.name].shape_of_all(first.entry.shape, len(group)))
        found.append(replace(first, entry=whole, more=tuple(more)))
    return found


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
    extra = sum(tensor.nbytes for tensor in extra_tensors(settled.skeleton.config).values())
    return extra + sum(each.entry.spec.nbytes for each in planned(settled))


def files(settled: Settled, header: Header, limit: int) -> int:
    """How many files of at most `limit` bytes the output is split into. PlanError if they are too many.

    The first file also has the record, whose size is not known before the work: with it, there may be one more.
    """
    return gguf_split.count(_entries(planned(settled), header), metadata(header, settled.resolved, {}), limit)


def write(path: Path, settled: Settled, blocks: Checkpoint, header: Header, record: Mapping[str, Any]) -> int:
    """Write the file at `path`, with a `record` of how it was made. Returns the bytes of all tensors.

    blocks: the tensors that differ from the source's, by their names in the model. Each is read once.
    """
    skeleton, resolved = settled.skeleton, settled.resolved
    routes, tensors, extra = header.routes, planned(settled), header.extra
    entries = _entries(tensors, header)
    own = folded(skeleton, blocks)
    keys = metadata(header, resolved, {**record, "scales": scales.to_record(own)}) | scales.to_metadata(own)
    keys |= gguf_names.lists_of(routes, _numbers(settled, blocks, routes))
    with GgufWriter(path, keys, entries) as writer:
        for name, tensor in extra.items():
            writer.add(name, tensor)
        for each in tensors:
            parts = [_made(part, settled, blocks, routes[part.name]) for part in (each, *each.more)]
            whole, split = routes[each.name].joined(parts), routes[each.name].split
            pieces = [whole] if split is None else split.cut(whole)
            for entry, piece in zip(_pieces(each, routes), pieces, strict=True):
                writer.add(entry.name, piece)
    return sum(entry.spec.nbytes for entry in entries)


def _numbers(settled: Settled, blocks: Checkpoint, routes: Mapping[str, gguf_names.Route]) -> dict[str, Tensor]:
    """The numbers of the model that the file has as keys, by their names in the model."""
    skeleton = settled.skeleton
    keys = {name: key for key, name, _ in _tensors(skeleton) if routes[name].listed is not None}
    return {
        name: blocks.get(name) if name in blocks.specs else skeleton.checkpoint.get(key) for name, key in keys.items()
    }


def _entries(tensors: Sequence[Planned], header: Header) -> list[Entry]:
    """All tensors of the file, in its order."""
    return header.extra_entries + [entry for each in tensors for entry in _pieces(each, header.routes)]


def _pieces(each: Planned, routes: Mapping[str, gguf_names.Route]) -> list[Entry]:
    """The tensors of the file: several if it has this one in pieces."""
    split = routes[each.name].split
    return [each.entry] if split is None else split.entries(each.entry)


def _made(each: Planned, settled: Settled, blocks: Checkpoint, route: gguf_names.Route) -> Tensor:
    """The tensor, or that of one expert, as the file stores it."""
    resolved = settled.resolved
    if each.module is None:
        place, key = (blocks, each.name) if each.name in blocks.specs else (settled.skeleton.checkpoint, each.key)
        return _plain(route.to_file(place.get(key)), each)
    assignment = resolved.assignments[each.module]
    (suffix,) = resolved.format.specs(assignment.shape, assignment.scheme)
    packed = blocks.get(f"{each.module}.{suffix}")
    return route.blocks_to_file(packed, BLOCK_TYPES[each.entry.type].columns if assignment.order is None else 0)


def _plain(tensor: Tensor, each: Planned) -> Tensor:
    values = tensor.to(each.entry.spec.dtype)
    if not finite(values):
        raise NumericsError(f"{each.name} has values beyond the range of {each.entry.type}")
    return values
