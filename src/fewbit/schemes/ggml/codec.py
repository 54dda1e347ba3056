"""The base class of all block types, that of types with a codebook, and the codec of those that can only be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import ALL, Codec, Parts, PartSpec, Scheme, parse
from fewbit.schemes.ggml import codebook
from fewbit.schemes.ggml.layout import LAYOUTS
from fewbit.schemes.ggml.search import half
from fewbit.schemes.ggml.table import BLOCK_TYPES, BlockType
from fewbit.schemes.ggml.vectors import VECTORS


class Blocks(Codec):
    """The block type `name`. Its one part, `blocks` uint8 [N, K / columns * bytes], has the bytes of a GGUF file."""

    name: str

    @property
    def type(self) -> BlockType:
        """The row of this type in the table of block types."""
        return BLOCK_TYPES[self.name]

    def __str__(self) -> str:
        return self.name

    def widths(self, shape: tuple[int, int]) -> list[Scheme]:
        """Types of 256 columns and q8_0. If 256 does not divide the columns, the types of 32, among them q8_0.

        Types with a codebook (iq2, iq3) only in the place of one: on a GPU no kernel of fewbit is fast with them.
        """
        large, written = shape[1] % 256 == 0, {**LAYOUTS, **VECTORS} if self.name in VECTORS else LAYOUTS
        return [parse(name) for name, kind in written.items() if (kind.columns == 256) == large or name == "q8_0"]

    def with_group(self, group: int) -> Self:
        """This scheme: the block size is fixed by its type."""
        return self

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

    def rounded(self, parts: Mapping[str, Tensor], floats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: half(value) for name, value in floats.items()}

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        held = parts["blocks"][rows]
        return codebook.decode(self.name, held.reshape(-1, self.type.nbytes)).view(len(held), shape[1]).to(dtype)


class OfCodebook(Blocks):
    """A block type that the module `codebook` decodes. d, the scale of a block, is the only float of most."""

    @property
    def trainable(self) -> tuple[str, ...] | str:
        return ("d",) if codebook.has_scale(self.name) else "its scales are powers of two"

    def floats(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = parts["blocks"]
        if not codebook.has_scale(self.name):
            return {}
        return {"d": codebook.scale_of(self.name, blocks.reshape(-1, self.type.nbytes)).view(len(blocks), -1)}

    def values(
        self,
        parts: Mapping[str, Tensor],
        shape: tuple[int, int],
        floats: Mapping[str, Tensor],
        rows: slice = ALL,
    ) -> Tensor:
        if not floats:
            return self.dequantize(parts, shape, torch.float32, rows)
        blocks, d = parts["blocks"][rows], floats["d"][rows]
        unit = self.with_floats({"blocks": blocks}, {"d": torch.ones_like(d)})
        out: Tensor = self.dequantize(unit, shape, torch.float32).unflatten(1, (d.shape[1], -1)) * d.unsqueeze(-1)
        return out.flatten(1)

    def with_floats(self, parts: Mapping[str, Tensor], floats: Mapping[str, Tensor]) -> Parts:
        blocks = parts["blocks"]
        if not floats:
            return {"blocks": blocks}
        made = codebook.with_scale(self.name, blocks.reshape(-1, self.type.nbytes), floats["d"].reshape(-1, 1))
        return {"blocks": made.view(blocks.shape)}


@dataclass(frozen=True)
class ReadOnly(OfCodebook):
    """A block type that can be read but not written."""

    name: str
