"""NF4 and FP4: sixteen fixed levels times one scale for each block, bit for bit those of bitsandbytes.

The weight is flattened row by row and cut into blocks of B entries, B a power of two from 2^5 to 2^12. The last block
may be short. Each block is divided by its largest magnitude (absmax), and each entry becomes the nearest of sixteen
levels. NF4's levels are quantiles of a normal distribution, so normally distributed weights use all of them equally
often. FP4's levels are the values of a 4-bit float. Double quantization (`-dq`) also quantizes the scales: it subtracts
their mean (the offset) and stores the rest in 8 bits, in blocks of 256. Code c in block b means

    w = s_b * level[c],        s_b = absmax_b                                     single quantization
                               s_b = map[absmax_b] * nested_(b // 256) + offset   double quantization

Rounding to nearest (`nearest`) follows bitsandbytes on a CPU:

- Codes are chosen by absmax as it is *before* it is rounded to 8 bits. All other methods see the stored grid (`fit`).
- Ties go to the lower level.
- Entries of a whole block are multiplied by 1 / absmax. Those of a short block are divided by absmax.
- FP4 has two zeros, codes 0 and 8. Tiny positive numbers get code 8.
- (absmax - offset) / nested is rounded to one of 65536 steps before it gets its 8-bit code. `fit` does so too.

The CUDA code of bitsandbytes skips that last step and gives code 8 to tiny negative numbers; it decodes to the same
values. A fit with importance h tries scales below absmax, then solves s = sum h w l / sum h l² with l the levels. Each
scale is rounded as stored before its error is measured; the offset and the nested maxima stay those of the plain fit.

Layout:

    codes    uint8   [ceil(N K / 2)]         two codes a byte, the first in the high nibble; an odd end is padded with
                                             the code of zero
    absmax   float32 [blocks]                or uint8 [blocks] with double quantization, and then also
    nested   float32 [ceil(blocks / 256)]    the largest |absmax - offset| of 256 blocks
    offset   float32 [1]                     the mean of absmax
    map      float32 [256]                   the values of the 8-bit codes, as the file gives them

Sources: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, for NF4; Dettmers et al. 2021,
https://arxiv.org/abs/2110.02861, for the 8-bit map.

>>> w = torch.tensor([[2.0, -2.0, 0.3, 0.0] * 8])
>>> scheme = FourBit.from_spec("nf4-b32")
>>> codes, grids = scheme.nearest(w)             # one block of absmax 2; the level nearest to 0.3 / 2 is 0.1609, code 9
>>> codes[0, :4].tolist(), [round(v, 4) for v in grids.decode(codes)[0, :4].tolist()]
([15, 0, 9, 7], [2.0, -2.0, 0.3219, 0.0])
>>> scheme.pack(codes, grids)["codes"][:2].tolist() == [15 << 4 | 0, 9 << 4 | 7]
True
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import ClassVar

from fewbit.errors import PlanError
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import (
    ALL,
    Columns,
    Grids,
    Parts,
    PartSpec,
    Scheme,
    Uneven,
    check_values,
    refit_scales,
    search_scales,
    shares,
    usable,
)
from fewbit.system import ambient

NESTED = 256  # scales in a block of double quantization
BLOCKS = tuple(2**p for p in range(5, 13))
_SMALLEST = 1e-38  # bitsandbytes raises a smaller absmax to this before it divides
# Entries processed at a time. On a CPU they stay in a core's cache, and PyTorch does not split operations on fewer than
# 32768 entries over threads. That is faster here: with another process on the second core, waiting for that core's
# thread took ten times as long as the work. A GPU gets more entries, so that kernel launches cost little.
_CHUNK = {"cpu": 7 << 12}
_BINS = 4096  # of the lookup that finds the nearest level; no bin holds two midpoints

# By code. NF4: the quantiles published with the paper. FP4: the floats sign * 2^e * (1 + m/2), with the two subnormals
# of each sign, divided by 12.
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


@cache
@ambient.defaults()
def levels(kind: str, device: torch.device) -> Tensor:
    """The sixteen levels by code, float32 [16]."""
    return torch.tensor(LEVELS[kind], dtype=torch.float32, device=device) + 0.0  # no negative zero


@cache
@ambient.defaults()
def dynamic_map() -> Tensor:
    """The values of the 8-bit codes, float32 [256], rising: 0, 1, and for i = 0 ... 6 the numbers ±10^(i-6) times each
    midpoint of the 2^i equal parts of [0.1, 1]."""
    rising = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        rising.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(rising)
    return torch.cat([-positive, torch.tensor([0.0, 1.0], device="cpu", dtype=torch.float32), positive]).sort().values


@cache
@ambient.defaults()
def _lookup(kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each bin of [-1, 1]: how many midpoints lie below it, and the next one; the midpoints; the codes in rising
    order of their levels."""
    by_code = levels(kind, torch.device("cpu"))
    order = torch.argsort(by_code, stable=True)
    rising = by_code[order]
    midpoints = (rising[:-1] + rising[1:]) / 2
    below = torch.bucketize(torch.arange(_BINS + 1, device="cpu", dtype=torch.int64), _bins(midpoints), out_int32=True)
    following = torch.cat([midpoints, torch.tensor([torch.inf], device="cpu", dtype=torch.float32)])[below]
    return below.to(device, torch.uint8), following.to(device), midpoints.to(device), order.to(device, torch.uint8)


