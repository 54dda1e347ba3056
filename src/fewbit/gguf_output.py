"""One GGUF file put together from the blocks of a run: what `folder_output.py` does for folders.

Weights that were quantized are written as their blocks, whose rows are put in the file's order; all other tensors as
numbers: float32 where they are vectors or positions, as llama.cpp wants them, and float16 where they are matrices that
no block type fits or that the plan leaves out. Tensors come in the order in which llama.cpp's quantizer writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import mixtures, scales
from fewbit.errors import FormatError, NumericsError, PlanError
from fewbit.folder_output import folded
from fewbit.formats import imatrix
from fewbit.formats.gguf import Entry, GgufWriter
from fewbit.formats.safetensors import Checkpoint
from fewbit.methods.base import name_of
from fewbit.models import gguf_config, gguf_names
from fewbit.models.gguf_header import Header
from fewbit.models.skeleton import Skeleton
from fewbit.pipeline import Run, outside
from fewbit.plan import Resolved
from fewbit.stats import Need, Stats

_QUANTIZATION_VERSION = 2  # of the block types: ggml's GGML_QNT_VERSION


def model_of(skeleton: Skeleton) -> mixtures.Model:
    """What a plan must know of the model; PlanError for one that llama.cpp has no name for."""
    config = skeleton.config
    routes = gguf_names.routes(config)
    heads = config.num_attention_heads
    outside = skeleton.outside()
    linears = [name for block in skeleton.blocks for name in skeleton.linears(block)]
    if unknown := [name for name in [*linears, *outside] if f"{name}.weight" not in routes]:
        raise PlanError(
            f"GGUF has no name for {unknown[0]} of a model of type {config.model_type!r}",
            "Use a plan for another format.",
        )
    return mixtures.Model(
        arch=gguf_names.architecture(config.model_type).name,
        layers=config.num_hidden_layers,
        gqa=heads // (getattr(config, "num_key_value_heads", None) or heads),
        tied=len(outside) < 2,
        names={name: routes[f"{name}.weight"].name.removesuffix(".weight") for name in [*linears, *outside]},
    )


@dataclass(frozen=True)
class Planned:
    """A tensor of the file: its entry, the model's name for it and what the checkpoint calls it; its module's
    name where it was quantized."""

    entry: Entry
    name: str
    key: str
    module: str | None


def planned(skeleton: Skeleton, resolved: Resolved) -> list[Planned]:
    """All tensors of the model that the file will hold, in its order."""
    routes, found = gguf_names.routes(skeleton.config), []
    for key, name, spec in skeleton.passed_through():
        if name not in routes:
            raise PlanError(f"GGUF has no name for {name} of a model of type {skeleton.config.model_type!r}")
        route, module = routes[name], name.removesuffix(".weight")
        assignment = resolved.assignments.get(module) if name.endswith(".weight") else None
        if assignment is not None:
            entry = Entry(route.name, str(assignment.scheme), assignment.shape)
        else:
            shape = spec.shape[::-1] if route.transposed else spec.shape
            plain = len(shape) < 2 or route.name == "position_embd.weight" or spec.dtype == torch.float32
            entry = Entry(route.name, "f32" if plain else "f16", shape)
        found.append(Planned(entry, name, key, module if assignment is not None else None))
    return sorted(found, key=lambda each: _order(each.entry.name))


def metadata(header: Header, resolved: Resolved, record: Mapping[str, Any]) -> dict[str, Any]:
    """The file's keys: what the model is, how it was made, its tokenizer."""
    return {
        **header.metadata,
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": file_type(resolved),
        scales.GGUF_RECORD: json.dumps(record),
    }


def importance(path: Path, skeleton: Skeleton, resolved: Resolved) -> tuple[dict[str, Stats], list[str]]:
    """What the importance matrix at `path` says of each linear in a block, and sentences on what it does not say.

    PlanError where the plan's methods need more than that, or nothing at all; FormatError for a damaged file and for
    one of another model.
    """
    besides = {a.module for a in outside(skeleton, resolved)}
    wanted = {module: a for module, a in resolved.assignments.items() if module not in besides}
    for a in wanted.values():
        if a.method.needs != Need.MEAN_SQUARE or a.method.rewrites:
            needs = "whole inputs" if a.method.needs > Need.NOTHING else "no importances"
            raise PlanError(
                f"--imatrix {path}: method {name_of(a.method)} needs {needs}",
                "Leave --imatrix out, or use --method imatrix.",
            )
    names, matrix = model_of(skeleton).names, imatrix.read(path)
    found, missing = {}, []
    for module, a in wanted.items():
        name = f"{names[module]}.weight"
        if name not in matrix:
            missing.append(name)
            found[module] = Stats.known(torch.ones(a.shape[1], device=skeleton.device, dtype=torch.float32), 1)
            continue
        mean_square, rows = matrix[name]
        if len(mean_square) != a.shape[1]:
            raise FormatError(
                f"{path}: {name} has {len(mean_square)} importances, the weight {a.shape[1]} columns",
                "The file is of another model.",
            )
        found[module] = Stats.known(mean_square.to(skeleton.device), rows)
    if len(missing) == len(wanted):
        raise FormatError(
            f"{path} has importances of {len(matrix)} tensors, none of this model ({missing[0]} is not there)",
            "The file is of another model.",
        )
    notes = [f"{path} has no importances of {', '.join(missing)}: all columns count alike there"] if missing else []
    return found, notes


def file_type(resolved: Resolved) -> int:
    """llama.cpp's number for the plan's mixture, or for the scheme that most weights have."""
    for rule in resolved.plan.rules:
        if rule.scheme is not None and rule.scheme.startswith(mixtures.PREFIX):
            return mixtures.MIXTURES[rule.scheme.removeprefix(mixtures.PREFIX)].file_type
    if not resolved.assignments:
        return 1
    sizes: dict[str, int] = {}
    for a in resolved.assignments.values():
        sizes[str(a.scheme)] = sizes.get(str(a.scheme), 0) + a.shape[0] * a.shape[1]
    return mixtures.file_type(max(sizes, key=lambda scheme: sizes[scheme]))


def nbytes(skeleton: Skeleton, resolved: Resolved) -> int:
    """Bytes of all tensors that the file will hold."""
    extra = sum(4 * tensor.numel() for tensor in gguf_config.extra_tensors(skeleton.config).values())
    return extra + sum(each.entry.spec.nbytes for each in planned(skeleton, resolved))


def write(
    path: Path, skeleton: Skeleton, resolved: Resolved, run: Run, header: Header, record: Mapping[str, Any]
) -> int:
    """Write the file at `path`, with a `record` of how it was made. Returns the bytes of all tensors."""
    routes, tensors, extra = header.routes, planned(skeleton, resolved), header.extra
    entries = [Entry(name, "f32", tuple(tensor.shape)) for name, tensor in extra.items()]
    entries += [each.entry for each in tensors]
    blocks, own = Checkpoint(run.files()), folded(skeleton, run)
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
    made = tensor.to(each.entry.spec.dtype)
    if not torch.isfinite(made).all():
        raise NumericsError(f"{each.name} has values beyond the range of {each.entry.type}")
    return made


def _order(name: str) -> tuple[int, str]:
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)
