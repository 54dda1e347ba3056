"""The search for scales: which d, dmin and sub-scales of a block lose least, weight by weight as told.

With weights h, a sub-block that takes levels l is best served by the least-squares scale and offset

    s = (A E - B D) / (A C - B²),  o = (s B - D) / A,      A, B, C, D, E = sum h (1, l, l², x, l x),

so a search needs to try levels only: those of x for some dozens of ranges, narrower and wider than that of the
sub-block. Then the sub-scales are rounded to their few bits: d is tried for some places of the largest of them, each
error weighed by the curvature C - B²/A that it meets. At last, rounds of: new levels on the grid as stored; d and dmin
solved together for the whole block; sub-scales solved for those levels. The best grid seen, as stored, is kept.

Blocks lie along the last dimension, which every sum leaves alone: all steps are long vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fewbit.lazy import Tensor, torch
from fewbit.schemes.ggml.layout import NONLINEAR, Layout
from fewbit.system import ambient

SMALLEST = 2.0**-24  # the smallest positive fp16
LARGEST = 65504.0
_FLOOR = 1e-4  # of the mean weight: columns that nothing is known of still get a grid
_ROUNDS = 3  # of refinement
# (affine, bits) -> how many levels less and more than there are a range is given, in how many steps. Where there are
# many levels their number hardly matters, and each step is a new draw of all roundings: at q6_k -5 ... 1 in place of
# -1 ... 1 takes 10 % off the error at no cost, at q8_0 -8 ... 1 takes 13 %, at q5_k -4 ... 4 takes 2.5 %.
_TRIED = {
    (True, 2): (-0.9, 0.9, 28),
    (True, 4): (-2, 4, 28),
    (True, 5): (-4, 4, 28),
    (False, 3): (-1.5, 3, 12),
    (False, 4): (-2, 2, 12),
    (False, 5): (-4, 1, 12),
    (False, 6): (-5, 1, 12),
    (False, 8): (-8, 1, 16),
}
_PLACES = 8  # of the largest sub-scale, among its codes, that are tried at either end
_NUDGE = 1e-3  # of the weight: the curvature of a sub-block whose levels are all the same
_FLAT = 2.0**-20  # of the offset: steps smaller than that are lost beside it in float32


@dataclass
class Found:
    """Grids of B blocks as stored: d and dmin [B], sc and m [subs, B], all float; None where the type has none."""

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

    def or_where(self, better: Tensor, other: Found) -> Found:
        """This grid, or that of `other` for the blocks where that is `better`."""
        mine, theirs = (self.d, self.dmin, self.sc, self.m), (other.d, other.dmin, other.sc, other.m)
        d, dmin, sc, m = (
            a if a is None or b is None else torch.where(better, b, a) for a, b in zip(mine, theirs, strict=True)
        )
        assert d is not None
        assert sc is not None
        return Found(d, dmin, sc, m)


def half(x: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """x as fp16 will hold x * unit; what is not zero stays so."""
    size = (x * unit).abs()
    kept = size.clamp(SMALLEST, LARGEST).to(torch.float16).to(x.dtype).mul_(size > 0)
    return torch.copysign(kept, x).div_(unit)


class Search:
    """The blocks x [sub, subs, B] of one layout, in units [B], with weights h of the same shape."""

    def __init__(self, kind: Layout, x: Tensor, h: Tensor, unit: Tensor) -> None:
        self.kind, self.x, self.h, self.unit = kind, x, h, unit
        self.l, self.t = torch.empty_like(x), torch.empty_like(x)
        self.hx = h * x
        self.A, self.D = h.sum(0), self.hx.sum(0)
        self.table = _nearest(x.device) if kind.nonlinear else None

    # --- levels, and sums over them ---

    def levels(self, scaled: Tensor) -> None:
        """Make `scaled` the levels nearest to it."""
        if self.table is None:
            scaled.round_().clamp_(-self.kind.zero, 2**self.kind.bits - 1 - self.kind.zero)
            return
        index = scaled.add_(128).mul_(2).clamp_(0, 511).to(torch.int32)
        torch.index_select(self.table, 0, index.view(-1), out=scaled.view(-1))

    def sums(self, B: Tensor, C: Tensor, E: Tensor) -> None:
        """B, C, E of the levels `l`, for each sub-block."""
        torch.sum(torch.mul(self.hx, self.l, out=self.t), 0, out=E)
        torch.mul(self.h, self.l, out=self.t)
        if self.kind.affine:
            torch.sum(self.t, 0, out=B)
        torch.sum(self.t.mul_(self.l), 0, out=C)

    def quantize(self, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Levels `l` on this grid; the error of each sub-block."""
        inverse = _over(1.0, scale)
        if offset is None:
            self.levels(torch.mul(self.x, inverse, out=self.l))
            torch.mul(self.l, scale, out=self.t).sub_(self.x)
        else:
            self.levels(torch.add(self.x, offset, out=self.l).mul_(inverse))
            torch.mul(self.l, scale, out=self.t).sub_(offset).sub_(self.x)
        return self.t.square_().mul_(self.h).sum(0)

    def error(self, grid: Found) -> Tensor:
        """What each block loses [B] on this grid, with `l` its levels."""
        return self.quantize(grid.scale, grid.offset).sum(0)

    # --- the steps ---

    def spanned(self) -> Found:
        """The grid that spans each sub-block, with the one level more on the side of the longer tail."""
        if not self.kind.affine:
            top = self.x.gather(0, self.x.abs().argmax(0, keepdim=True))[0]
            edge = NONLINEAR[0] if self.kind.nonlinear else -self.kind.zero
            found = self.project(top / edge, self.A, 1)
            if self.kind.nonlinear:  # which has no level 0: next to it lie unlike ones
                turned = self.project(-top / edge, self.A, 1)
                found = found.or_where(self.error(turned) < self.error(found), turned)
            return found
        low, high = self._range()
        return self.project((high - low) / (2**self.kind.bits - 1), -low, 1)

    def _range(self) -> tuple[Tensor, Tensor]:
        low, high = self.x.amin(0), self.x.amax(0)
        # What is subtracted from a sub-block has no sign there.
        return (low.clamp(max=0), high.clamp(min=0)) if self.kind.super else (low, high)

    def start(self) -> tuple[Tensor, Tensor]:
        """The best scale and offset [subs, B] of each sub-block, were they stored exactly."""
        if not self.kind.affine:
            inverse = _over(1.0, self.x.abs().amax(0))
            return self._best([inverse * step for step in _steps(self.kind)], None)
        low, high = self._range()
        inverse = _over(1.0, high - low)
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
            s = _over(E, C)
            return s.gather(0, _least(-s * E))[0], self.A
        # Seen from `low` and around the mean, so that no digit is lost in the difference of large sums.
        G = self.D - low * self.A
        F, V = E - B * (low + G / self.A), C.addcmul_(B, B / self.A, value=-1)
        s = _over(F, V)
        chosen = _least(-s * F)
        s, B, E = s.gather(0, chosen)[0], B.gather(0, chosen)[0], E.gather(0, chosen)[0]
        o = (s * B - G) / self.A - low
        if self.kind.super:  # where an offset would have to be negative there is none
            C = V.gather(0, chosen)[0] + B * B / self.A
            s, o = torch.where(o >= 0, s, _over(E, C)), o.clamp(min=0)
        return s, o

    def project(self, scale: Tensor, offset: Tensor, places: int = _PLACES) -> Found:
        """The grid that can be stored and is nearest to these scales and offsets, as errors see it."""
        kind, one = self.kind, torch.ones_like(scale)
        if not kind.super:
            return self._flattened(half(scale[0], self.unit), half(offset[0], self.unit), one, one)
        self.quantize(scale, offset if kind.affine else None)
        B, C, E = (torch.empty_like(scale) for _ in range(3))
        self.sums(B, C, E)
        weight = C - _over(B * B, self.A) + _NUDGE * self.A if kind.affine else C
        d, sc = _best_unit(scale, weight, kind.sc, self.unit, places, least=1)
        if not kind.affine:
            return Found(d, None, sc, None)
        wanted = _over(d * sc * B - self.D, self.A).clamp_(min=0)
        dmin, m = _best_unit(wanted, self.A, (0, kind.m), self.unit, places)
        return self._flattened(d, dmin, sc, m)

    def _flattened(self, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor) -> Found:
        """The grid, without steps that are lost beside its offsets."""
        if not self.kind.affine:
            return Found(d, None, sc, None)
        lost = (d * sc).abs() < _FLAT * (dmin * m).abs()
        if self.kind.super:
            return Found(d, dmin, sc.masked_fill(lost, 0), m)
        return Found(d.masked_fill(lost[0], 0), dmin, sc, m)

    def improve(self, grid: Found) -> Found:
        """The grid that would be better for the levels `l`, which were taken on `grid`."""
        B, C, E = (torch.empty_like(grid.sc) for _ in range(3))
        self.sums(B, C, E)
        sc, m, dmin = grid.sc, grid.m, grid.dmin
        if m is None or dmin is None:
            d = half(_over((sc * E).sum(0), (sc * sc * C).sum(0)), self.unit)
            if self.kind.super:
                sc = (_over(E, C) * _over(1.0, d)).round_().clamp_(*self.kind.sc)
            return Found(d, None, sc, None)
        # The block as a whole is (sc l) d - m dmin: two equations.
        ll, lm, mm = (sc * sc * C).sum(0), (sc * m * B).sum(0), (m * m * self.A).sum(0)
        lx, mx = (sc * E).sum(0), (m * self.D).sum(0)
        whole = ll * mm - lm * lm
        both = whole > 1e-6 * ll * mm
        d = torch.where(both, _over(lx * mm - lm * mx, whole), _over(lx + lm * dmin, ll))
        dmin = torch.where(both, _over(lx * lm - ll * mx, whole), _over(d * lm - mx, mm))
        if not self.kind.super:
            return self._flattened(half(d, self.unit), half(dmin, self.unit), sc, m)
        d, dmin = half(d.clamp_(min=0), self.unit), half(dmin.clamp_(min=0), self.unit)
        # Sub-scales for the same levels: the nearest two, and the one there was, each with its best offset.
        steps = _over(self.A * E - B * self.D, self.A * C - B * B) * _over(1.0, d)
        tried = torch.stack([steps.floor(), steps.ceil(), sc]).clamp_(*self.kind.sc)
        s, per_m = d * tried, _over(1.0, dmin * self.A)
        shift = ((s * B - self.D) * per_m).round_().clamp_(0, self.kind.m)
        o = dmin * shift
        error = s * (s * C - 2 * E) + o * (2 * (self.D - s * B) + o * self.A)
        chosen = _least(error)
        return self._flattened(d, dmin, tried.gather(0, chosen)[0], shift.gather(0, chosen)[0])

    def run(self) -> Found:
        """The best grid found."""
        now = self.project(*self.start())
        found, least = now, self.error(now)
        for _ in range(_ROUNDS):
            now = self.improve(now)
            error = self.error(now)
            found, least = found.or_where(error < least, now), torch.minimum(error, least)
        return found


