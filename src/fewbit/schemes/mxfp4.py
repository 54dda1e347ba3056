"""MXFP4: 4-bit floats (E2M1) in groups of 32 columns, each group with a power of two (E8M0) as its scale.

    w = e2m1(code) * 2^(e - 127),        e2m1: 0, 0.5, 1, 1.5, 2, 3, 4 or 6 with a sign

Fit without importance: the scale is a quarter of max|w|, rounded to a power of two, upwards from 1.75 times a power of
two. This is the rule of compressed-tensors. The OCP specification always rounds down; then the largest weights, up to 8
times the scale, are clipped to 6, and the mean squared error of normally distributed weights is 5.5 % higher. Fit with
importance h: the scale, its half, its double, or the power of two nearest to the best scale for the codes, whichever
has the least sum h (w - ŵ)². Codes are rounded to nearest, ties to the even code.

Layout:

    codes   uint8   [N, K / 2]      two codes a byte, the even column in the low half
    scale   uint8   [N, K / 32]     e, E8M0; 255 (NaN) is refused

    columns   0   1   2   3         30  31   32  33
    codes    |1,0 |3,2 |    ...    |31,30|  |33,32|  ...       (high half, low half)
    scale    |           e_0            |  |     e_1  ...

GGUF files have the same numbers as blocks (`to_blocks`): e, then the 16 bytes of its columns, in another order.

4.25 bits per weight. Source: OCP Microscaling Formats 1.0.

>>> w = torch.tensor([[6.0, -1.0, 0.3, 2.5] * 8])
>>> scheme = MXFP4.from_spec("mxfp4")
>>> codes, grids = scheme.nearest(w)
>>> codes[0, :4].tolist(), grids.decode(codes)[0, :4].tolist()
([7, 10, 1, 4], [6.0, -1.0, 0.5, 2.0])
>>> scheme.pack(codes, grids)["scale"].tolist(), hex(scheme.pack(codes, grids)["codes"][0, 0])
([[127]], '0xa7')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes import floats
from fewbit.schemes.base import ALL, Grids, Parts, PartSpec, Scheme, search_scales, usable
from fewbit.schemes.scaled import E2M1, ScaledGrids, spans

GROUP = 32
_UP = 1.75  # from this multiple of a power of two, the largest magnitude of a group counts as the next one


@register("schemes", "mxfp4")
@dataclass(frozen=True)
class MXFP4(Scheme):
    """`mxfp4`: groups of 32 columns."""

    group: int = GROUP

    family: ClassVar[str] = "mxfp4"
    examples: ClassVar[tuple[str, ...]] = ("mxfp4",)

    @classmethod
    def from_spec(cls, spec: str) -> MXFP4 | None:
        return cls() if spec == "mxfp4" else None

    def __str__(self) -> str:
        return "mxfp4"

    def with_group(self, group: int) -> Self:
        """This scheme: its groups have one size."""
        return self

    @property
    def trainable(self) -> str:
        return "its scales are powers of two"

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return f"groups of {GROUP} do not divide {shape[1]} columns" if shape[1] % GROUP else None

    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        n, k = shape
        return {"codes": PartSpec((n, k // 2), torch.uint8), "scale": PartSpec((n, k // GROUP), torch.uint8)}

    def flaw(self, parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
        return ("scale", "has NaN (the E8M0 code 255)") if bool((parts["scale"] == 255).any()) else None

    def fit(self, w: Tensor, importance: Tensor | None = None) -> ScaledGrids:
        significand, exponent = torch.frexp(spans(w, (1, GROUP)))  # the significand is in [0.5, 1), or 0
        exponent = exponent - 3 + (2 * significand >= _UP).to(exponent.dtype)
        exponent = torch.where(significand == 0, 0, exponent)
        scale = torch.ldexp(torch.ones_like(significand), exponent.clamp(-126, 127))
        grids = ScaledGrids(E2M1, (w.shape[0], w.shape[1]), (1, GROUP), scale)
        return grids if importance is None else self._search(w, grids, importance)

    def _search(self, w: Tensor, plain: ScaledGrids, importance: Tensor) -> ScaledGrids:
        """The best of the candidate scales of each group. It is never worse than the plain one."""

        def solve(scale: Tensor) -> Tensor:
            _, up, down = replace(plain, scale=scale).sums(w, importance)
            return _stored(usable(up / down, scale))

        tried = (_stored(plain.scale * by) for by in (1.0, 0.5, 2.0))
        scale = search_scales(tried, lambda scale: replace(plain, scale=scale).sums(w, importance)[0], solve)
        return replace(plain, scale=scale)

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> ScaledGrids:
        """Re-solve the scales one group at a time (`refit_scales`), each rounded to a power of two."""
        assert isinstance(grids, ScaledGrids)
        scale = grids.refitted(w, codes, hessian, ridge, lambda scale, _: _stored(scale))
        return replace(grids, scale=scale)

    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        assert isinstance(grids, ScaledGrids)
        return {"codes": floats.pack_pairs(codes), "scale": floats.to_e8m0(grids.scale)}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, ScaledGrids]:
        grids = ScaledGrids(E2M1, shape, (1, GROUP), floats.e8m0(parts["scale"]))
        return floats.unpack_pairs(parts["codes"]), grids

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        values = floats.e2m1(parts["codes"][rows])
        return floats.scaled(values, floats.e8m0(parts["scale"][rows]), (1, GROUP)).to(dtype)


def to_blocks(parts: Mapping[str, Tensor]) -> Tensor:
    """The blocks of a GGUF file, uint8 [N, K / 32 * 17], from the parts of a weight."""
    codes = floats.to_halves(parts["codes"]).unflatten(1, (-1, GROUP // 2))
    return torch.cat([parts["scale"].unsqueeze(-1), codes], -1).flatten(1)


def from_blocks(blocks: Tensor) -> dict[str, Tensor]:
    """The inverse of `to_blocks`."""
    each = blocks.unflatten(1, (-1, GROUP // 2 + 1))
    return {"codes": floats.from_halves(each[..., 1:].flatten(1)), "scale": each[..., 0].contiguous()}


def _stored(scale: Tensor) -> Tensor:
    """The power of two nearest to the scale in its logarithm, within the range of E8M0 and of normal float32."""
    exponent = scale.clamp(min=floats.E8M0_SMALLEST).log2().round_().clamp_(-126, 127)
    return torch.ldexp(torch.ones_like(scale), exponent.to(torch.int32))
