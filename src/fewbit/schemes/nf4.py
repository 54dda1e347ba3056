"""Sixteen fixed levels times one scale for each block: NF4 and FP4, bit for bit as bitsandbytes has them.

The weight is read as one long row and cut into blocks, the last of which may be short; a block is divided by its
largest magnitude and each entry becomes the nearest of sixteen levels. NF4's levels are quantiles of a normal
distribution, so all are used alike; FP4's are those of a 4-bit float. Double quantization (`-dq`) stores the scales
themselves in 8 bits, less their mean, in blocks of 256. With code c in block b of 2^5 to 2^12 entries,

    w = s_b * level[c],        s_b = absmax_b                                 single,
                               s_b = map[absmax_b] * nested_b/256 + offset    double.

Round-to-nearest (`nearest`) is bitsandbytes' own: codes are chosen with absmax *before* it is stored in 8 bits, ties go
to the lower level, the entries of a whole block are multiplied by 1/absmax while those of a short one are divided, and
FP4 gives tiny positive numbers the second of its two zeros, code 8. Every other method sees the grid as stored, through
`fit`. The mean and the 8-bit codes of absmax are those of bitsandbytes on a CPU: it rounds absmax / nested to one of
65536 steps first. (Its CUDA code compares without that step and gives tiny negative numbers FP4's second zero; it
decodes the same values.) With importance h a fit tries scales below absmax and then solves s = sum h w l / sum h l²,
each as the file would hold it; the offset and the nested maxima stay those of the plain fit.

Layout: `codes` uint8 [ceil(N K / 2)], the first of two in the high nibble, an odd end filled with the code of zero.
Single: `absmax` float32 [blocks]. Double: `absmax` uint8 [blocks], `nested` float32 [ceil(blocks / 256)], `offset`
float32 [1], and `map` float32 [256], which a file brings along. Sources: Dettmers et al. 2023
(https://arxiv.org/abs/2305.14314) for NF4, Dettmers et al. 2021 (https://arxiv.org/abs/2110.02861) for the 8-bit map.

>>> w = torch.tensor([[2.0, -2.0, 0.3, 0.0] * 8])
>>> scheme = FourBit.from_spec("nf4-b32")
>>> codes, grids = scheme.nearest(w)             # one block of absmax 2; 0.3 / 2 lies next to level 9, 0.1609
>>> codes[0, :4].tolist(), [round(v, 4) for v in grids.decode(codes)[0, :4].tolist()]
([15, 0, 9, 7], [2.0, -2.0, 0.3219, 0.0])
>>> scheme.pack(codes, grids)["codes"][:2].tolist() == [15 << 4 | 0, 9 << 4 | 7]
True
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from fewbit.errors import NumericsError, PlanError
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import ALL, Columns, Grids, Parts, PartSpec, Scheme, refit_scales
from fewbit.system import ambient

NESTED = 256  # scales that share one float32
BLOCKS = tuple(2**p for p in range(5, 13))
_SMALLEST = 1e-38  # what bitsandbytes puts in place of a smaller absmax before it divides
# Entries worked on at a time. They stay in a core's cache, and steps on fewer than 32768 are not shared among threads:
# where another process has the second core, waiting for it after each small step took ten times as long as the work.
# A GPU gets so many that launches take no part of the time.
_CHUNK = {"cpu": 7 << 12}
_BINS = 4096  # of the lookup that finds the nearest level; no bin holds two midpoints

# The quantiles of NF4 as published with the paper, and the sixteen numbers sign * 2^e * (1 + m/2) of FP4 over 12, with
# its two subnormals, in the order of their codes.
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
def _shares() -> list[float]:
    """Shares of absmax that the search tries."""
    shares: list[float] = torch.linspace(1.0, 0.7, 13, dtype=torch.float32, device="cpu").tolist()
    return shares


@cache
@ambient.defaults()
def levels(kind: str, device: torch.device) -> Tensor:
    """The sixteen levels, float32, by code."""
    return torch.tensor(LEVELS[kind], dtype=torch.float32, device=device) + 0.0  # no negative zero


@cache
@ambient.defaults()
def dynamic_map() -> Tensor:
    """The 8-bit map: ±10^(i-6) times 2^i midpoints of [0.1, 1] for i = 0 ... 6, with 0 and 1; 256 numbers, rising."""
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
    """The bin of each entry of x in [-1, 1], or a last bit beyond. No midpoint lies at the edge of one."""
    middle = torch.full((), _BINS / 2, dtype=x.dtype, device=x.device)
    return torch.add(middle, x, alpha=_BINS // 2 - 1).to(torch.int32)


def nearest_level(x: Tensor, kind: str) -> Tensor:
    """Codes (uint8) of the levels nearest to flat x in [-1, 1], or a last bit beyond; ties to the lower one.

    FP4's second zero for a tiny positive x. The bin of an entry tells all midpoints but one, and that one is compared:
    a third of the time of a binary search.
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
    """The two levels of each byte, seen as one 8-byte number: one lookup then moves both."""
    byte = torch.arange(256, device=device, dtype=torch.int64)
    return torch.stack([levels(kind, device)[byte >> 4], levels(kind, device)[byte & 15]], 1).view(torch.float64)[:, 0]


