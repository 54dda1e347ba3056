"""Integers of 2 to 8 bits with a scale and a zero point for each group of columns, symmetric or asymmetric.

Each row is cut into groups of columns. A group has one fp16 scale s and one integer zero point z. Code c means

    w = s * (c - z),        c in 0 ... 2^b - 1.

Symmetric: z = 2^(b-1) everywhere and is not stored. The codes then reach one step further down than up; s may be
negative, so that this extra step can go to the longer tail. Asymmetric: z is stored in b bits.

Fit without importance: the grid spans the group. [min, max] is widened to include 0.

    s = max|w| / (2^(b-1) - 0.5)              symmetric
    s = (max - min) / (2^b - 1)               asymmetric

Fit with importance h: try shrunken ranges (and, if symmetric, both signs of s), keep the one of least sum h (w - ŵ)²,
then solve s in closed form for its codes:

    s = sum h w (c - z) / sum h (c - z)²

Asymmetric with 2 or 3 bits: also try z + 1 and z - 1, each with s solved for the codes that it chooses; the error is
then on average within 1 % of the best scale and zero point. Scales are rounded to fp16 before any code is chosen. Codes
are rounded to nearest, ties to even.

With the suffix `-bf16`, scales are rounded to bfloat16 instead, and stay between 2^-17 and 65280, where fp16 holds
every bfloat16 number exactly. They are stored as fp16 all the same, so kernels see no difference. A server that loads
scales in the dtype of a bfloat16 model (vLLM) then rounds nothing.

Layout:

    codes   uint8   [N, ceil(K b / 8)]             one bit stream per row (see `bits`)
    scale   float16 [N, K / group]                 also with `-bf16`
    zero    uint8   [N, ceil(K / group * b / 8)]   one bit stream per row; asymmetric only

>>> w = torch.tensor([[-3.5, -1.0, 0.2, 3.0] * 4])
>>> scheme = Affine.from_spec("int3-g16-sym")
>>> grids = scheme.fit(w)                       # s = 3.5 / (4 - 0.5) = 1
>>> grids.encode(w)[0, :4].tolist(), grids.decode(grids.encode(w))[0, :4].tolist()
([0, 3, 4, 7], [-4.0, -1.0, 0.0, 3.0])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fewbit.errors import PlanError
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes import bits
from fewbit.schemes.base import (
    ALL,
    FP16_LARGEST,
    FP16_SMALLEST,
    Columns,
    Grids,
    Parts,
    PartSpec,
    Scheme,
    Uniform,
    check_values,
    chunk_rows,
    refit_scales,
    search_scales,
    shares,
    usable,
)

BF16_SMALLEST, BF16_LARGEST = 2.0**-17, 65280.0  # between them fp16 holds every bfloat16 number exactly

# Entries of a weight times candidates for its scales that are tried at a time. On a GPU, a small weight needs few
# launches then. On a CPU, one candidate at a time stays in the cache.
_AT_ONCE = {"cpu": 1}
# Most bits with which zero points are searched too. At 4 bits that lowers the weighted error by 1 %, but raises the KL
# divergence of the embedded model by 1 % (benchmarks/results/2026-11-encoders.md).
_JOINT = 3
_WIDER = (1.05, 1.1)  # shares of the range that are tried beside the narrower ones where zero points are searched
_CHUNK = {"cpu": 1 << 20}  # entries searched at a time; on a GPU more, so that kernel launches cost little


@dataclass(frozen=True)
class AffineGrids(Grids):
    """Scales [N, groups], rounded as stored but held as float32 or float64, and zero points [N, groups]."""

    bits: int
    group: int
    scale: Tensor
    zero: Tensor

    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        x, scale, zero = self._aligned(w, columns)
        codes = (x / scale).round_().add_(zero).clamp_(0, 2**self.bits - 1)
        return codes.to(torch.uint8).reshape(w.shape)

    def decode(self, codes: Tensor, columns: Columns = ALL) -> Tensor:
        x, scale, zero = self._aligned(codes, columns)
        return (x - zero).mul_(scale).reshape(codes.shape)

    def plain(self) -> Uniform:
        return Uniform(self.scale, self.zero, None, 2**self.bits - 1, self.group)

    def moved(self, floats: Mapping[str, Tensor]) -> Uniform:
        return replace(self.plain(), scale=floats["scale"])

    def _aligned(self, x: Tensor, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
        """`x`, and the scale and zero of its columns, in shapes that broadcast."""
        if isinstance(columns, int):
            return x, self.scale[:, columns // self.group], self.zero[:, columns // self.group]
        if isinstance(columns, slice) and columns == ALL:  # avoids an [N, K] tensor of scales
            return x.unflatten(1, (-1, self.group)), self.scale.unsqueeze(-1), self.zero.unsqueeze(-1)
        if isinstance(columns, slice):
            every = torch.arange(self.scale.shape[1] * self.group, device=self.scale.device, dtype=torch.int64)
            columns = every[columns]
        index = columns // self.group
        return x, self.scale[:, index], self.zero[:, index]


@register("schemes", "affine")
@dataclass(frozen=True)
class Affine(Scheme):
    """`int4-g128-sym`: 4 bits, groups of 128 columns, symmetric. `int3-row`: 3 bits, one group a row, asymmetric.

    `int4-g128-sym-bf16`: the same, with scales that are bfloat16 numbers.
    """

    group: int
    bits: int
    symmetric: bool
    bf16: bool = False

    family: ClassVar[str] = "affine"
    examples: ClassVar[tuple[str, ...]] = (
        *("int4-g128", "int4-g128-sym", "int3-g64-sym", "int8-row-sym"),
        *("int2-g16", "int5-g64", "int6-g32-sym", "int7-row", "int4-g128-sym-bf16"),
    )

    @classmethod
    def from_spec(cls, spec: str) -> Affine | None:
        match = re.fullmatch(r"int(\d+)-(g\d+|row)(-sym)?(-bf16)?", spec)
        if match is None:
            return None
        width, group = int(match[1]), 0 if match[2] == "row" else int(match[2][1:])
        if not 2 <= width <= 8:
            raise PlanError(f"scheme {spec!r}: {width} bits", "Integers of 2 to 8 bits exist: int2 ... int8.")
        if group and not 16 <= group <= 1024:
            raise PlanError(f"scheme {spec!r}: groups of {group}", "Groups of 16 to 1024 columns exist, or row.")
        return cls(group=group, bits=width, symmetric=match[3] is not None, bf16=match[4] is not None)

    def __str__(self) -> str:
        group = f"g{self.group}" if self.group else "row"
        return f"int{self.bits}-{group}" + ("-sym" if self.symmetric else "") + ("-bf16" if self.bf16 else "")

    def widths(self, shape: tuple[int, int]) -> list[Scheme]:
        """2, 3, 4, 5, 6 and 8 bits; up to 4 bits also with a quarter of the group, if that is at least 32."""
        plain = [replace(self, bits=width) for width in (2, 3, 4, 5, 6, 8)]
        small = [replace(each, group=self.group // 4) for each in plain if each.bits <= 4 and self.group >= 128]
        return [*plain, *small, *([self] if self not in plain else [])]

    @property
    def trainable(self) -> tuple[str, ...]:
        return ("scale",)  # zero points are integers

    def rounded(self, parts: Mapping[str, Tensor], floats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._stored(value.clamp(-FP16_LARGEST, FP16_LARGEST)) for name, value in floats.items()}

    def why_not(self, shape: tuple[int, int]) -> str | None:
        if self.group and shape[1] % self.group:
            return f"groups of {self.group} do not divide {shape[1]} columns"
        return None

    def streams(self, k: int) -> Mapping[str, tuple[int, int]]:
        return {"codes": (self.bits, k)} | ({} if self.symmetric else {"zero": (self.bits, self.groups(k))})

    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        n, k = shape
        specs = {
            "codes": PartSpec((n, bits.packed_bytes(k, self.bits)), torch.uint8),
            "scale": PartSpec((n, self.groups(k)), torch.float16),
        }
        if not self.symmetric:
            specs["zero"] = PartSpec((n, bits.packed_bytes(self.groups(k), self.bits)), torch.uint8)
        return specs

    def fit(self, w: Tensor, importance: Tensor | None = None) -> AffineGrids:
        dtype = w.dtype if w.dtype == torch.float64 else torch.float32
        n, k = w.shape
        group = self.group or k
        check_values(w, FP16_LARGEST, "fp16 scales")
        h = None if importance is None else importance.to(dtype).reshape(-1, group)
        fitted = [
            self._fit_rows(w[rows].to(dtype).reshape(-1, k // group, group), h)
            for rows in chunk_rows(n, k, _CHUNK.get(w.device.type, 1 << 24))
        ]
        scale, zero = (torch.cat(part) for part in zip(*fitted, strict=True))
        return AffineGrids(self.bits, group, scale, zero)

    def _fit_rows(self, w: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and zero [rows, groups] for w [rows, groups, group] with column weights h [groups, group]."""
        low, high = self._range(w)
        if h is None:
            return self._grid(low, high)
        joint = not self.symmetric and self.bits <= _JOINT
        ranges = [*shares(0.4, 13), *(_WIDER if joint else ())]
        share = torch.tensor(ranges, dtype=w.dtype, device=w.device)[:, None, None]
        scale, zero = self._grid(low * share, high * share)
        if self.symmetric:  # codes reach one step further below zero than above
            scale, zero = torch.stack([scale, -scale], 1).flatten(0, 1), zero.repeat_interleave(2, 0)
        tried = torch.stack([scale, zero])  # [2, candidates, rows, groups]
        at_once = max(1, _AT_ONCE.get(w.device.type, 1 << 26) // max(1, w.numel()))

        def solve(grid: Tensor) -> Tensor:
            scale, zero = grid
            offsets = self._codes(w, scale, zero) - zero.unsqueeze(-1)
            weighted = h * offsets
            solved = (weighted * w).sum(-1) / (weighted * offsets).sum(-1)
            return torch.stack([self._stored(usable(solved, scale)), zero])

        def moved(by: int) -> Callable[[Tensor], Tensor]:
            """The step that moves zero points, and solves the scales for the codes that they then choose."""
            return lambda grid: solve(torch.stack([grid[0], (grid[1] + by).clamp_(0, 2**self.bits - 1)]))

        candidates = (self._best(w, h, some) for some in tried.split(at_once, 1))
        steps = [solve, moved(1), moved(-1)] if joint else [solve]
        scale, zero = search_scales(candidates, lambda grid: self._error(w, h, *grid), *steps)
        return scale, zero

    def _best(self, w: Tensor, h: Tensor, grids: Tensor) -> Tensor:
        """Of `grids` [2, candidates, rows, groups], the one with the smallest error for each group."""
        if grids.shape[1] == 1:
            return grids[:, 0]
        best = self._error(w, h, *grids).argmin(0)
        return grids.gather(1, best.expand(2, 1, *best.shape)).squeeze(1)

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            top = w.abs().amax(-1)
            return -top, top
        return w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, rounded as stored, and zero point of the grid that spans [low, high]."""
        top = 2**self.bits - 1
        scale = self._stored((high - low) / top)
        if self.symmetric:
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        return scale, (-low / scale).round_().clamp_(0, top)

    def _codes(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (w / scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, 2**self.bits - 1)

    def _error(self, w: Tensor, h: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        values = self._codes(w, scale, zero).sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
        return values.sub_(w).square_().mul_(h).sum(-1)

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> AffineGrids:
        """Re-solve the scales one group at a time (`refit_scales`), each rounded as stored. Zero points stay."""
        assert isinstance(grids, AffineGrids)

        def levels(columns: slice) -> Tensor:
            return codes[:, columns] - grids.zero[:, columns.start // grids.group].unsqueeze(1)

        error = w - grids.decode(codes)
        scale = refit_scales(error, levels, grids.scale, hessian, ridge, lambda scale, _: self._stored(scale))
        return AffineGrids(grids.bits, grids.group, scale, grids.zero)

    def _stored(self, scale: Tensor) -> Tensor:
        """The scale rounded as a file stores it, in its own dtype. It never becomes zero."""
        if self.bf16:
            rounded = scale.abs().clamp_(BF16_SMALLEST, BF16_LARGEST).to(torch.bfloat16)
        else:
            rounded = scale.abs().clamp_(min=FP16_SMALLEST).to(torch.float16)
        return torch.copysign(rounded.to(scale.dtype), scale)

    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        assert isinstance(grids, AffineGrids)
        parts = {"codes": bits.pack(codes, self.bits), "scale": grids.scale.to(torch.float16)}
        if not self.symmetric:
            parts["zero"] = bits.pack(grids.zero.to(torch.uint8), self.bits)
        return parts

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, AffineGrids]:
        return bits.unpack(parts["codes"], self.bits, shape[1]), self._grids(parts, shape, ALL)

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        codes = bits.unpack(parts["codes"][rows], self.bits, shape[1])
        grids = self._grids(parts, shape, rows)
        offsets: Tensor = codes.unflatten(1, (-1, grids.group)) - grids.zero.unsqueeze(-1)
        return offsets.mul_(grids.scale.unsqueeze(-1)).flatten(1).to(dtype)

    def _grids(self, parts: Mapping[str, Tensor], shape: tuple[int, int], rows: slice) -> AffineGrids:
        scale = parts["scale"][rows].float()
        if self.symmetric:
            zero = torch.full_like(scale, 2 ** (self.bits - 1))
        else:
            zero = bits.unpack(parts["zero"][rows], self.bits, self.groups(shape[1])).float()
        return AffineGrids(self.bits, self.group or shape[1], scale, zero)
