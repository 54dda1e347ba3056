"""What all block types share: one part, `blocks`, whose bytes are those of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import ALL, Codec, PartSpec
from fewbit.schemes.ggml import codebook
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
        return codebook.decode(self.name, held.reshape(-1, self.type.nbytes)).view(len(held), shape[1]).to(dtype)


@dataclass(frozen=True)
class ReadOnly(Blocks):
    """A block type that is read and not written."""

    name: str