def _by_block(flat: Tensor, first: int, block: int, scale: Tensor, *, divide: bool = False) -> Tensor:
    """Entries from `first` on of something cut in blocks, times (or over) the `scale` of each block they touch; in
    place. Over a scale of nought they become nought."""
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
    """(entries, blocks) of whole blocks that fit a core's cache; the last may end with a short one."""
    total, step = len(flat), max(1, _CHUNK.get(flat.device.type, 1 << 24) // block)
    blocks = -(-total // block)
    starts = range(0, blocks, step)
    return [(slice(b * block, min((b + step) * block, total)), slice(b, min(b + step, blocks))) for b in starts]


@dataclass(frozen=True)
class Nested:
    """Scales of blocks in 8 bits: s = map[code] * maximum of 256 + offset, computed in float32 in that order."""

    maxima: Tensor
    offset: Tensor
    map: Tensor

    @classmethod
    def of(cls, absmax: Tensor) -> Nested:
        """What bitsandbytes refers these scales to."""
        offset = absmax.mean()
        padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED))
        return cls(padded.view(-1, NESTED).abs().amax(1), offset.view(1), dynamic_map().to(absmax.device))

    def encode(self, scale: Tensor, index: Tensor | None = None) -> Tensor:
        """Codes (uint8) of all scales, or of those of the blocks `index`, as bitsandbytes finds them on a CPU."""
        top = self._maxima(len(scale), index)
        x = ((scale - self.offset) * top.reciprocal()).clamp(-1, 1)
        # One rounding for product and sum, as its fused instruction has it.
        steps = (((x + 1) * 0.5).double() * 65535 + 0.5).float().to(torch.int32)
        midpoints = (self.map[:-1] + self.map[1:]) * 0.5
        codes = torch.bucketize(steps.float() * 2.0 / 65535 - 1, midpoints, out_int32=True).to(torch.uint8)
        return codes.masked_fill_(top == 0, 0)

    def decode(self, codes: Tensor, first: int = 0) -> Tensor:
        """Scales of the blocks from `first` on whose codes these are."""
        maxima = self.maxima[first // NESTED :]
        return _by_block(self.map.index_select(0, codes.int()), first, NESTED, maxima).add_(self.offset)

    def stored(self, scale: Tensor, index: Tensor) -> Tensor:
        """The scales of the blocks `index` that can be stored, nearest to these."""
        codes = self.encode(scale.float(), index)
        return (self.map[codes.int()] * self._maxima(len(codes), index) + self.offset).to(scale.dtype)

    def _maxima(self, count: int, index: Tensor | None) -> Tensor:
        return self.maxima.repeat_interleave(NESTED)[:count] if index is None else self.maxima[index // NESTED]


@dataclass(frozen=True)
class BlockGrids(Grids):
    """The scale of each block [blocks] as stored; `absmax` holds it as the file does, `nested` what that refers to."""

    kind: str
    block: int
    shape: tuple[int, int]
    absmax: Tensor
    nested: Nested | None
    scale: Tensor

    @classmethod
    def stored(cls, like: FourBit, shape: tuple[int, int], scale: Tensor, nested: Nested | None) -> BlockGrids:
        """Grids of these scales, or of the nearest that can be stored."""
        absmax = scale.float() if nested is None else nested.encode(scale.float())
        held = absmax if nested is None else nested.decode(absmax)
        return cls(like.kind, like.group, shape, absmax, nested, held.to(scale.dtype))

    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        if isinstance(columns, slice) and columns == ALL:
            flat, codes = w.reshape(-1), torch.empty(w.numel(), dtype=torch.uint8, device=w.device)
            for entries, blocks in _chunks(flat, self.block):
                x = _by_block(flat[entries].to(self.scale, copy=True), 0, self.block, self.scale[blocks], divide=True)
                codes[entries] = nearest_level(x.clamp_(-1, 1), self.kind)
        else:
            scale = self._scale_of(columns)
            x = w / torch.where(scale == 0, torch.inf, scale)
            codes = nearest_level(x.reshape(-1).clamp_(-1, 1), self.kind)
        if self.kind == "fp4":
            codes.masked_fill_(codes == 8, 0)  # its two zeros are one value
        return codes.reshape(w.shape)

    def decode(self, codes: Tensor, columns: Columns = ALL) -> Tensor:
        values = levels(self.kind, codes.device).to(self.scale).index_select(0, codes.reshape(-1).int())
        if isinstance(columns, slice) and columns == ALL:
            return _by_block(values, 0, self.block, self.scale).reshape(codes.shape)
        return values.reshape(codes.shape).mul_(self._scale_of(columns))

    def _scale_of(self, columns: Columns) -> Tensor:
        """Scales of some columns, [N, columns], or [N] for one: a block is one group of a row only if it divides K."""
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
    """`nf4-b64-dq`: NF4 in blocks of 64, scales in 8 bits. `fp4-b128`: FP4, float32 scales. `nf4`: blocks of 64."""

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
            raise PlanError(f"scheme {spec!r}: blocks of {block}", "Blocks of 32, 64, 128 ... 4096 entries exist.")
        return cls(group=block, kind=match[1], double=match[3] is not None)

    def __str__(self) -> str:
        return f"{self.kind}-b{self.group}" + ("-dq" if self.double else "")

    @property
    def payload(self) -> str:
        return "codes"

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return None

    def blocks(self, shape: tuple[int, int]) -> int:
        """Blocks of a weight, a short last one included."""
        return -(-shape[0] * shape[1] // self.group)

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
            _by_block(x[:whole], 0, self.group, scale.reciprocal())
            if short:
                x[whole:] /= scale[-1]
            codes[entries] = nearest_level(x.clamp_(-1, 1), self.kind)
        return codes.reshape(w.shape), self._plain(w, absmax)

    def _absmax(self, w: Tensor) -> Tensor:
        """max |w| of each block; NumericsError for NaN or Inf, or where there is no weight at all."""
        if not w.numel():
            raise NumericsError("a weight has no elements")
        flat = w.reshape(-1)
        absmax = torch.empty(self.blocks((w.shape[0], w.shape[1])), dtype=w.dtype, device=w.device)
        for entries, blocks in _chunks(flat, self.group):
            x = flat[entries]
            whole = len(x) // self.group
            rows, found = x[: whole * self.group].view(whole, self.group), absmax[blocks]
            torch.maximum(rows.amax(1), rows.amin(1).neg(), out=found[:whole])
            if whole < len(found):
                found[-1] = x[whole * self.group :].abs().max()
        if not torch.isfinite(absmax).all():
            raise NumericsError("a weight has NaN or Inf", "Check the checkpoint: it cannot be quantized as it is.")
        absmax = absmax.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
        if w.numel() % self.group:  # bitsandbytes stores no less for a short block, though it does for a whole one
            absmax[-1].clamp_(min=_SMALLEST)
        return absmax

    def _plain(self, w: Tensor, absmax: Tensor) -> BlockGrids:
        nested = Nested.of(absmax.float()) if self.double else None
        return BlockGrids.stored(self, (w.shape[0], w.shape[1]), absmax, nested)

    def _search(self, w: Tensor, plain: BlockGrids, importance: Tensor) -> BlockGrids:
        """The best of the scales tried for each block; never worse than the plain one."""
        best, scale = self._errors(w, plain, importance)[0], plain.scale

        def tried(scales: Tensor) -> None:
            nonlocal best, scale
            grids = BlockGrids.stored(self, plain.shape, scales, plain.nested)
            error, _ = self._errors(w, grids, importance)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, grids.scale, scale)

        for share in _shares():
            tried(plain.scale * share)
        for _ in range(2):
            solved = self._errors(w, BlockGrids.stored(self, plain.shape, scale, plain.nested), importance)[1]
            tried(torch.where(solved.isfinite() & (solved != 0), solved, scale))
        return BlockGrids.stored(self, plain.shape, scale, plain.nested)

    def _errors(self, w: Tensor, grids: BlockGrids, importance: Tensor) -> tuple[Tensor, Tensor]:
        """For each block, sum h (w - ŵ)² and the scale that would be best for the codes it now takes."""
        flat, k, table = w.reshape(-1), w.shape[1], levels(self.kind, w.device).to(grids.scale)
        error, solved = torch.empty_like(grids.scale), torch.empty_like(grids.scale)
        for entries, blocks in _chunks(flat, self.group):
            x, scale = flat[entries].to(table), grids.scale[blocks]
            h = importance.to(table).take(
                torch.arange(entries.start, entries.stop, device=w.device, dtype=torch.int64) % k
            )
            codes = nearest_level(_by_block(x.clone(), 0, self.group, scale, divide=True).clamp_(-1, 1), self.kind)
            level = table.index_select(0, codes.int())
            missed = _by_block(level.clone(), 0, self.group, scale).sub_(x).square_().mul_(h)
            h *= level
            pad = (0, -len(x) % self.group)
            error[blocks], up, down = (
                torch.nn.functional.pad(t, pad).view(-1, self.group).sum(1) for t in (missed, h * x, h * level)
            )
            solved[blocks] = up / down
        return error, solved

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> BlockGrids:
        """Scales re-solved one column of blocks at a time (`refit_scales`), where blocks do not straddle rows."""
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
        pairs = flat.contiguous().view(torch.int16)  # the first of two in the low byte
        parts = {"codes": (pairs >> 8).bitwise_or_(pairs << 4).to(torch.uint8), "absmax": grids.absmax}
        if grids.nested is not None:
            # A map of its own for each weight: files refuse tensors that share memory.
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
        return _by_block(values, start, self.group, scale).view(-1, shape[1]).to(dtype)


def _nested(parts: Mapping[str, Tensor]) -> Nested | None:
    return Nested(parts["nested"], parts["offset"], parts["map"]) if "nested" in parts else None
