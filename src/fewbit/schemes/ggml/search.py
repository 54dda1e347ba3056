"""The search for the scales of a block: the d, dmin and sub-scales with the smallest weighted squared error.

Take a sub-block of weights x with importances h, rounded to levels l. Its least-squares scale s and offset o, for
x ≈ s l - o, have a closed form:

    s = (A E - B D) / (A C - B²),  o = (s B - D) / A,      A, B, C, D, E = sum h (1, l, l², x, l x)

So the search has to try only levels. It runs in three steps:

1. Each sub-block on its own: round x with 16 to 28 ranges, narrower and wider than its own, and keep the best
   closed-form s and o.
2. Round the sub-scales to their few bits. For this, try values of d that put the largest sub-scale at different codes.
   The rounding error of a sub-scale is weighed by its curvature C - B²/A.
3. Refine in rounds: new levels on the stored grid; d and dmin solved together for the whole block; sub-scales solved
   for these levels.

The result is the best stored grid of all rounds. Blocks lie along the last dimension, over which no sum runs, so all
operations are on long vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import FP16_LARGEST, FP16_SMALLEST
from fewbit.schemes.ggml.layout import NONLINEAR, Layout
from fewbit.system import ambient

_FLOOR = 1e-4  # added to importances, relative to their mean: columns of importance 0 still get a sensible grid
_ROUNDS = 3  # rounds of refinement
# (affine, bits) -> (low, high, count). Step 1 spreads a sub-block's range over the type's number of levels plus low ...
# high, in `count` candidates. If a type has many levels, losing a few hardly matters, but each candidate rounds all
# weights anew, and the best of many roundings wins. So wide ranges help: at q6_k, -5 ... 1 instead of -1 ... 1 lowers
# the error by 10 % at no cost; at q8_0, -8 ... 1 lowers it by 13 %; at q5_k, -4 ... 4 lowers it by 2.5 %.
_RANGES = {
    (True, 2): (-0.9, 0.9, 28),
    (True, 4): (-2, 4, 28),
    (True, 5): (-4, 4, 28),
    (False, 3): (-1.5, 3, 12),
    (False, 4): (-2, 2, 12),
    (False, 5): (-4, 1, 12),
    (False, 6): (-5, 1, 12),
    (False, 8): (-8, 1, 16),
}
_PLACES = 8  # codes tried for the largest sub-scale, at each end of the codes' range
_NUDGE = 1e-3  # curvature added to each sub-block, relative to A: it is 0 where all levels are the same
_FLAT = 2.0**-20  # scales smaller than this, relative to the offset, vanish beside it in float32


@dataclass
class BlockScales:
    """The stored scales of B blocks: d, dmin [B] and sc, m [subs, B], all float. dmin and m are None if not stored."""

    d: Tensor
    dmin: Tensor | None
    sc: Tensor
    m: Tensor | None

    @property
    def scale(self) -> Tensor:
        return self.d * self.sc

    @property
    def offset(self) -> Tensor | None:
        return None if self.dmin is None or self.m is None else self.dmin * self.m

    def replaced(self, better: Tensor, other: BlockScales) -> BlockScales:
        """These scales, replaced by those of `other` in the blocks where `better` [B] is true."""
        mine, theirs = (self.d, self.dmin, self.sc, self.m), (other.d, other.dmin, other.sc, other.m)
        d, dmin, sc, m = (
            a if a is None or b is None else torch.where(better, b, a) for a, b in zip(mine, theirs, strict=True)
        )
        assert d is not None
        assert sc is not None
        return BlockScales(d, dmin, sc, m)


def half(x: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """x rounded so that x * unit is a finite fp16 number. A nonzero x stays nonzero."""
    size = (x * unit).abs()
    kept = size.clamp(FP16_SMALLEST, FP16_LARGEST).to(torch.float16).to(x.dtype).mul_(size > 0)
    return torch.copysign(kept, x).div_(unit)


class Search:
    """The search over blocks x [sub, subs, B] of one layout, with importances h of the same shape.

    x and all scales are in units of `unit` [B]. l holds the current levels; t is scratch memory.
    """

    def __init__(self, kind: Layout, x: Tensor, h: Tensor, unit: Tensor) -> None:
        self.kind, self.x, self.h, self.unit = kind, x, h, unit
        self.l, self.t = torch.empty_like(x), torch.empty_like(x)
        self.hx = h * x
        self.A, self.D = h.sum(0), self.hx.sum(0)
        self.table = _nearest(x.device) if kind.nonlinear else None

    # --- levels, and sums over them ---

    def levels(self, scaled: Tensor) -> None:
        """Replace `scaled` by the nearest levels, in place."""
        if self.table is None:
            scaled.round_().clamp_(-self.kind.zero, 2**self.kind.bits - 1 - self.kind.zero)
            return
        index = scaled.add_(128).mul_(2).clamp_(0, 511).to(torch.int32)
        torch.index_select(self.table, 0, index.view(-1), out=scaled.view(-1))

    def sums(self, B: Tensor, C: Tensor, E: Tensor) -> None:
        """Write the sums B, C, E of the levels `l`, [subs, B] each, to the given tensors."""
        torch.sum(torch.mul(self.hx, self.l, out=self.t), 0, out=E)
        torch.mul(self.h, self.l, out=self.t)
        if self.kind.affine:
            torch.sum(self.t, 0, out=B)
        torch.sum(self.t.mul_(self.l), 0, out=C)

    def quantize(self, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Set `l` to the nearest levels for this scale and offset. Returns the error of each sub-block, [subs, B]."""
        inverse = _divide(1.0, scale)
        if offset is None:
            self.levels(torch.mul(self.x, inverse, out=self.l))
            torch.mul(self.l, scale, out=self.t).sub_(self.x)
        else:
            self.levels(torch.add(self.x, offset, out=self.l).mul_(inverse))
            torch.mul(self.l, scale, out=self.t).sub_(offset).sub_(self.x)
        return self.t.square_().mul_(self.h).sum(0)

    def error(self, grid: BlockScales) -> Tensor:
        """The error of each block [B] on this grid. Sets `l` to the levels."""
        return self.quantize(grid.scale, grid.offset).sum(0)

    # --- the steps ---

    def spanned(self) -> BlockScales:
        """The plain grid, which spans each sub-block. If one side has a level more, the longer tail gets it."""
        if not self.kind.affine:
            top = self.x.gather(0, self.x.abs().argmax(0, keepdim=True))[0]
            edge = NONLINEAR[0] if self.kind.nonlinear else -self.kind.zero
            best = self.project(top / edge, self.A, 1)
            if self.kind.nonlinear:  # the levels are not symmetric around 0, so try both signs of the scale
                flipped = self.project(-top / edge, self.A, 1)
                best = best.replaced(self.error(flipped) < self.error(best), flipped)
            return best
        low, high = self._range()
        return self.project((high - low) / (2**self.kind.bits - 1), -low, 1)

    def _range(self) -> tuple[Tensor, Tensor]:
        low, high = self.x.amin(0), self.x.amax(0)
        # k-quants store no sign for an offset, so the range has to include 0.
        return (low.clamp(max=0), high.clamp(min=0)) if self.kind.super else (low, high)

    def start(self) -> tuple[Tensor, Tensor]:
        """Step 1: the best scale and offset [subs, B] of each sub-block, not rounded yet."""
        if not self.kind.affine:
            inverse = _divide(1.0, self.x.abs().amax(0))
            return self._best([inverse * step for step in _steps(self.kind)], None)
        low, high = self._range()
        inverse = _divide(1.0, high - low)
        return self._best([inverse * step for step in _steps(self.kind)], low)

    def _best(self, inverses: list[Tensor], low: Tensor | None) -> tuple[Tensor, Tensor]:
        B, C, E = (self.A.new_empty(len(inverses), *self.A.shape) for _ in range(3))
        for i, inverse in enumerate(inverses):
            if low is None:
                torch.mul(self.x, inverse, out=self.l)
            else:
                torch.sub(self.x, low, out=self.l).mul_(inverse)
            self.levels(self.l)
            self.sums(B[i], C[i], E[i])
        if low is None:
            s = _divide(E, C)
            return s.gather(0, _argmin(-s * E))[0], self.A
        # Centered (x - low, levels around their mean), so that differences of large sums lose no digits.
        G = self.D - low * self.A
        F, V = E - B * (low + G / self.A), C.addcmul_(B, B / self.A, value=-1)
        s = _divide(F, V)
        chosen = _argmin(-s * F)
        s, B, E = s.gather(0, chosen)[0], B.gather(0, chosen)[0], E.gather(0, chosen)[0]
        o = (s * B - G) / self.A - low
        if self.kind.super:  # an offset cannot be negative: where the best one is, use 0 and solve the scale alone
            C = V.gather(0, chosen)[0] + B * B / self.A
            s, o = torch.where(o >= 0, s, _divide(E, C)), o.clamp(min=0)
        return s, o

    def project(self, scale: Tensor, offset: Tensor, places: int = _PLACES) -> BlockScales:
        """Step 2: the stored grid that loses least when it replaces these scales and offsets [subs, B]."""
        kind, one = self.kind, torch.ones_like(scale)
        if not kind.super:
            return self._drop_lost(half(scale[0], self.unit), half(offset[0], self.unit), one, one)
        self.quantize(scale, offset if kind.affine else None)
        B, C, E = (torch.empty_like(scale) for _ in range(3))
        self.sums(B, C, E)
        weight = C - _divide(B * B, self.A) + _NUDGE * self.A if kind.affine else C
        d, sc = _best_unit(scale, weight, kind.sc, self.unit, places, least=1)
        if not kind.affine:
            return BlockScales(d, None, sc, None)
        exact = _divide(d * sc * B - self.D, self.A).clamp_(min=0)
        dmin, m = _best_unit(exact, self.A, (0, kind.m), self.unit, places)
        return self._drop_lost(d, dmin, sc, m)

    def _drop_lost(self, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor) -> BlockScales:
        """The grid, with scales set to 0 where they are too small to change a value beside the offset."""
        if not self.kind.affine:
            return BlockScales(d, None, sc, None)
        lost = (d * sc).abs() < _FLAT * (dmin * m).abs()
        if self.kind.super:
            return BlockScales(d, dmin, sc.masked_fill(lost, 0), m)
        return BlockScales(d.masked_fill(lost[0], 0), dmin, sc, m)

    def improve(self, grid: BlockScales) -> BlockScales:
        """Step 3: a better grid for the levels `l`, which were chosen on `grid`."""
        B, C, E = (torch.empty_like(grid.sc) for _ in range(3))
        self.sums(B, C, E)
        sc, m, dmin = grid.sc, grid.m, grid.dmin
        if m is None or dmin is None:
            d = half(_divide((sc * E).sum(0), (sc * sc * C).sum(0)), self.unit)
            if self.kind.super:
                sc = (_divide(E, C) * _divide(1.0, d)).round_().clamp_(*self.kind.sc)
            return BlockScales(d, None, sc, None)
        # The block as a whole is d (sc l) - dmin m: least squares in two unknowns, d and dmin.
        ll, lm, mm = (sc * sc * C).sum(0), (sc * m * B).sum(0), (m * m * self.A).sum(0)
        lx, mx = (sc * E).sum(0), (m * self.D).sum(0)
        whole = ll * mm - lm * lm
        both = whole > 1e-6 * ll * mm
        d = torch.where(both, _divide(lx * mm - lm * mx, whole), _divide(lx + lm * dmin, ll))
        dmin = torch.where(both, _divide(lx * lm - ll * mx, whole), _divide(d * lm - mx, mm))
        if not self.kind.super:
            return self._drop_lost(half(d, self.unit), half(dmin, self.unit), sc, m)
        d, dmin = half(d.clamp_(min=0), self.unit), half(dmin.clamp_(min=0), self.unit)
        # Sub-scales for the same levels: try the exact solution rounded down and up and the old one, each with its
        # best offset.
        steps = _divide(self.A * E - B * self.D, self.A * C - B * B) * _divide(1.0, d)
        tried = torch.stack([steps.floor(), steps.ceil(), sc]).clamp_(*self.kind.sc)
        s, per_m = d * tried, _divide(1.0, dmin * self.A)
        shift = ((s * B - self.D) * per_m).round_().clamp_(0, self.kind.m)
        o = dmin * shift
        error = s * (s * C - 2 * E) + o * (2 * (self.D - s * B) + o * self.A)
        chosen = _argmin(error)
        return self._drop_lost(d, dmin, tried.gather(0, chosen)[0], shift.gather(0, chosen)[0])

    def run(self) -> BlockScales:
        """All three steps; the best grid found."""
        now = self.project(*self.start())
        best, least = now, self.error(now)
        for _ in range(_ROUNDS):
            now = self.improve(now)
            error = self.error(now)
            best, least = best.replaced(error < least, now), torch.minimum(error, least)
        return best


