"""The scheme for all block types of ggml that can be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fewbit.errors import PlanError
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import ALL, FP16_LARGEST, Grids, Parts, Scheme, check_values, chunk_rows
from fewbit.schemes.ggml import grids as blockwise
from fewbit.schemes.ggml.codec import Blocks
from fewbit.schemes.ggml.digits import DIGITS
from fewbit.schemes.ggml.grids import BlockGrids
from fewbit.schemes.ggml.layout import LAYOUTS
from fewbit.schemes.ggml.search import BlockScales, fit
from fewbit.schemes.ggml.table import BLOCK_TYPES
from fewbit.schemes.ggml.vectors import VECTORS

# Entries searched at a time. On a CPU they fit its cache.
_CHUNK = {"cpu": 1 << 16}


@register("schemes", "ggml")
@dataclass(frozen=True)
class GGML(Blocks, Scheme):
    """`q4_k`, `q8_0` ...: the name of a block type. A group is a block, whose columns share d."""

    group: int
    name: str

    family: ClassVar[str] = "ggml"
    examples: ClassVar[tuple[str, ...]] = tuple(LAYOUTS)

    @classmethod
    def from_spec(cls, spec: str) -> GGML | None:
        if spec in LAYOUTS:
            return cls(group=LAYOUTS[spec].columns, name=spec)
        if spec in BLOCK_TYPES:
            raise PlanError(
                f"scheme {spec!r} can be read, not written",
                f"Can be written: {', '.join([*LAYOUTS, *VECTORS, *DIGITS])}.",
            )
        return None

    def __str__(self) -> str:
        return self.name

    @property
    def run(self) -> int:
        return LAYOUTS[self.name].run

    @property
    def trainable(self) -> tuple[str, ...]:
        return ("d", "dmin") if LAYOUTS[self.name].affine else ("d",)

    def floats(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return blockwise.units(self.name, parts["blocks"])

    def values(
        self,
        parts: Mapping[str, Tensor],
        shape: tuple[int, int],
        floats: Mapping[str, Tensor],
        rows: slice = ALL,
    ) -> Tensor:
        codes, grids = blockwise.unpack(self.name, parts["blocks"][rows])
        dmin = floats["dmin"][rows] if "dmin" in floats else None
        return replace(grids, d=floats["d"][rows], dmin=dmin).decode(codes)

    def with_floats(self, parts: Mapping[str, Tensor], floats: Mapping[str, Tensor]) -> Parts:
        return {"blocks": blockwise.with_units(self.name, parts["blocks"], floats)}

    def fit(self, w: Tensor, importance: Tensor | None = None) -> BlockGrids:
        check_values(w, FP16_LARGEST, "fp16 scales")
        return _concatenated([self._fit_rows(w[rows], importance) for rows in self._chunks(w)])

    def nearest(self, w: Tensor) -> tuple[Tensor, BlockGrids]:
        """Codes and grids from a search with equal weights for all columns."""
        check_values(w, FP16_LARGEST, "fp16 scales")
        codes, fitted = torch.empty(w.shape, dtype=torch.uint8, device=w.device), []
        equal = torch.ones(w.shape[1], device=w.device, dtype=torch.float32)
        for rows in self._chunks(w):
            fitted.append(self._fit_rows(w[rows], equal))
            codes[rows] = fitted[-1].encode(w[rows])
        return codes, _concatenated(fitted)

    def _chunks(self, w: Tensor) -> list[slice]:
        return chunk_rows(w.shape[0], w.shape[1], _CHUNK.get(w.device.type, 1 << 24))

    def _fit_rows(self, w: Tensor, importance: Tensor | None) -> BlockGrids:
        kind = LAYOUTS[self.name]
        weights = None if importance is None else importance.expand_as(w).reshape(-1, kind.columns)
        return self.grids(fit(kind, w.reshape(-1, kind.columns), weights), w)

    def grids(self, scales: BlockScales, w: Tensor) -> BlockGrids:
        """The grids of `w` from the scales of its blocks, which are listed row by row."""
        kind, dtype = LAYOUTS[self.name], w.dtype if w.dtype == torch.float64 else torch.float32

        def by_row(x: Tensor) -> Tensor:
            return x.to(dtype).view(len(w), -1)

        def by_sub(x: Tensor | None) -> Tensor | None:
            return None if x is None or not kind.super else x.T.to(torch.int16).reshape(len(w), -1)

        dmin = None if scales.dmin is None else by_row(scales.dmin)
        return BlockGrids(self.name, by_row(scales.d), dmin, by_sub(scales.sc), by_sub(scales.m))

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> BlockGrids:
        """Re-solve sub-scales, d and dmin block by block. The error does not rise in any row."""
        assert isinstance(grids, BlockGrids)
        return blockwise.refit(w, codes, grids, hessian, ridge)

    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        assert isinstance(grids, BlockGrids)
        return {"blocks": blockwise.pack(codes, grids)}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, BlockGrids]:
        return blockwise.unpack(self.name, parts["blocks"])

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        codes, grids = blockwise.unpack(self.name, parts["blocks"][rows])
        return grids.decode(codes).to(dtype)


def _concatenated(parts: list[BlockGrids]) -> BlockGrids:
    """One object from the grids of consecutive rows."""

    def concatenate(tensors: list[Tensor | None]) -> Tensor | None:
        present = [x for x in tensors if x is not None]
        return torch.cat(present) if present else None

    dmin, sc, m = (concatenate([getattr(part, key) for part in parts]) for key in ("dmin", "sc", "m"))
    return BlockGrids(parts[0].name, torch.cat([part.d for part in parts]), dmin, sc, m)