def fit(kind: Layout, x: Tensor, h: Tensor | None) -> Found:
    """Grids of blocks x [B, columns]: the plain one without h, else the best found under weights h [B, columns].

    It is never worse under these weights than the plain one, even where most of them are nought.
    """
    blocks = _laid(kind, x)
    size = blocks.abs().amax((0, 1))
    # Powers of two, so that squares stay in range and no digit is lost.
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent.clamp_(min=-100))
    blocks = blocks / unit  # not in its place: it may be x
    if h is None:
        search = Search(kind, blocks, torch.ones_like(blocks), unit)
        found = search.spanned()
    else:
        weights = _laid(kind, h)
        weights = weights / weights.mean((0, 1)).clamp_(min=1e-30)
        search = Search(kind, blocks, weights + _FLOOR, unit)
        found, plain = search.run(), search.spanned()
        search.h = weights
        found = found.or_where(search.error(plain) < search.error(found), plain)
    d, dmin = found.d * unit, None if found.dmin is None else found.dmin * unit
    return Found(d, dmin, found.sc, found.m)


def _laid(kind: Layout, x: Tensor) -> Tensor:
    return x.float().reshape(-1, kind.subs, kind.sub).permute(2, 1, 0).contiguous()


def _best_unit(
    wanted: Tensor, weight: Tensor, bounds: tuple[int, int], unit: Tensor, places: int, least: int = 0
) -> tuple[Tensor, Tensor]:
    """d [B] as fp16 and whole numbers q [subs, B] within `bounds`, so that sum weight (wanted - d q)² is least.

    `least`: the size of a q where anything is wanted. A scale of one step serves better than none.
    """
    low, high = bounds
    top = wanted.gather(0, wanted.abs().argmax(0, keepdim=True))[0]
    codes = [edge * (1 - i / (2 * places)) for edge in ((low, high) if low else (high,)) for i in range(places)]
    d = top / torch.tensor(codes, dtype=top.dtype, device=top.device).view(-1, 1)  # [places, B]
    for last in (False, True):
        q = wanted * _over(1.0, d).unsqueeze(1)
        q = torch.where(q.abs() < 0.5, q.sign() * least, q.round()).clamp_(low, high)
        if not last:
            d = half(_over((weight * wanted * q).sum(1), (weight * q * q).sum(1)), unit)
    error = (wanted - d.unsqueeze(1) * q).square_().mul_(weight).sum(1)
    chosen = _least(error)
    return d.gather(0, chosen)[0], q.gather(0, chosen.unsqueeze(1).expand(1, *wanted.shape))[0]


