"""FP8: 8-bit floats (E4M3) with one scale for each row, for the whole tensor, or for blocks of 128 x 128.

    w = s * e4m3(code)

E4M3 has 3 bits of mantissa, so a value is off by at most 1/16 of itself, small or large (see `floats`). There is no
infinity, and no group may contain a code of NaN (0x7F, 0xFF).

Fit without importance: s = max|w| / 448, in float32, so that the largest value becomes the largest number. Where all
weights are 0, s = 1. Fit with importance h: try smaller scales, which clip, and larger ones, which move the steps
between numbers; then solve s in closed form for its codes, s = sum h w l / sum h l l with l the numbers. Codes are
rounded to nearest, ties to an even mantissa.

`fp8-tensor` has one scale for the tensor. Tensors that servers compute as one matrix need the same one, which `for_all`
chooses; it is not searched then. In `fp8-b128` the last blocks of rows and columns may be smaller.

Layout:

    codes   uint8   [N, K]                                   the bytes of float8_e4m3fn
    scale   float32 [N, 1]                                   fp8-row; fp8-tensor, equal in all rows
            float32 [ceil(N / 128), ceil(K / 128)]           fp8-b128

        K
      +---128---+---128---+--+          scale of fp8-b128
    N |  s_00   |  s_01   |  |          +------+------+------+
      |   128   |         |  |          | s_00 | s_01 | s_02 |
      +---------+---------+--+          +------+------+------+
      |  s_10   |  s_11   |  |          | s_10 | s_11 | s_12 |
      +---------+---------+--+          +------+------+------+

Sources: OCP 8-bit Floating Point 1.0; DeepSeek-V3, https://arxiv.org/abs/2412.19437, for the blocks; llm-compressor for
rows and tensors.

>>> w = torch.tensor([[448.0, -1.0, 17.0, 0.001]])
>>> scheme = FP8.from_spec("fp8-row")
>>> codes, grids = scheme.nearest(w)                    # s = 1
>>> [hex(code) for code in codes[0].tolist()], grids.decode(codes)[0].tolist()
(['0x7e', '0xb8', '0x58', '0x1'], [448.0, -1.0, 16.0, 0.001953125])
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import ClassVar, Self

from fewbit.errors import PlanError
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes import floats
from fewbit.schemes.base import ALL, Grids, Parts, PartSpec, Scheme, search_scales, usable
from fewbit.schemes.scaled import E4M3, Block, ScaledGrids, check_spans, chunks, spans, spans_of
from fewbit.system import native

_SIDE = 128  # of a block
_SMALLEST = 2.0**-126
# Shares of the plain scale that a search tries. Those above 1 use other steps between numbers, up to a whole octave.
_SHARES = (1.0, *(0.7 + 0.025 * i for i in range(12)), *(1.0625 + 0.0625 * i for i in range(15)))


@register("schemes", "fp8")
@dataclass(frozen=True)
class FP8(Scheme):
    """`fp8-row`: a scale for each row. `fp8-tensor`: one scale. `fp8-b128`: a scale for each block of 128 x 128.

    span: the largest magnitude for which the one scale of `fp8-tensor` is chosen, if other tensors have the same scale.
    """

    group: int
    kind: str
    span: float | None = field(default=None, compare=False, repr=False)

    family: ClassVar[str] = "fp8"
    rounds_stored: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = ("fp8-row", "fp8-tensor", "fp8-b128")

    @classmethod
    def from_spec(cls, spec: str) -> FP8 | None:
        match = re.fullmatch(r"fp8-(row|tensor|b(\d+))", spec)
        if match is None:
            return None
        if match[2] not in (None, str(_SIDE)):
            raise PlanError(f"scheme {spec!r}: blocks of {match[2]}", f"Blocks of FP8 have 128 x 128: fp8-b{_SIDE}.")
        return cls(group=_SIDE if match[2] else 0, kind=match[1])

    def __str__(self) -> str:
        return f"fp8-{self.kind}"

    def with_group(self, group: int) -> Self:
        """This scheme: its blocks have one size."""
        return self

    @property
    def trainable(self) -> tuple[str, ...]:
        return ("scale",)

    @property
    def shared(self) -> tuple[str, ...]:
        return ("scale",) if self.kind == "tensor" else ()

    def rounded(self, parts: Mapping[str, Tensor], floats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _stored(value) for name, value in floats.items()}

    @property
    def rows(self) -> int:
        return {"row": 1, "tensor": 0}.get(self.kind, _SIDE)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return None

    def block(self, shape: tuple[int, int]) -> Block:
        """The rows and columns that have one entry in `scale`."""
        return (_SIDE, _SIDE) if self.group else (1, max(1, shape[1]))

    def by_rows(self, shape: tuple[int, int]) -> bool:
        """True if the last block of rows is whole. Tensors with one scale each keep it, as a scale for each row."""
        return shape[0] % (self.rows or 1) == 0

    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        scales = tuple(-(-size // of) for size, of in zip(shape, self.block(shape), strict=True))
        return {"codes": PartSpec(shape, torch.uint8), "scale": PartSpec(scales, torch.float32)}

    def flaw(self, parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
        if floats.e4m3_has_nan(parts["codes"]):
            return "codes", "has NaN"
        return floats.flaw_of_scales("scale", parts["scale"])

    def for_all(self, weights: Iterable[Tensor]) -> Self:
        """`fp8-tensor` with the scale that the largest of all the weights needs. Others return themselves."""
        if self.kind != "tensor":
            return self
        span = floats.largest_magnitude(weights)
        return replace(self, span=span) if isfinite(span) else self  # `fit` refuses NaN, and its caller has the name

    def fit(self, w: Tensor, importance: Tensor | None = None) -> ScaledGrids:
        shape = (w.shape[0], w.shape[1])
        top = spans(w, self.block(shape))
        if self.kind == "tensor":
            top = torch.full_like(top, float(top.max()) if self.span is None else self.span)
        grids = self._grids(shape, _stored(top / floats.E4M3_LARGEST))
        if importance is None or self.span is not None:
            return grids
        return self._search(w, grids, importance)

    def nearest(self, w: Tensor) -> tuple[Tensor, ScaledGrids]:
        if self.kind == "tensor" or not w.numel():
            return super().nearest(w)  # type: ignore[return-value]
        shape, block = (w.shape[0], w.shape[1]), self.block((w.shape[0], w.shape[1]))
        if (found := native.fp8_codes(w, block)) is not None:
            return found[0], self._grids(shape, _stored(check_spans(found[1]) / floats.E4M3_LARGEST))
        # The scale of a few rows and then their codes, while these rows are in the cache.
        tops, scales = list[Tensor](), list[Tensor]()
        codes = torch.empty(shape, dtype=torch.uint8, device=w.device)
        for rows in chunks(w, block):
            x = w[rows].to(w.dtype if w.dtype == torch.float64 else torch.float32)
            tops.append(spans_of(x, block))
            scales.append(_stored(tops[-1] / floats.E4M3_LARGEST))
            codes[rows] = E4M3.nearest(floats.unscaled(x.clone() if x.dtype == w.dtype else x, scales[-1], block))
        check_spans(torch.cat(tops))
        return codes, self._grids(shape, torch.cat(scales))

    def _grids(self, shape: tuple[int, int], scale: Tensor) -> ScaledGrids:
        return ScaledGrids(E4M3, shape, self.block(shape), scale)

    def _search(self, w: Tensor, plain: ScaledGrids, importance: Tensor) -> ScaledGrids:
        """The best of the candidate scales of each row, block or tensor. It is never worse than the plain one."""

        def together(x: Tensor) -> Tensor:
            return x.sum(0, keepdim=True).expand_as(x) if self.kind == "tensor" else x

        def sums(scale: Tensor) -> list[Tensor]:
            return [together(each) for each in replace(plain, scale=scale).sums(w, importance)]

        def solve(scale: Tensor) -> Tensor:
            _, up, down = sums(scale)
            return _stored(usable(up / down, scale))

        tried = (_stored(plain.scale * share) for share in _SHARES)
        return replace(plain, scale=search_scales(tried, lambda scale: sums(scale)[0], solve).contiguous())

    def lost(self, w: Tensor, parts: Mapping[str, Tensor]) -> tuple[float, float, int]:
        found = native.fp8_lost(w, parts["codes"], parts["scale"], self.block((w.shape[0], w.shape[1])))
        if found is None:
            return super().lost(w, parts)
        error, whole, gone = found.tolist()
        return error, whole, int(gone)

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> ScaledGrids:
        """Re-solve the scale of each row, block or tensor. A scale that other tensors have too stays."""
        assert isinstance(grids, ScaledGrids)
        if self.span is not None:
            return grids
        if self.kind != "tensor":
            scale = grids.refitted(w, codes, hessian, ridge, lambda scale, _: _stored(scale))
            return replace(grids, scale=scale)
        whole = replace(grids, scale=grids.scale[:1], block=grids.shape)
        scale = whole.refitted(w, codes, hessian, ridge, lambda scale, _: _stored(scale))
        return replace(grids, scale=scale.expand_as(grids.scale).contiguous())

    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        assert isinstance(grids, ScaledGrids)
        return {"codes": codes, "scale": grids.scale.float()}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, ScaledGrids]:
        return parts["codes"], self._grids(shape, parts["scale"])

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        begin, end, _ = rows.indices(shape[0])
        values, block = floats.e4m3(parts["codes"][begin:end]), self.block(shape)
        scale = parts["scale"][begin // block[0] : -(-end // block[0])]
        return floats.scaled(values, scale, block, begin).to(dtype)


def _stored(scale: Tensor) -> Tensor:
    """The scale rounded to float32, in its own dtype. It is positive; 0 becomes 1."""
    rounded = scale.to(torch.float32).to(scale.dtype)
    return torch.where(scale == 0, 1.0, rounded.clamp(_SMALLEST, floats.FLOAT32_LARGEST))