def fit(kind: Layout, x: Tensor, h: Tensor | None) -> BlockScales:
    """The stored scales of blocks x [B, columns]: the plain grid without h, else the best of a search.

    h [B, columns] are importances. Under them the result is never worse than the plain grid, even if most are 0.
    """
    blocks = _transposed(kind, x)
    size = blocks.abs().amax((0, 1))
    # Scale each block to about 1, so that squares stay in range. Powers of two lose no digits.
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent.clamp_(min=-100))
    blocks = blocks / unit  # not in place: `blocks` may share memory with x
    if h is None:
        search = Search(kind, blocks, torch.ones_like(blocks), unit)
        best = search.spanned()
    else:
        weights = _transposed(kind, h)
        weights = weights / weights.mean((0, 1)).clamp_(min=1e-30)
        search = Search(kind, blocks, weights + _FLOOR, unit)
        best, plain = search.run(), search.spanned()
        search.h = weights
        best = best.replaced(search.error(plain) < search.error(best), plain)
    d, dmin = best.d * unit, None if best.dmin is None else best.dmin * unit
    return BlockScales(d, dmin, best.sc, best.m)


def _transposed(kind: Layout, x: Tensor) -> Tensor:
    """x [B, columns] as float32 [sub, subs, B]."""
    return x.float().reshape(-1, kind.subs, kind.sub).permute(2, 1, 0).contiguous()