def _bins(x: Tensor) -> Tensor:
    """The bin of each entry of x, which lies in [-1, 1] up to one unit in the last place. No midpoint is on an edge."""
    middle = torch.full((), _BINS / 2, dtype=x.dtype, device=x.device)
    return torch.add(middle, x, alpha=_BINS // 2 - 1).to(torch.int32)


def nearest_level(x: Tensor, kind: str) -> Tensor:
    """Codes (uint8) of the levels nearest to x [n], which lies in [-1, 1] up to one unit in the last place.

    Ties go to the lower level. A tiny positive x gets FP4's second zero, code 8. A table gives the number of midpoints
    below the bin of x, and one comparison decides about the only midpoint that the bin may hold. This takes a third of
    the time of a binary search.
    """
    below, following, midpoints, order = _lookup(kind, x.device)
    if x.dtype == torch.float64:
        rank = torch.bucketize(x, midpoints.double(), out_int32=True).to(torch.uint8)
    else:
        bins = _bins(x)
        rank = below.index_select(0, bins).add_(x > following.index_select(0, bins))
    return rank if kind == "nf4" else order.index_select(0, rank.int())


@cache
@ambient.defaults()
def _pairs(kind: str, device: torch.device) -> Tensor:
    """The two levels of each byte, viewed as one 8-byte number so that one lookup fetches both. float64 [256]."""
    byte = torch.arange(256, device=device, dtype=torch.int64)
    return torch.stack([levels(kind, device)[byte >> 4], levels(kind, device)[byte & 15]], 1).view(torch.float64)[:, 0]


def _scale_blocks(flat: Tensor, first: int, block: int, scale: Tensor, *, divide: bool = False) -> Tensor:
    """Multiply (or divide) entries by the `scale` of their block, in place.

    flat: the entries from `first` on of a flattened tensor that is cut into blocks. scale: one for each block that
    they touch. Division by a scale of 0 gives 0.
    """
    if divide:
        scale = torch.where(scale == 0, torch.inf, scale)
    operate = torch.Tensor.div_ if divide else torch.Tensor.mul_
    head = min(-first % block, flat.numel())
    whole, skip = (flat.numel() - head) // block, 1 if head else 0
    if head:
        operate(flat[:head], scale[0])
    operate(flat[head : head + whole * block].view(whole, block), scale[skip : skip + whole, None])
    if head + whole * block < flat.numel():
        operate(flat[head + whole * block :], scale[skip + whole])
    return flat


def _chunks(flat: Tensor, block: int) -> list[tuple[slice, slice]]:
    """Pairs of slices (entries, blocks) that cut `flat` into runs of whole blocks. The last block may be short."""
    total, step = len(flat), max(1, _CHUNK.get(flat.device.type, 1 << 24) // block)
    blocks = -(-total // block)
    starts = range(0, blocks, step)
    return [(slice(b * block, min((b + step) * block, total)), slice(b, min(b + step, blocks))) for b in starts]


@dataclass(frozen=True)
class Nested:
    """Double quantization of scales: s = map[code] * maximum of 256 blocks + offset, in float32 in that order.

    maxima float32 [ceil(blocks / 256)], offset float32 [1], map float32 [256].
    """

    maxima: Tensor
    offset: Tensor
    map: Tensor

    @classmethod
    def of(cls, absmax: Tensor) -> Nested:
        """Maxima and offset that bitsandbytes uses for the scales `absmax` [blocks]."""
        offset = absmax.mean()
        padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED))
        return cls(padded.view(-1, NESTED).abs().amax(1), offset.view(1), dynamic_map().to(absmax.device))

    def encode(self, scale: Tensor, index: Tensor | None = None) -> Tensor:
        """Codes (uint8) of the scales of all blocks, or of blocks `index`, as bitsandbytes chooses them on a CPU."""
        top = self._maxima(len(scale), index)
        x = ((scale - self.offset) * top.reciprocal()).clamp(-1, 1)
        # In float64, to round product and sum once, as the fused multiply-add of bitsandbytes does.
        steps = (((x + 1) * 0.5).double() * 65535 + 0.5).float().to(torch.int32)
        midpoints = (self.map[:-1] + self.map[1:]) * 0.5
        codes = torch.bucketize(steps.float() * 2.0 / 65535 - 1, midpoints, out_int32=True).to(torch.uint8)
        return codes.masked_fill_(top == 0, 0)

    def decode(self, codes: Tensor, first: int = 0) -> Tensor:
        """Scales of the blocks from `first` on, from their codes."""
        maxima = self.maxima[first // NESTED :]
        return _scale_blocks(self.map.index_select(0, codes.int()), first, NESTED, maxima).add_(self.offset)

    def stored(self, scale: Tensor, index: Tensor) -> Tensor:
        """The scales of the blocks `index`, rounded to the nearest that can be stored."""
        codes = self.encode(scale.float(), index)
        return (self.map[codes.int()] * self._maxima(len(codes), index) + self.offset).to(scale.dtype)

    def _maxima(self, count: int, index: Tensor | None) -> Tensor:
        return self.maxima.repeat_interleave(NESTED)[:count] if index is None else self.maxima[index // NESTED]


@dataclass(frozen=True)
class BlockGrids(Grids):
    """The stored grid of each block.

    scale [blocks]: the scales as a reader decodes them. absmax [blocks]: the same as the file holds them, float32, or
    uint8 codes of `nested` with double quantization.
    """

    kind: str
    block: int
    shape: tuple[int, int]
    absmax: Tensor
    nested: Nested | None
    scale: Tensor

    @classmethod
    def stored(cls, like: FourBit, shape: tuple[int, int], scale: Tensor, nested: Nested | None) -> BlockGrids:
        """Grids with the scales [blocks] rounded to the nearest that can be stored."""
        absmax = scale.float() if nested is None else nested.encode(scale.float())
        decoded = absmax if nested is None else nested.decode(absmax)
        return cls(like.kind, like.group, shape, absmax, nested, decoded.to(scale.dtype))

    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        if isinstance(columns, slice) and columns == ALL:
            flat, codes = w.reshape(-1), torch.empty(w.numel(), dtype=torch.uint8, device=w.device)
            for entries, blocks in _chunks(flat, self.block):
                x = _scale_blocks(
                    flat[entries].to(self.scale, copy=True), 0, self.block, self.scale[blocks], divide=True
                )
                codes[entries] = nearest_level(x.clamp_(-1, 1), self.kind)
        else:
            scale = self._scale_of(columns)
            x = w / torch.where(scale == 0, torch.inf, scale)
            codes = nearest_level(x.reshape(-1).clamp_(-1, 1), self.kind)
        if self.kind == "fp4":
            codes.masked_fill_(codes == 8, 0)  # both zeros are the same value
        return codes.reshape(w.shape)

    def decode(self, codes: Tensor, columns: Columns = ALL) -> Tensor:
        values = levels(self.kind, codes.device).to(self.scale).index_select(0, codes.reshape(-1).int())
        if isinstance(columns, slice) and columns == ALL:
            return _scale_blocks(values, 0, self.block, self.scale).reshape(codes.shape)
        return values.reshape(codes.shape).mul_(self._scale_of(columns))

    def plain(self) -> Uneven | None:
        if self.shape[1] % self.block:
            return None
        return Uneven.of(self.scale.view(self.shape[0], -1), LEVELS[self.kind], self.block)

    def _scale_of(self, columns: Columns) -> Tensor:
        """Scales of some columns, [N, columns], or [N] for one. Where B does not divide K, blocks cross rows."""
        n, k = self.shape
        chosen = (
            columns
            if isinstance(columns, int)
            else torch.arange(k, device=self.scale.device, dtype=torch.int64)[columns]
        )
        if k % self.block == 0:
            return self.scale.view(n, -1)[:, chosen // self.block]
        starts = torch.arange(0, n * k, k, device=self.scale.device, dtype=torch.int64)
        return self.scale[(starts + chosen if isinstance(chosen, int) else starts[:, None] + chosen) // self.block]


@register("schemes", "nf4")
@dataclass(frozen=True)
class FourBit(Scheme):
    """`nf4-b64-dq`: NF4, blocks of 64, 8-bit scales. `fp4-b128`: FP4, float32 scales. `nf4` is short for `nf4-b64`."""

    group: int
    kind: str
    double: bool

    family: ClassVar[str] = "nf4"
    examples: ClassVar[tuple[str, ...]] = ("nf4-b64", "nf4-b64-dq", "fp4-b64", "fp4-b64-dq")

    @classmethod
    def from_spec(cls, spec: str) -> FourBit | None:
        match = re.fullmatch(r"(nf4|fp4)(?:-b(\d+))?(-dq)?", spec)
        if match is None:
            return None
        block = int(match[2] or 64)
        if block not in BLOCKS:
            raise PlanError(f"scheme {spec!r}: blocks of {block}", "Blocks have 32, 64, 128 ... or 4096 entries.")
        return cls(group=block, kind=match[1], double=match[3] is not None)

    def __str__(self) -> str:
        return f"{self.kind}-b{self.group}" + ("-dq" if self.double else "")

    @property
    def trainable(self) -> tuple[str, ...]:
        # With double quantization the scales themselves are codes. The map is the same in all files.
        return ("nested", "offset") if self.double else ("absmax",)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return None

    def blocks(self, shape: tuple[int, int]) -> int:
        """The number of blocks in a weight, a short last one included."""
        return -(-shape[0] * shape[1] // self.group)

    def by_rows(self, shape: tuple[int, int]) -> bool:
        """True if rows are whole blocks. With double quantization the scales belong to the whole weight: False."""
        return not self.double and shape[1] % self.group == 0

    def single(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[FourBit, Mapping[str, Tensor]]:
        nested = _nested(parts)
        if nested is None:
            return self, parts
        return replace(self, double=False), {"codes": parts["codes"], "absmax": nested.decode(parts["absmax"])}

    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        codes, blocks = PartSpec((-(-shape[0] * shape[1] // 2),), torch.uint8), self.blocks(shape)
        if not self.double:
            return {"codes": codes, "absmax": PartSpec((blocks,), torch.float32)}
        return {
            "codes": codes,
            "absmax": PartSpec((blocks,), torch.uint8),
            "nested": PartSpec((-(-blocks // NESTED),), torch.float32),
            "offset": PartSpec((1,), torch.float32),
            "map": PartSpec((256,), torch.float32),
        }

    def fit(self, w: Tensor, importance: Tensor | None = None) -> BlockGrids:
        grids = self._plain(w, self._absmax(w))
        return grids if importance is None else self._search(w, grids, importance)

    def nearest(self, w: Tensor) -> tuple[Tensor, BlockGrids]:
        absmax, flat = self._absmax(w).float(), w.reshape(-1)
        codes = torch.empty(flat.shape, dtype=torch.uint8, device=w.device)
        for entries, blocks in _chunks(flat, self.group):
            x, scale = flat[entries].to(torch.float32, copy=True), absmax[blocks].clamp(min=_SMALLEST)
            short = len(x) % self.group
            whole = len(x) - short
            _scale_blocks(x[:whole], 0, self.group, scale.reciprocal())
            if short:
                x[whole:] /= scale[-1]
            codes[entries] = nearest_level(x.clamp_(-1, 1), self.kind)
        return codes.reshape(w.shape), self._plain(w, absmax)

    def _absmax(self, w: Tensor) -> Tensor:
        """max |w| of each block, [blocks]. NumericsError if `w` is empty or has NaN or Inf."""
        flat = w.reshape(-1)
        absmax = torch.empty(self.blocks((w.shape[0], w.shape[1])), dtype=w.dtype, device=w.device)
        for entries, blocks in _chunks(flat, self.group):
            x = flat[entries]
            whole = len(x) // self.group
            rows, out = x[: whole * self.group].view(whole, self.group), absmax[blocks]
            torch.maximum(rows.amax(1), rows.amin(1).neg(), out=out[:whole])
            if whole < len(out):
                out[-1] = x[whole * self.group :].abs().max()
        check_values(absmax)  # quicker than a pass over the weight
        absmax = absmax.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
        if w.numel() % self.group:  # bitsandbytes clamps the stored absmax of a short block, not of a whole one
            absmax[-1].clamp_(min=_SMALLEST)
        return absmax

    def _plain(self, w: Tensor, absmax: Tensor) -> BlockGrids:
        nested = Nested.of(absmax.float()) if self.double else None
        return BlockGrids.stored(self, (w.shape[0], w.shape[1]), absmax, nested)

    def _search(self, w: Tensor, plain: BlockGrids, importance: Tensor) -> BlockGrids:
        """The best of the candidate scales of each block. It is never worse than the plain one."""

        def stored(scale: Tensor) -> BlockGrids:
            return BlockGrids.stored(self, plain.shape, scale, plain.nested)

        def solve(scale: Tensor) -> Tensor:
            solved = self._errors(w, stored(scale).scale, importance)[1]
            return stored(usable(solved, scale)).scale

        tried = (stored(plain.scale * share).scale for share in shares(0.7, 13))
        scale = search_scales(chain([plain.scale], tried), lambda scale: self._errors(w, scale, importance)[0], solve)
        return stored(scale)

    def _errors(self, w: Tensor, scales: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """For each block, sum h (w - ŵ)² and the best scale for the codes that `scales` choose. All are [blocks]."""
        flat, k, table = w.reshape(-1), w.shape[1], levels(self.kind, w.device).to(scales)
        error, solved = torch.empty_like(scales), torch.empty_like(scales)
        for entries, blocks in _chunks(flat, self.group):
            x, scale = flat[entries].to(table), scales[blocks]
            h = importance.to(table).take(
                torch.arange(entries.start, entries.stop, device=w.device, dtype=torch.int64) % k
            )
            codes = nearest_level(_scale_blocks(x.clone(), 0, self.group, scale, divide=True).clamp_(-1, 1), self.kind)
            level = table.index_select(0, codes.int())
            squared = _scale_blocks(level.clone(), 0, self.group, scale).sub_(x).square_().mul_(h)
            h *= level
            pad = (0, -len(x) % self.group)
            error[blocks], up, down = (
                torch.nn.functional.pad(t, pad).view(-1, self.group).sum(1) for t in (squared, h * x, h * level)
            )
            solved[blocks] = up / down
        return error, solved

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> BlockGrids:
        """Re-solve the scales one column of blocks at a time (`refit_scales`). Unchanged where blocks cross rows."""
        assert isinstance(grids, BlockGrids)
        (n, k), table = grids.shape, levels(self.kind, w.device).to(w.dtype)
        if k % self.group:
            return grids
        per_row = k // self.group

        def level(columns: slice) -> Tensor:
            part = codes[:, columns]
            return table.index_select(0, part.reshape(-1).int()).view(part.shape)

        def stored(scale: Tensor, g: int) -> Tensor:
            if grids.nested is None:
                return scale.float().to(scale.dtype)
            return grids.nested.stored(scale, torch.arange(g, n * per_row, per_row, device=w.device, dtype=torch.int64))

        scale = refit_scales(w - grids.decode(codes), level, grids.scale.view(n, -1), hessian, ridge, stored)
        return BlockGrids.stored(self, grids.shape, scale.reshape(-1), grids.nested)

    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        assert isinstance(grids, BlockGrids)
        flat = codes.reshape(-1)
        if len(flat) % 2:
            flat = torch.cat([flat, flat.new_tensor([LEVELS[self.kind].index(0.0)])])
        pairs = flat.contiguous().view(torch.int16)  # the first code of two is the low byte
        parts = {"codes": (pairs >> 8).bitwise_or_(pairs << 4).to(torch.uint8), "absmax": grids.absmax}
        if grids.nested is not None:
            # Each weight gets its own copy of the map: safetensors cannot save tensors that share memory.
            parts |= {"nested": grids.nested.maxima, "offset": grids.nested.offset, "map": grids.nested.map.clone()}
        return parts

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, BlockGrids]:
        packed, nested = parts["codes"], _nested(parts)
        codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: shape[0] * shape[1]].view(shape)
        scale = parts["absmax"] if nested is None else nested.decode(parts["absmax"])
        return codes, BlockGrids(self.kind, self.group, shape, parts["absmax"], nested, scale)

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        begin, end, _ = rows.indices(shape[0])
        start, stop = begin * shape[1], end * shape[1]
        packed = parts["codes"][start // 2 : (stop + 1) // 2]
        values = _pairs(self.kind, packed.device).index_select(0, packed.int()).view(torch.float32)
        values = values[start % 2 :][: stop - start]
        first, last, nested = start // self.group, -(-stop // self.group), _nested(parts)
        scale = parts["absmax"][first:last]
        if nested is not None:
            scale = nested.decode(scale, first)
        return _scale_blocks(values, start, self.group, scale).view(-1, shape[1]).to(dtype)


def _nested(parts: Mapping[str, Tensor]) -> Nested | None:
    return Nested(parts["nested"], parts["offset"], parts["map"]) if "nested" in parts else None
