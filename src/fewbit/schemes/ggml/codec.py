"""The base class of all block types, and the codec of those that can only be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import ALL, Codec, PartSpec
from fewbit.schemes.ggml import codebook
from fewbit.schemes.ggml.table import BLOCK_TYPES, BlockType


class Blocks(Codec):
    """The block type `name`. Its one part, `blocks` uint8 [N, K / columns * bytes], has the bytes of a GGUF file."""

    name: str

    @property
    def type(self) -> BlockType:
        """The row of this type in the table of block types."""
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
    """A block type that can be read but not written."""

    name: str