def _best_unit(
    exact: Tensor, weight: Tensor, bounds: tuple[int, int], unit: Tensor, places: int, least: int = 0
) -> tuple[Tensor, Tensor]:
    """d [B], an fp16 number, and integers q [subs, B] within `bounds` that minimize sum weight (exact - d q)².

    `least`: the smallest |q| where `exact` is not 0. For scales it is 1, because a scale of one step is better than 0.
    """
    low, high = bounds
    top = exact.gather(0, exact.abs().argmax(0, keepdim=True))[0]
    codes = [edge * (1 - i / (2 * places)) for edge in ((low, high) if low else (high,)) for i in range(places)]
    d = top / torch.tensor(codes, dtype=top.dtype, device=top.device).view(-1, 1)  # [places, B]
    for last in (False, True):
        q = exact * _divide(1.0, d).unsqueeze(1)
        q = torch.where(q.abs() < 0.5, q.sign() * least, q.round()).clamp_(low, high)
        if not last:
            d = half(_divide((weight * exact * q).sum(1), (weight * q * q).sum(1)), unit)
    error = (exact - d.unsqueeze(1) * q).square_().mul_(weight).sum(1)
    chosen = _argmin(error)
    return d.gather(0, chosen)[0], q.gather(0, chosen.unsqueeze(1).expand(1, *exact.shape))[0]


