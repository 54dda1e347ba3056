"""The block types of ggml with a codebook that can be written: iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s.

2.06 to 3.44 bits per weight. A few vectors of 8 or 4 magnitudes, with signs and scales, stand for all weights: see
`vectors` for the values and `vector_search` for the scales. Parts and bytes are those of the other block types.

>>> scheme = IQ.from_spec("iq2_xxs")
>>> w = 7.75 * torch.tensor([1.0, 1, 1, 1, 1, -1, 1, -1]).repeat(32)[None]  # 31 times a power of two
>>> codes, grids = scheme.nearest(w)
>>> torch.equal(scheme.dequantize(scheme.pack(codes, grids), (1, 256), torch.float32), w)
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import FP16_LARGEST, Grids, Parts, Scheme, check_values
from fewbit.schemes.ggml import grids as blockwise
from fewbit.schemes.ggml import vectors
from fewbit.schemes.ggml.codec import OfCodebook
from fewbit.schemes.ggml.vector_search import fit, floored
from fewbit.schemes.ggml.vectors import VECTORS, VectorGrids


@register("schemes", "iq")
@dataclass(frozen=True)
class IQ(OfCodebook, Scheme):
    """`iq2_xxs`, `iq3_s` ...: the name of a block type with a codebook. A group is a block of 256 columns."""

    group: int
    name: str

    family: ClassVar[str] = "iq"
    examples: ClassVar[tuple[str, ...]] = tuple(VECTORS)

    @classmethod
    def from_spec(cls, spec: str) -> IQ | None:
        return cls(group=VECTORS[spec].columns, name=spec) if spec in VECTORS else None

    @property
    def vector(self) -> int:
        return VECTORS[self.name].vector

    def fit(self, w: Tensor, importance: Tensor | None = None) -> VectorGrids:
        check_values(w, FP16_LARGEST, "fp16 scales")
        grids = self._fitted(w, None if importance is None else importance.unsqueeze(0))
        return grids if importance is None else replace(grids, importance=floored(importance.float()))

    def nearest(self, w: Tensor) -> tuple[Tensor, VectorGrids]:
        """Codes and grids from a search with equal weights for all columns."""
        check_values(w, FP16_LARGEST, "fp16 scales")
        grids = self._fitted(w, torch.ones(1, w.shape[1], device=w.device, dtype=torch.float32))
        return grids.encode(w), grids

    def _fitted(self, w: Tensor, importance: Tensor | None) -> VectorGrids:
        d, t = fit(VECTORS[self.name], w, importance)
        dtype = w.dtype if w.dtype == torch.float64 else torch.float32
        return VectorGrids(self.name, d.to(dtype), None, t.to(torch.int16), None)

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> VectorGrids:
        """Re-solve the scales of sub-blocks and d block by block. The error does not rise in any row."""
        assert isinstance(grids, VectorGrids)
        return blockwise.refit(w, codes, grids, hessian, ridge)

    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        assert isinstance(grids, VectorGrids)
        return {"blocks": vectors.pack(codes, grids)}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, VectorGrids]:
        return vectors.unpack(self.name, parts["blocks"])
