"""NVFP4: 4-bit floats (E2M1) in groups of 16 columns with an 8-bit float (E4M3) as scale, and one scale for the tensor.

    w = e2m1(code) * (e4m3(scale) / global)         nvfp4: compressed-tensors' files, in which the global scale divides
    w = e2m1(code) * (e4m3(scale) * global)         nvfp4-mul: ModelOpt's files, in which it multiplies

both computed in float32 in that order. The global scale moves the scales of the groups into the range of E4M3. The one
that fewbit chooses is a power of two, with which the largest group's scale lies in (224, 448]. Its reciprocal is exact,
so a weight has the same values in both kinds of files. Weights that servers compute as one matrix need the same global
scale; `for_all` chooses it for the largest of them.

Fit without importance: a group's scale is max|w| / 6, rounded to E4M3, but at least the smallest above 0. Fit with
importance h: that scale, the 4 numbers below it (which clip), the 7 above it (with other steps between the values), and
the E4M3 number nearest to the best scale for the codes, whichever has the least sum h (w - ŵ)². The global scale stays.
With h = 1 this lowers the mean squared error of normally distributed weights by 27 %. Codes are rounded to nearest,
ties to the even code.

Layout:

    codes    uint8   [N, K / 2]      two codes a byte, the even column in the low half
    scale    uint8   [N, K / 16]     the bytes of float8_e4m3fn; NaN and negative numbers are refused
    global   float32 [N, 1]          equal in all rows, so that weights can be stacked by rows; files store one number

    columns   0   1   2   3         14  15   16  17
    codes    |1,0 |3,2 |    ...    |15,14|  |17,16|  ...       (high half, low half)
    scale    |           s_0            |  |     s_1  ...

4.5 bits per weight, and 32 bits per row in memory. Sources: NVIDIA, "Introducing NVFP4"; compressed-tensors 0.20;
ModelOpt 0.47.

>>> w = torch.tensor([[6.0, -1.0, 0.3, 2.5] * 4])
>>> scheme = NVFP4.from_spec("nvfp4")
>>> codes, grids = scheme.nearest(w)
>>> codes[0, :4].tolist(), grids.decode(codes)[0, :4].tolist()
([7, 10, 1, 4], [6.0, -1.0, 0.5, 2.0])
>>> parts = scheme.pack(codes, grids)                       # 1 = 256 / 256; the code of 256 is 0x78
>>> hex(parts["scale"][0, 0]), parts["global"].tolist()
('0x78', [[256.0]])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import frexp, isfinite
from typing import ClassVar, Self

from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes import floats
from fewbit.schemes.base import ALL, Grids, Parts, PartSpec, Scheme, search_scales, usable
from fewbit.schemes.scaled import E2M1, ScaledGrids, spans

GROUP = 16
_TOP = floats.E2M1_LARGEST * floats.E4M3_LARGEST  # the largest number times the largest scale
_LARGEST_CODE = 0x7E  # of 448; codes of positive numbers rise with them, so code + 1 is the next number
_STEPS = (0, *range(-4, 0), *range(1, 8))


@dataclass(frozen=True)
class NVFP4Grids(ScaledGrids):
    """`scale` is the product or quotient of `local` uint8 [N, K / 16] and `whole` float32 [N, 1], which files store."""

    local: Tensor
    whole: Tensor


@register("schemes", "nvfp4")
@dataclass(frozen=True)
class NVFP4(Scheme):
    """`nvfp4`: the global scale divides. `nvfp4-mul`: it multiplies.

    span: the largest magnitude for which the global scale is chosen, if other weights have the same global scale.
    """

    group: int = GROUP
    divides: bool = True
    span: float | None = field(default=None, compare=False, repr=False)

    family: ClassVar[str] = "nvfp4"
    examples: ClassVar[tuple[str, ...]] = ("nvfp4",)

    @classmethod
    def from_spec(cls, spec: str) -> NVFP4 | None:
        return cls(divides=spec == "nvfp4") if spec in ("nvfp4", "nvfp4-mul") else None

    def __str__(self) -> str:
        return "nvfp4" if self.divides else "nvfp4-mul"

    def with_group(self, group: int) -> Self:
        """This scheme: its groups have one size."""
        return self

    @property
    def trainable(self) -> tuple[str, ...]:
        return ("global",)  # the scales of groups are 8-bit numbers

    @property
    def shared(self) -> tuple[str, ...]:
        return ("global",)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return f"groups of {GROUP} do not divide {shape[1]} columns" if shape[1] % GROUP else None

    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        n, k = shape
        return {
            "codes": PartSpec((n, k // 2), torch.uint8),
            "scale": PartSpec((n, k // GROUP), torch.uint8),
            "global": PartSpec((n, 1), torch.float32),
        }

    def flaw(self, parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
        if floats.e4m3_has_nan(parts["scale"]):
            return "scale", "has NaN"
        if bool((parts["scale"] > _LARGEST_CODE).any()):
            return "scale", "has negative numbers"
        return floats.flaw_of_scales("global", parts["global"])

    def for_all(self, weights: Iterable[Tensor]) -> Self:
        """The scheme with the global scale that the largest of all the weights needs."""
        span = floats.largest_magnitude(weights)
        return replace(self, span=span) if isfinite(span) else self  # `fit` refuses NaN, and its caller has the name

    def fit(self, w: Tensor, importance: Tensor | None = None) -> NVFP4Grids:
        top = spans(w, (1, GROUP))
        power = _power(float(top.max()) if self.span is None else self.span)
        # In float64, in which neither quotient overflows or vanishes.
        local = _stored((top.double() / floats.E2M1_LARGEST / 2.0**power).to(top.dtype))
        factor = 2.0 ** (-power if self.divides else power)
        whole = torch.full((len(w), 1), factor, dtype=torch.float32, device=w.device)
        grids = self._grids((w.shape[0], w.shape[1]), local, whole, top.dtype)
        return grids if importance is None else self._search(w, grids, importance)

    def _grids(self, shape: tuple[int, int], local: Tensor, whole: Tensor, dtype: torch.dtype) -> NVFP4Grids:
        numbers = floats.e4m3(local)
        scale = numbers / whole if self.divides else numbers * whole
        return NVFP4Grids(E2M1, shape, (1, GROUP), scale.to(dtype), local, whole)

    def _local(self, scale: Tensor, whole: Tensor) -> Tensor:
        """The codes of the E4M3 scales of groups whose scales are `scale`, or as near as possible."""
        return _stored(scale * whole if self.divides else scale / whole)

    def _search(self, w: Tensor, plain: NVFP4Grids, importance: Tensor) -> NVFP4Grids:
        """The best of the candidate scales of each group. It is never worse than the plain one."""

        def of(local: Tensor) -> NVFP4Grids:
            return self._grids(plain.shape, local, plain.whole, plain.scale.dtype)

        def solve(local: Tensor) -> Tensor:
            grids = of(local)
            _, up, down = grids.sums(w, importance)
            return self._local(usable(up / down, grids.scale), plain.whole)

        tried = ((plain.local.int() + step).clamp_(1, _LARGEST_CODE).to(torch.uint8) for step in _STEPS)
        return of(search_scales(tried, lambda local: of(local).sums(w, importance)[0], solve))

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> NVFP4Grids:
        """Re-solve the scales one group at a time (`refit_scales`), each rounded as stored. The global scale stays."""
        assert isinstance(grids, NVFP4Grids)
        whole = grids.whole[:, 0]

        def stored(scale: Tensor, _: int) -> Tensor:
            numbers = floats.e4m3(self._local(scale, whole))
            return (numbers / whole if self.divides else numbers * whole).to(scale.dtype)

        scale = grids.refitted(w, codes, hessian, ridge, stored)
        return self._grids(grids.shape, self._local(scale, grids.whole), grids.whole, scale.dtype)

    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        assert isinstance(grids, NVFP4Grids)
        return {"codes": floats.pack_pairs(codes), "scale": grids.local, "global": grids.whole}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, NVFP4Grids]:
        grids = self._grids(shape, parts["scale"], parts["global"], torch.float32)
        return floats.unpack_pairs(parts["codes"]), grids

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        numbers, whole = floats.e4m3(parts["scale"][rows]), parts["global"][rows]
        scale = numbers.div_(whole) if self.divides else numbers.mul_(whole)
        return floats.scaled(floats.e2m1(parts["codes"][rows]), scale, (1, GROUP)).to(dtype)


def _power(span: float) -> int:
    """The power p for which the largest scale of a group, span / 6 / 2^p, lies in (224, 448]."""
    significand, power = frexp(span / _TOP)  # span / _TOP is in [2^(power - 1), 2^power)
    power -= significand == 0.5
    return min(max(power, -126), 126) if span else 0


def _stored(scale: Tensor) -> Tensor:
    """The codes of the E4M3 numbers nearest to the scales. They are above 0."""
    return floats.to_e4m3(scale.clamp(min=floats.E4M3_SMALLEST))