def _least(error: Tensor) -> Tensor:
    """Where along the first dimension the least is, [1, ...]; several times as fast as `argmin` there."""
    places = torch.arange(len(error), dtype=error.dtype, device=error.device).view(-1, *[1] * (error.dim() - 1))
    first = torch.where(error == error.amin(0), places, len(error) - 1.0).amin(0, keepdim=True)
    return first.long()


def _over(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b, and 0 where that is no number."""
    return torch.nan_to_num(a / b, nan=0.0, posinf=0.0, neginf=0.0)


@cache
@ambient.defaults()
def _steps(kind: Layout) -> tuple[float, ...]:
    """Levels that the range of a sub-block is given, in the search."""
    if kind.nonlinear:
        return tuple(sign * float(top) for top in range(100, 146, 4) for sign in (1, -1))
    edge = 2**kind.bits - 1 if kind.affine else kind.zero
    less, more, count = _TRIED[kind.affine, kind.bits]
    steps = tuple((edge + torch.linspace(less, more, count, device="cpu", dtype=torch.float32)).tolist())
    # The level that one side has more than the other is tried on both, where it matters.
    return steps if kind.affine or kind.bits == 8 else tuple(sign * step for step in steps for sign in (1, -1))


@cache
@ambient.defaults()
def _nearest(device: torch.device) -> Tensor:
    """The nearest of the nonlinear levels for each half step from -128 on; no midpoint lies inside one."""
    levels = torch.tensor(NONLINEAR, dtype=torch.float32, device="cpu")
    places = torch.arange(512, device="cpu", dtype=torch.float32) / 2 - 127.75
    return levels[(places[:, None] - levels).abs().argmin(1)].to(device)
