"""Names of tensors in a GGUF file, and the conversions of their values, for each architecture.

transformers' names are those of the modules (`Skeleton.name_of`, `named_parameters`). Besides the name, these things
can differ. Only the order of columns affects quantization: a plan quantizes the columns in the file's order. A
conversion moves whole blocks, which must lie within the runs of columns that keep their neighbours.

    rows        Llama's q and k: transformers rotates the halves of a head (i with i + d/2), llama.cpp neighbours (2i
                with 2i + 1). So row 2i + j of a head in the file is row i + j d/2 of the model's weight.
                GLM-4.1V's q and k are the reverse: row i + j r/2 of a head in the file is row 2i + j of the model's
                weight, where RoPE turns the first r rows of a head
                GPT-NeoX's qkv: a file has q of all heads, then k, then v; the model has q, k and v of each head
    transposed  GPT-2's Conv1D stores [K, N]; a file stores [N, K], as for every linear
    columns     Qwen 3.5's value heads: the model has those of the first key head, then those of the second; a file
                has the first of each key head, then the second. These are rows of the projections before attention
                and columns of the one after it
    shift       Gemma's norms multiply by 1 + w; a file stores this sum
    lists       Apertus's activation has four numbers in each layer; a file has them as keys
    split       the file has the tensor in pieces (pieces.py); `name` is then the name of the whole

    route = routes(config)["model.layers.0.self_attn.q_proj.weight"]     # KeyError: no file contains it
    route.name, route.rows                                               # "blk.0.attn_q.weight", int64 [N] or None
    route.to_file(tensor), route.from_file(tensor)                       # both directions, for unquantized weights
    route.blocks_to_file(blocks, 32)                                     # for quantized weights [N, K]

A row of blocks encodes one row of the weight, so permuting rows is exact for every type.
Source: gguf-py's name tables and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbit.errors import PlanError
from fewbit.models.gguf import positions
from fewbit.models.gguf.architecture import Architecture, Cut
from fewbit.models.gguf.architectures import MISSING, REFUSED, TYPES, of_config
from fewbit.models.gguf.pieces import Listed, Share, Split

Order = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and axes


@dataclass(frozen=True)
class Route:
    """The name of a model's tensor in the file, and its conversion.

    expert: the number of the expert; the file has the tensors of all experts of a layer as one, [experts, ...].
    heights: the rows of each matrix of the model of which one of the file consists, one below the other; `expert` is
    then the number of this one. Empty for other tensors.
    height: rows that the file has; the last of them are 0, and the model has none such. 0 for other tensors.
    matrix: the rows of what the model has as a vector; 0 for other tensors.
    led: whether the model's tensor has two dimensions of 1 before those of the file's.
    listed: of a number that is no tensor of the file: the file's key, its place in the list there, and its shape.
    order: the rows of the model's weight from row `first` on, as an array of these sizes, are in the file's order if
    its axes are permuted to these axes. columns: the same for columns. Empty if the order is the same.
    still: after the rows of `order` of each place of its first axis, such as a head, this many rows keep their order.
    """

    name: str
    expert: int | None = None
    transposed: bool = False
    squeezed: bool = False
    shift: float = 0.0
    negative_exp: bool = False
    centered: bool = False
    heights: tuple[int, ...] = ()
    order: Order = ((), ())
    first: int = 0
    still: int = 0
    columns: Order = ((), ())
    split: Split | None = None
    matrix: int = 0
    led: bool = False
    height: int = 0
    listed: Listed | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors of the file: several if it has this one in pieces."""
        return (self.name,) if self.split is None else self.split.names

    @property
    def together(self) -> int:
        """How many matrices of an expert, or of a layer, are one matrix of the file."""
        if self.heights:
            return len(self.heights)
        return self.split.matrices // self.split.heads if self.split is not None and self.split.matrices else 1

    @property
    def rows(self) -> Tensor | None:
        """Row i of the file is row `rows[i]` of the model's weight [N, K]; None if the order is the same."""
        if not self.order[0]:
            return None
        start = torch.arange(self.first, dtype=torch.int64, device="cpu")
        moved = _permuted(self.order)
        if self.still:
            heads = torch.arange(self.order[0][0], dtype=torch.int64, device="cpu")[:, None]
            moved = moved.view(len(heads), -1)
            rows = torch.arange(moved.shape[1], moved.shape[1] + self.still, dtype=torch.int64, device="cpu")
            width = moved.shape[1] + self.still
            moved = torch.cat([moved + heads * self.still, heads * width + rows], 1).flatten()
        return torch.cat([start, self.first + moved])

    @property
    def rows_back(self) -> Tensor | None:
        """Row i of the model's weight is row `rows_back[i]` of the file; None if the order is the same."""
        return None if self.rows is None else self.rows.argsort()

    @property
    def is_exact(self) -> bool:
        """Whether the file holds the model's own values."""
        return not (self.shift or self.negative_exp or self.centered)

    @property
    def run(self) -> int:
        """How many columns keep their neighbours in the file; 0 if all do. A block must lie within such a run."""
        return self.columns[0][-1] if self.columns[0] else 0

    @property
    def column_order(self) -> Tensor | None:
        """Column i of the file is column `column_order[i]` of the model's weight; None if the order is the same."""
        return _permuted(self.columns) if self.columns[0] else None

    def to_file(self, tensor: Tensor) -> Tensor:
        """Convert a tensor of the model to the file's layout and values."""
        tensor = tensor.T if self.transposed else tensor.squeeze(1) if self.squeezed else tensor
        tensor = tensor[0, 0] if self.led else tensor
        tensor = tensor.view(self.matrix, -1) if self.matrix else tensor
        tensor = tensor if self.rows is None else tensor[self.rows]
        tensor = tensor[:, _permuted(self.columns)] if self.columns[0] else tensor
        tensor = pad(tensor, (0, 0, 0, self.height - len(tensor))) if self.height else tensor
        tensor = -tensor.double().exp().float() if self.negative_exp else tensor
        tensor = tensor - tensor.mean() if self.centered else tensor
        return tensor.float() + self.shift if self.shift else tensor

    def from_file(self, tensor: Tensor) -> Tensor:
        """Convert a tensor of the file to the model's layout and values."""
        tensor = tensor if self.rows_back is None else tensor[self.rows_back]
        return self.from_rows(tensor)

    def from_rows(self, tensor: Tensor) -> Tensor:
        """The same for rows that are in the model's order already."""
        tensor = tensor.float() - self.shift if self.shift else tensor
        tensor = (-tensor.double()).log().float() if self.negative_exp else tensor
        tensor = tensor[:, _permuted(self.columns).argsort()] if self.columns[0] else tensor
        tensor = tensor.flatten() if self.matrix else tensor[None, None] if self.led else tensor
        return tensor.T if self.transposed else tensor.unsqueeze(1) if self.squeezed else tensor

    def part_of(self, whole: Tensor) -> Tensor:
        """What a tensor of the file, or its blocks, has of this one of the model."""
        if self.expert is None or not self.heights:
            return whole if self.expert is None else whole[self.expert]
        start = sum(self.heights[: self.expert])
        return whole[start : start + self.heights[self.expert]]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor of the file, or its blocks, of what it has of each of the model."""
        if self.expert is None:
            return parts[0]
        return torch.cat(list(parts)) if self.heights else torch.stack(list(parts))

    def shape_of_all(self, shape: Sequence[int], count: int) -> tuple[int, ...]:
        """The shape of the whole tensor of the file. shape: that of its part. count: the number of the parts."""
        if self.expert is None:
            return tuple(shape)
        return (sum(self.heights), *shape[1:]) if self.heights else (count, *shape)

    def blocks_to_file(self, blocks: Tensor, columns: int) -> Tensor:
        """The blocks of a weight [N, K], uint8 [N, bytes], in the file's order.

        columns: those of a block; 0 if the blocks of each row are in the file's order already.
        """
        blocks = blocks if self.rows is None else blocks[self.rows]
        blocks = pad(blocks, (0, 0, 0, self.height - len(blocks))) if self.height else blocks
        return self._blocks(blocks, columns, back=False) if columns else blocks

    def blocks_from_file(self, blocks: Tensor, columns: int) -> Tensor:
        """The blocks of a weight, uint8 [N, bytes], in the model's order. columns: those of a block."""
        blocks = blocks if self.rows_back is None else blocks[self.rows_back]
        return self._blocks(blocks, columns, back=True)

    def _blocks(self, blocks: Tensor, columns: int, *, back: bool) -> Tensor:
        if not self.columns[0]:
            return blocks
        sizes, axes = self.columns
        order = _permuted(((*sizes[:-1], sizes[-1] // columns), axes))
        order = order.argsort() if back else order
        return blocks.view(len(blocks), len(order), -1)[:, order].flatten(1)

    def shape_in_file(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a tensor of the model in the file."""
        kept = (self.height, *shape[1:]) if self.height else tuple(shape)
        if self.matrix:
            return self.matrix, kept[0] // self.matrix
        if self.led:
            return kept[2:]
        return kept[::-1] if self.transposed else (kept[0], *kept[2:]) if self.squeezed else kept

    def shape_in_model(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a tensor of the file in the model."""
        kept = tuple(shape)
        if self.matrix:
            return (prod(kept),)
        if self.led:
            return 1, 1, *kept
        return kept[::-1] if self.transposed else (kept[0], 1, *kept[1:]) if self.squeezed else kept


def _permuted(order: Order) -> Tensor:
    """Place i of the file is place `_permuted(order)[i]` of the model, int64."""
    sizes, axes = order
    places = torch.arange(prod(sizes), dtype=torch.int64, device="cpu")
    return places.reshape(sizes).permute(axes).flatten()


def architecture(config: Any) -> Architecture:
    """llama.cpp's architecture for a model of transformers' `config`. PlanError if fewbit does not know one."""
    if (found := of_config(config)) is not None:
        return found
    if (why := (REFUSED | MISSING).get(config.model_type)) is not None:
        raise PlanError(
            f"no GGUF file can be made of a model of type {config.model_type!r}: {why}",
            "Use a plan that makes a folder.",
        )
    if rows := TYPES.get(config.model_type):
        raise PlanError(
            f"no GGUF file can be made of this model of type {config.model_type!r}",
            f"llama.cpp runs those with {' or with '.join(_chosen(row) for row in rows)}.",
        )
    raise PlanError(
        f"no GGUF file can be made of a model of type {config.model_type!r}",
        f"Supported types: {', '.join(sorted(TYPES))}.",
    )


def _chosen(row: Architecture) -> str:
    """What models of a row have."""
    return ", ".join(
        f"{key} of {' and '.join(sorted(value))}" if isinstance(value, frozenset) else f"{key} = {value}"
        for key, value in row.chosen.items()
    )


def routes(config: Any) -> dict[str, Route]:
    """transformers' name -> route, for every tensor that a model of this config can have.

    config: transformers' config object. Of a tied pair, write the embedding.
    """
    arch = architecture(config)
    orders, cuts = _orders(config, arch), {ours: _parts(config, cut) for ours, cut in arch.cut.items()}
    matrices = {ours: getattr(config, key) for ours, key in arch.matrices.items()}
    heights = {
        ours: tuple(prod(getattr(config, key) for key in each) for each in parts)
        for ours, parts in arch.stacked.items()
    }
    found = {}
    groups: dict[str, list[str]] = {}
    for theirs, ours in arch.model.items():
        groups.setdefault(ours, []).append(theirs)
    for ours, several in groups.items():
        for place, theirs in enumerate(several):
            for leaf in ("weight", "bias"):
                found[f"{theirs}.{leaf}"] = Route(
                    f"{ours}.{leaf}",
                    expert=place if len(several) > 1 else None,
                    shift=arch.shift if ours == "output_norm" and leaf == "weight" else 0.0,
                    height=config.vocab_size if ours in arch.padded else 0,
                )
    found |= {theirs: Route(ours) for theirs, ours in arch.outside.items()}
    for layer, block in enumerate(arch.blocks(config)):
        for theirs, ours, expert in _modules(config, arch):
            norm = "norm" in ours
            for leaf in ("weight", "bias"):
                found[f"{block}.{theirs}.{leaf}"] = Route(
                    f"blk.{layer}.{ours}.{leaf}",
                    expert=expert,
                    heights=heights.get(ours, ()),
                    transposed=arch.transposed and leaf == "weight" and not norm,
                    squeezed=ours in arch.squeezed and leaf == "weight",
                    shift=arch.shift if norm and leaf == "weight" and ours not in arch.unshifted else 0.0,
                    split=_split(layer, *cuts[ours]) if ours in cuts and leaf == "weight" else None,
                    matrix=matrices.get(ours, 0) if leaf == "weight" else 0,
                    **orders.get(ours, {}),
                )
        for theirs, ours in arch.parameters.items():
            found[f"{block}.{theirs}"] = Route(
                f"blk.{layer}.{ours}",
                negative_exp=ours in arch.negative_exp,
                led=ours in arch.led,
                centered=ours in arch.centered,
                matrix=matrices.get(ours, 0),
                **orders.get(ours, {}),
            )
        for theirs, (key, shape) in arch.lists.items():
            listed = Listed(key, layer, shape)
            found[f"{block}.{theirs}"] = Route(f"blk.{layer}.{key}", listed=listed)
    return found


def _modules(config: Any, arch: Architecture) -> Iterator[tuple[str, str, int | None]]:
    """Name of each module of a block, its name in the file, and its number in a tensor of all experts."""
    groups: dict[str, list[str]] = {}
    for theirs, ours in arch.block.items():
        groups.setdefault(ours, []).append(theirs)
    for ours, several in groups.items():
        if "*" not in several[0]:
            stacked = ours in arch.stacked
            yield from ((theirs, ours, place if stacked else None) for place, theirs in enumerate(several))
            continue
        places = product(range(getattr(config, arch.experts)), several)
        yield from ((theirs.replace("*", str(expert)), ours, i) for i, (expert, theirs) in enumerate(places))


def splits_of(routes: Mapping[str, Route]) -> dict[str, Split]:
    """The name of each tensor that a file has in pieces -> its pieces."""
    return {route.name: route.split for route in routes.values() if route.split is not None}


def _parts(config: Any, cut: Cut) -> tuple[int, tuple[Share, ...], int]:
    """The heads of a matrix, its pieces, named as in every block, and the number of matrices that it is."""
    heads = getattr(config, cut.heads) if cut.heads else 1
    shares = []
    for piece in cut.pieces:
        sizes = tuple(prod(getattr(config, key) for key in part) // heads for part in piece.parts)
        sizes = (sum(sizes),) if piece.by_head else sizes
        shares.append(Share(f"{piece.name}.weight", sizes, piece.by_head, piece.transposed, piece.convolution))
    return heads, tuple(shares), heads * cut.matrices


def _split(layer: int, heads: int, shares: Sequence[Share], matrices: int) -> Split:
    return Split(heads, tuple(replace(share, name=f"blk.{layer}.{share.name}") for share in shares), matrices)


def listed_of(routes: Mapping[str, Route]) -> dict[str, Listed]:
    """The name of each number that a file has in the list of a key -> where it is."""
    return {route.name: route.listed for route in routes.values() if route.listed is not None}


def lists_of(routes: Mapping[str, Route], numbers: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keys with lists of numbers of each layer, float32. numbers: by their names in the model, in any order."""
    found: dict[str, dict[int, float]] = {}
    for name, number in numbers.items():
        if (listed := routes[name].listed) is not None:
            found.setdefault(listed.key, {})[listed.place] = float(number)
    return {key: np.array([values[i] for i in range(len(values))], np.float32) for key, values in found.items()}


def names_of(routes: Mapping[str, Route]) -> dict[str, list[str]]:
    """Name in the file -> the names in the model; several for a tensor of experts, in their order."""
    found: dict[str, list[str]] = {}
    for name, route in routes.items():
        found.setdefault(route.name, []).append(name)
    return found


def _orders(config: Any, arch: Architecture) -> dict[str, dict[str, Any]]:
    """Name in the file -> fields of its `Route`, where the order of rows or columns differs."""
    if arch.tiled:
        return _tiled(config)
    if not arch.permuted and not arch.mixed and not arch.unwoven:
        return {}
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if arch.permuted:
        halves = (0, 2, 1)
        return {
            "attn_q": {"order": ((heads, 2, width // 2), halves)},
            "attn_k": {"order": ((kv, 2, width // 2), halves)},
        }
    if arch.unwoven:
        turned, pairs = positions.columns(positions.of_config(config), width, arch), (0, 2, 1)
        return {
            "attn_q": {"order": ((heads, turned // 2, 2), pairs), "still": width - turned},
            "attn_k": {"order": ((kv, turned // 2, 2), pairs), "still": width - turned},
        }
    return {"attn_qkv": {"order": ((heads, 3, width), (1, 0, 2))}}


def _tiled(config: Any) -> dict[str, dict[str, Any]]:
    """The same for linear attention whose value heads llama.cpp has tiled: the first of every key head comes first."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if keys == values:
        return {}
    single: Order = ((keys, values // keys, 1), (1, 0, 2))
    whole: Order = ((keys, values // keys, config.linear_value_head_dim), (1, 0, 2))
    after = {"order": whole, "first": 2 * keys * config.linear_key_head_dim}  # queries and keys come before values
    each = {key: {"order": single} for key in ("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt.bias")}
    return {
        **each,
        "attn_qkv": after,
        "ssm_conv1d": after,
        "attn_gate": {"order": whole},
        "ssm_out": {"columns": whole},
    }
