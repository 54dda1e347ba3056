"""What all block types share: one part, `blocks`, whose bytes are those of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.schemes.base import ALL, Codec, PartSpec
from fewbit.schemes.ggml import codebook, layout
from fewbit.schemes.ggml.table import BLOCK_TYPES, BlockType


class Blocks(Codec):
    """A block type by `name`. `blocks` is uint8 [N, K / columns * bytes], byte for byte as a GGUF file has it."""

    name: str

    @property
    def type(self) -> BlockType:
        """Its number in a GGUF file, columns and bytes of a block."""
        return BLOCK_TYPES[self.name]

    def __str__(self) -> str:
        return self.name

    @property
    def payload(self) -> str:
        return "blocks"

    def why_not(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % self.type.columns:
            return f"blocks of {self.type.columns} do not divide {shape[1]} columns"
        return None

    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        n, k = shape
        return {"blocks": PartSpec((n, k // self.type.columns * self.type.nbytes), torch.uint8)}

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        held = parts["blocks"][rows]
        blocks = held.reshape(-1, self.type.nbytes)
        found = values(self.name, blocks) if self.name in layout.LAYOUTS else codebook.decode(self.name, blocks)
        return found.view(len(held), shape[1]).to(dtype)


@dataclass(frozen=True)
class ReadOnly(Blocks):
    """A block type that is read and not written."""

    name: str


def values(name: str, blocks: Tensor) -> Tensor:
    """float32 [B, columns] of blocks uint8 [B, bytes] of a type that has a layout."""
    kind, fields = layout.LAYOUTS[name], layout.unpack(name, blocks)
    out: Tensor = level(kind, fields.codes).unflatten(1, (kind.subs, kind.sub))
    scale = fields.d if fields.sc is None else fields.d * fields.sc
    out *= scale.unsqueeze(-1)
    if fields.dmin is not None:
        out -= (fields.dmin if fields.m is None else fields.dmin * fields.m).unsqueeze(-1)
    return out.flatten(1)


def level(kind: layout.Layout, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The level of each code."""
    if kind.nonlinear:
        table = torch.tensor(layout.NONLINEAR, dtype=dtype, device=codes.device)
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    return codes.to(dtype).sub_(kind.zero) if kind.zero else codes.to(dtype)