def _argmin(error: Tensor) -> Tensor:
    """The index of the minimum along the first dimension, [1, ...]. It is several times as fast as `argmin` there."""
    places = torch.arange(len(error), dtype=error.dtype, device=error.device).view(-1, *[1] * (error.dim() - 1))
    first = torch.where(error == error.amin(0), places, len(error) - 1.0).amin(0, keepdim=True)
    return first.long()


def _divide(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b, and 0 where the quotient is not finite."""
    return torch.nan_to_num(a / b, nan=0.0, posinf=0.0, neginf=0.0)


@cache
@ambient.defaults()
def _steps(kind: Layout) -> tuple[float, ...]:
    """The numbers of levels over which step 1 spreads a sub-block's range. Negative: with a negative scale."""
    if kind.nonlinear:
        return tuple(sign * float(top) for top in range(100, 146, 4) for sign in (1, -1))
    edge = 2**kind.bits - 1 if kind.affine else kind.zero
    low, high, count = _RANGES[kind.affine, kind.bits]
    steps = tuple((edge + torch.linspace(low, high, count, device="cpu", dtype=torch.float32)).tolist())
    # Try the extra level on both sides. With 8 bits one level more makes hardly any difference.
    return steps if kind.affine or kind.bits == 8 else tuple(sign * step for step in steps for sign in (1, -1))


@cache
@ambient.defaults()
def _nearest(device: torch.device) -> Tensor:
    """The nearest nonlinear level for each interval of length 1/2 from -128 up. No midpoint lies inside an interval."""
    levels = torch.tensor(NONLINEAR, dtype=torch.float32, device="cpu")
    places = torch.arange(512, device="cpu", dtype=torch.float32) / 2 - 127.75
    return levels[(places[:, None] - levels).abs().argmin(1)].to(device)
