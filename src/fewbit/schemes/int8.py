"""LLM.int8(): 8-bit integers with one scale per row, bit for bit those of bitsandbytes.

Each row is divided by its largest magnitude, called SCB, and rounded to q in -127 ... 127. Then

    w = q * SCB * float32(1 / 127),        computed in float32 in that order.

The scheme also holds the `threshold` for activations at run time. A column of activations with a magnitude of at least
`threshold` is an outlier: it stays in 16 bits, and the other columns are rounded to 8 (`kernels/llm_int8.py`). Kernels
that do not round activations ignore the threshold.

Rounding to nearest (`nearest`) follows bitsandbytes: cast the weight to float16, then round q = w * (127 / SCB), ties
to even. A fit with importance h tries scales below the largest magnitude, then solves s = sum h w q / sum h q². Codes
are q + 128. q = -128 is allowed too: a plain fit never uses it, but a method may.

Layout:

    codes   int8    [N, K]    q
    scb     float32 [N]       SCB

Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339.

>>> w = torch.tensor([[0.5, -1.0, 0.25, 0.0]])
>>> scheme = Int8.from_spec("llm.int8")
>>> codes, grids = scheme.nearest(w)
>>> scheme.pack(codes, grids)["codes"].tolist()          # 63.5 is a tie, rounded to even; 31.75 becomes 32
[[64, -127, 32, 0]]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import (
    ALL,
    FP16_LARGEST,
    Columns,
    Grids,
    Parts,
    PartSpec,
    Scheme,
    check_values,
    chunk_rows,
    refit_scales,
    search_scales,
    shares,
    usable,
)

THRESHOLD = 6.0
_STEP = 1 / 127  # float64; rounded to float32 in products with float32 tensors


@dataclass(frozen=True)
class RowGrids(Grids):
    """SCB [N], float32 as stored. `dtype`: that of the decoded values."""

    scb: Tensor
    dtype: torch.dtype

    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        scale = _per_row(self.scb, w)
        steps = (w * torch.where(scale == 0, 0, 127 / scale)).round_().clamp_(-128, 127)
        return steps.add_(128).to(torch.uint8)

    def decode(self, codes: Tensor, columns: Columns = ALL) -> Tensor:
        return (codes.float() - 128).mul_(_per_row(self.scb, codes)).mul_(_STEP).to(self.dtype)


@register("schemes", "int8")
@dataclass(frozen=True)
class Int8(Scheme):
    """`llm.int8`: outlier threshold 6.0. `llm.int8-t4.5`: threshold 4.5. `llm.int8-t0`: no outlier columns."""

    group: int = 0
    threshold: float = THRESHOLD

    family: ClassVar[str] = "int8"
    examples: ClassVar[tuple[str, ...]] = ("llm.int8", "llm.int8-t4.5")

    @classmethod
    def from_spec(cls, spec: str) -> Int8 | None:
        match = re.fullmatch(r"llm\.int8(?:-t(\d+(?:\.\d+)?(?:e-?\d+)?))?", spec)
        return None if match is None else cls(threshold=THRESHOLD if match[1] is None else float(match[1]))

    def __str__(self) -> str:
        return "llm.int8" if self.threshold == THRESHOLD else f"llm.int8-t{self.threshold!r}".removesuffix(".0")

    def with_group(self, group: int) -> Self:
        """This scheme: its group is always the row."""
        return self

    @property
    def trainable(self) -> tuple[str, ...]:
        return ("scb",)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return None

    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        return {"codes": PartSpec(shape, torch.int8), "scb": PartSpec(shape[:1], torch.float32)}

    def fit(self, w: Tensor, importance: Tensor | None = None) -> RowGrids:
        check_values(w, FP16_LARGEST, "float16, to which LLM.int8() casts weights")
        top = w.abs().amax(1).to(torch.float16).float()
        grids = RowGrids(top, w.dtype if w.dtype == torch.float64 else torch.float32)
        return grids if importance is None else self._search(w, grids, importance)

    def _search(self, w: Tensor, plain: RowGrids, importance: Tensor) -> RowGrids:
        """The best of the candidate scales of each row. It is never worse than the plain one."""
        n, k = w.shape
        chunks = [
            _search_rows(w[rows].to(plain.dtype), importance.to(plain.dtype), plain.scb[rows])
            for rows in chunk_rows(n, k, 1 << 20)
        ]
        return RowGrids(torch.cat(chunks), plain.dtype)

    def nearest(self, w: Tensor) -> tuple[Tensor, RowGrids]:
        grids = self.fit(w)
        n, k = w.shape
        codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
        for rows in chunk_rows(n, k, 7 << 12):  # small enough for a core's cache
            codes[rows] = RowGrids(grids.scb[rows], grids.dtype).encode(w[rows].to(torch.float16).float())
        return codes, grids

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> RowGrids:
        """Re-solve the SCB of each row."""
        assert isinstance(grids, RowGrids)

        def level(columns: slice) -> Tensor:
            return (codes[:, columns].to(w.dtype) - 128) * _STEP

        error, scale = w - grids.decode(codes), grids.scb.to(w.dtype)[:, None]
        scale = refit_scales(error, level, scale, hessian, ridge, lambda scale, _: scale.float().to(w.dtype))
        return RowGrids(scale[:, 0].float(), grids.dtype)

    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        assert isinstance(grids, RowGrids)
        return {"codes": (codes ^ 128).view(torch.int8), "scb": grids.scb}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, RowGrids]:
        return parts["codes"].view(torch.uint8) ^ 128, RowGrids(parts["scb"], torch.float32)

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        return parts["codes"][rows].float().mul_(parts["scb"][rows, None]).mul_(_STEP).to(dtype)


def _per_row(scb: Tensor, x: Tensor) -> Tensor:
    """SCB [N] in a shape that broadcasts to x [N, ...]."""
    return scb.view(-1, *[1] * (x.dim() - 1))


def _search_rows(x: Tensor, h: Tensor, top: Tensor) -> Tensor:
    """SCB [N] for the rows `x` with largest magnitudes `top` [N] and column weights `h` [K]."""

    def error(scb: Tensor) -> Tensor:
        grids = RowGrids(scb, x.dtype)
        return ((grids.decode(grids.encode(x)) - x).square_() * h).sum(1).to(scb.dtype)

    def solve(scb: Tensor) -> Tensor:
        codes = RowGrids(scb, x.dtype).encode(x).to(x.dtype) - 128
        return usable(127 * (h * codes * x).sum(1) / (h * codes * codes).sum(1), scb).float()

    return search_scales((top * share for share in shares(0.9, 21)), error, solve)
