"""Names of tensors in a GGUF file, and the conversions of their values, for each architecture.

transformers' names are those of the modules (`Skeleton.name_of`, `named_parameters`). Besides the name, three things
can differ. None of them affects quantization:

    rows        Llama's q and k: transformers rotates the halves of a head (i with i + d/2), llama.cpp neighbours (2i
                with 2i + 1). So row 2i + j of a head in the file is row i + j d/2 of the model's weight.
                GPT-NeoX's qkv: a file has q of all heads, then k, then v; the model has q, k and v of each head
    transposed  GPT-2's Conv1D stores [K, N]; a file stores [N, K], as for every linear
    shift       Gemma's norms multiply by 1 + w; a file stores this sum

    route = routes(config)["model.layers.0.self_attn.q_proj.weight"]     # KeyError: no file contains it
    route.name, route.rows                                               # "blk.0.attn_q.weight", int64 [N] or None
    route.to_file(tensor), route.from_file(tensor)                       # both directions, for unquantized weights
    blocks[route.rows]                                                   # for quantized weights [N, K]

A row of blocks encodes one row of the weight, so permuting rows is exact for every type.
Source: gguf-py's name tables and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.architectures import TYPES


@dataclass(frozen=True)
class Route:
    """The name of a model's tensor in the file, and its conversion.

    expert: the number of the expert; the file has the tensors of all experts of a layer as one, [experts, ...].
    sizes, axes: the rows of the model's weight, as an array of these `sizes`, are in the file's order if its axes are
    permuted to `axes`. Empty if the order is the same.
    """

    name: str
    expert: int | None = None
    transposed: bool = False
    shift: float = 0.0
    sizes: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def rows(self) -> Tensor | None:
        """Row i of the file is row `rows[i]` of the model's weight [N, K]; None if the order is the same."""
        if not self.sizes:
            return None
        rows = torch.arange(prod(self.sizes), dtype=torch.int64, device="cpu")
        return rows.reshape(self.sizes).permute(self.axes).flatten()

    @property
    def rows_back(self) -> Tensor | None:
        """Row i of the model's weight is row `rows_back[i]` of the file; None if the order is the same."""
        return None if self.rows is None else self.rows.argsort()

    def to_file(self, tensor: Tensor) -> Tensor:
        """Convert a tensor of the model to the file's layout and values."""
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor if self.rows is None else tensor[self.rows]
        return tensor.float() + self.shift if self.shift else tensor

    def from_file(self, tensor: Tensor) -> Tensor:
        """Convert a tensor of the file to the model's layout and values."""
        tensor = tensor if self.rows_back is None else tensor[self.rows_back]
        tensor = tensor.float() - self.shift if self.shift else tensor
        return tensor.T if self.transposed else tensor


def architecture(model_type: str) -> Architecture:
    """llama.cpp's architecture for transformers' `model_type`. PlanError if fewbit does not know one."""
    if model_type in TYPES:
        return TYPES[model_type]
    raise PlanError(
        f"no GGUF file can be made of a model of type {model_type!r}", f"Supported types: {', '.join(sorted(TYPES))}."
    )


def routes(config: Any) -> dict[str, Route]:
    """transformers' name -> route, for every tensor that a model of this config can have.

    config: transformers' config object. Of a tied pair, write the embedding.
    """
    arch = architecture(config.model_type)
    orders = _orders(config, arch)
    found = {}
    for theirs, ours in arch.model.items():
        for leaf in ("weight", "bias"):
            shift = arch.shift if ours == "output_norm" and leaf == "weight" else 0.0
            found[f"{theirs}.{leaf}"] = Route(f"{ours}.{leaf}", shift=shift)
    for layer in range(config.num_hidden_layers):
        for theirs, ours, expert in _modules(config, arch):
            norm, (sizes, axes) = "norm" in ours, orders.get(ours, ((), ()))
            for leaf in ("weight", "bias"):
                found[f"{arch.layers}.{layer}.{theirs}.{leaf}"] = Route(
                    f"blk.{layer}.{ours}.{leaf}",
                    expert=expert,
                    transposed=arch.transposed and leaf == "weight" and not norm,
                    shift=arch.shift if norm and leaf == "weight" else 0.0,
                    sizes=sizes,
                    axes=axes,
                )
    return found


def _modules(config: Any, arch: Architecture) -> Iterator[tuple[str, str, int | None]]:
    """Name of each module of a block, its name in the file, and the number of its expert."""
    for theirs, ours in arch.block.items():
        if "*" not in theirs:
            yield theirs, ours, None
            continue
        for expert in range(getattr(config, arch.experts)):
            yield theirs.replace("*", str(expert)), ours, expert


def names_of(routes: Mapping[str, Route]) -> dict[str, list[str]]:
    """Name in the file -> the names in the model; several for a tensor of experts, in their order."""
    found: dict[str, list[str]] = {}
    for name, route in routes.items():
        found.setdefault(route.name, []).append(name)
    return found


def _orders(config: Any, arch: Architecture) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Name in the file -> `sizes` and `axes` of its `Route`, where the order of rows differs."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if arch.permuted:
        halves = (0, 2, 1)
        return {"attn_q": ((heads, 2, width // 2), halves), "attn_k": ((kv, 2, width // 2), halves)}
    return {"attn_qkv": ((heads, 3, width), (1, 0, 2))} if arch.mixed else {}
