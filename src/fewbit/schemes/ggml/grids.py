"""Grids of a whole weight in blocks, and the re-solving of their scales for codes that are chosen.

A value is scale * level[code] - offset, with scale = d sc and offset = dmin m for each sub-block. Those products are
exact in float32 (11 bits by at most 8), and so is the value but for one rounding where an offset is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import ALL, Columns, Grids, Uniform
from fewbit.schemes.ggml import layout
from fewbit.schemes.ggml.layout import LAYOUTS, NONLINEAR, Fields, Layout
from fewbit.schemes.ggml.search import half

_PANEL = 256  # columns, or a block where that is more
_NARROW = 1e-3  # of the product of two curvatures: below that, two directions count as one


@dataclass(frozen=True)
class BlockGrids(Grids):
    """As stored: d, dmin [N, blocks] in the dtype of the values, sc, m int16 [N, sub-blocks]; None if there is none."""

    name: str
    d: Tensor
    dmin: Tensor | None
    sc: Tensor | None
    m: Tensor | None

    @property
    def kind(self) -> Layout:
        return LAYOUTS[self.name]

    @cached_property
    def scale(self) -> Tensor:
        """What a level is multiplied by, [N, sub-blocks]."""
        return self._times(self.d, self.sc)

    @cached_property
    def offset(self) -> Tensor | None:
        """What is then subtracted, [N, sub-blocks]."""
        return None if self.dmin is None else self._times(self.dmin, self.m)

    @cached_property
    def _divisor(self) -> Tensor:
        return torch.where(self.scale == 0, torch.inf, self.scale)  # all is level nought there

    def _times(self, unit: Tensor, steps: Tensor | None) -> Tensor:
        if steps is None:
            return unit
        out: Tensor = unit.unsqueeze(-1) * steps.unflatten(1, (unit.shape[1], -1))
        return out.flatten(1)

    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        x, divisor, offset = self._aligned(w, columns, self._divisor)
        return nearest(self.kind, (x if offset is None else x + offset) / divisor).reshape(w.shape)

    def decode(self, codes: Tensor, columns: Columns = ALL) -> Tensor:
        levels, scale, offset = self._aligned(level(self.kind, codes, self.d.dtype), columns, self.scale)
        values = levels * scale
        return (values if offset is None else values.sub_(offset)).reshape(codes.shape)

    def uniform(self) -> Uniform | None:
        kind = self.kind
        if kind.nonlinear:
            return None
        return Uniform(self.scale, kind.zero, self.offset, 2**kind.bits - 1, kind.sub)

    def _aligned(self, x: Tensor, columns: Columns, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`x`, and scale and offset of its columns in a shape that broadcasts to it."""
        sub, offset = self.kind.sub, self.offset
        if isinstance(columns, int):
            at = columns // sub
            return x, scale[:, at], None if offset is None else offset[:, at]
        if isinstance(columns, slice) and columns == ALL:
            return x.unflatten(1, (-1, sub)), scale.unsqueeze(-1), None if offset is None else offset.unsqueeze(-1)
        if isinstance(columns, slice):
            columns = torch.arange(scale.shape[1] * sub, device=scale.device, dtype=torch.int64)[columns]
        index = columns // sub
        return x, scale[:, index], None if offset is None else offset[:, index]


def read(name: str, rows: Tensor) -> tuple[Tensor, BlockGrids]:
    """The codes and grids that `rows` uint8 [N, bytes] hold."""
    kind, n = LAYOUTS[name], len(rows)
    blocks = rows.shape[1] // kind.nbytes
    found = layout.unpack(name, rows.reshape(-1, kind.nbytes))
    d, dmin = (None if x is None else x.view(n, blocks) for x in (found.d, found.dmin))
    sc, m = (None if x is None else x.view(n, blocks * kind.subs) for x in (found.sc, found.m))
    assert d is not None
    return found.codes.view(n, blocks * kind.columns), BlockGrids(name, d, dmin, sc, m)


def written(codes: Tensor, grids: BlockGrids) -> Tensor:
    """The rows of blocks, uint8 [N, bytes], that hold these."""
    kind, n = grids.kind, len(codes)
    d, dmin = (None if x is None else x.reshape(-1, 1) for x in (grids.d, grids.dmin))
    sc, m = (None if x is None else x.reshape(-1, kind.subs) for x in (grids.sc, grids.m))
    assert d is not None
    blocks = layout.pack(grids.name, Fields(codes.reshape(-1, kind.columns), d, dmin, sc, m))
    return blocks.view(n, codes.shape[1] // kind.columns * kind.nbytes)


def level(kind: Layout, codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The level of each code, in float32 by default."""
    dtype = dtype or torch.float32
    if kind.nonlinear:
        table = torch.tensor(NONLINEAR, dtype=dtype, device=codes.device)
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    return codes.to(dtype).sub_(kind.zero) if kind.zero else codes.to(dtype)


def nearest(kind: Layout, x: Tensor) -> Tensor:
    """Codes (uint8) of the levels nearest to x, which is overwritten; ties to even, for nonlinear levels down."""
    if kind.nonlinear:
        levels = torch.tensor(NONLINEAR, dtype=x.dtype, device=x.device)
        return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    return x.round_().add_(kind.zero).clamp_(0, 2**kind.bits - 1).to(torch.uint8)


def refit(w: Tensor, codes: Tensor, grids: BlockGrids, hessian: Tensor, ridge: float) -> BlockGrids:
    """The grids with the sub-scales of each block, then its d and dmin, re-solved under tr(E (H + ridge I) Eᵀ).

    Scale and offset are solved together, rounded as they are stored, and kept only where a row gains. What follows
    a panel of columns hears of it once.
    """
    kind, k = grids.kind, w.shape[1]
    gradient = (error := w - grids.decode(codes)) @ hessian
    gradient.add_(error, alpha=ridge)
    del error
    dtype, width = gradient.dtype, max(kind.columns, _PANEL)
    d, dmin = grids.d.to(dtype, copy=True), None if grids.dmin is None else grids.dmin.to(dtype, copy=True)
    sc, m = (None if x is None else x.to(dtype) for x in (grids.sc, grids.m))
    for start in range(0, k, width):
        panel = slice(start, min(start + width, k))
        inner = hessian[panel, panel].clone()
        inner.diagonal().add_(ridge)
        steps = _Steps(gradient[:, panel].clone(), inner)
        levels = level(kind, codes[:, panel], dtype)
        for block in range(start // kind.columns, panel.stop // kind.columns):
            first = block * kind.subs
            for g in range(first, first + kind.subs) if sc is not None else ():
                here = slice(g * kind.sub - start, (g + 1) * kind.sub - start)
                up, down = levels[:, here] * d[:, block, None], None
                if dmin is not None:
                    down = -dmin[:, block, None].expand_as(up)
                _solve(steps, here, up, down, (sc, m), g, (_whole(kind.sc), _whole((0, kind.m))))
            here = slice(block * kind.columns - start, (block + 1) * kind.columns - start)
            up = levels[:, here] if sc is None else levels[:, here] * _spread(sc, first, kind)
            down = None
            if dmin is not None:
                down = torch.full_like(up, -1) if m is None else -_spread(m, first, kind)
            _solve(steps, here, up, down, (d, dmin), block, (half, half))
        gradient[:, panel.stop :] -= steps.moves @ hessian[panel, panel.stop :]
    sc, m = (None if x is None else x.to(torch.int16) for x in (sc, m))
    return replace(grids, d=d, dmin=dmin, sc=sc, m=m)


def _spread(steps: Tensor, first: int, kind: Layout) -> Tensor:
    """Sub-scales of the block whose first is `first`, one for each column."""
    return steps[:, first : first + kind.subs].repeat_interleave(kind.sub, 1)


def _whole(bounds: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.round().clamp_(*bounds)


@dataclass
class _Steps:
    """A panel of columns: E (H + ridge I) there, the curvature among them, and what its values have moved so far."""

    gradient: Tensor
    inner: Tensor

    def __post_init__(self) -> None:
        self.moves = torch.zeros_like(self.gradient)

    def apply(self, here: slice, moved: Tensor) -> None:
        self.gradient -= moved @ self.inner[here]
        self.moves[:, here] += moved


def _solve(
    steps: _Steps,
    here: slice,
    up: Tensor,
    down: Tensor | None,
    held: tuple[Tensor | None, Tensor | None],
    at: int,
    store: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
) -> None:
    """Move scale and offset, columns `at` of the two that are `held`, to the best of a few that can be stored.

    The values of the columns `here` move along `up` [N, columns] with the scale and along `down` with the offset.
    """
    scale, offset = held
    assert scale is not None
    inner, gradient = steps.inner[here, here], steps.gradient[:, here]
    bent = up @ inner
    uu, gu = (bent * up).sum(1), (gradient * up).sum(1)
    s, o = scale[:, at], scale[:, at] if offset is None else offset[:, at]

    def usable(store: Callable[[Tensor], Tensor], old: Tensor, by: Tensor) -> Tensor:
        return store(torch.where(by.isfinite(), old + by, old)) - old

    if down is None or offset is None:
        a = usable(store[0], s, gu / uu)
        a = torch.where(a * (2 * gu - a * uu) > 0, a, 0.0)
        steps.apply(here, a.unsqueeze(1) * up)
        scale[:, at] = store[0](s + a)
        return
    ud, gd, dd = (bent * down).sum(1), (gradient * down).sum(1), ((down @ inner) * down).sum(1)
    whole, none = uu * dd - ud * ud, torch.zeros_like(s)
    joint = torch.where(whole > _NARROW * uu * dd, (gu * dd - gd * ud) / whole, 0.0)
    best, a, b = none, none, none
    for wanted in (joint, gu / uu, none):
        # The offset answers the scale as it is stored.
        moved = usable(store[0], s, wanted)
        shift = usable(store[1], o, (gd - moved * ud) / dd)
        for tried in (shift, none):
            gain = moved * (2 * gu - moved * uu) + tried * (2 * gd - tried * dd) - 2 * moved * tried * ud
            better = gain > best
            best, a, b = (torch.where(better, x, y) for x, y in ((gain, best), (moved, a), (tried, b)))
    steps.apply(here, a.unsqueeze(1) * up + b.unsqueeze(1) * down)
    scale[:, at], offset[:, at] = store[0](s + a), store[1](o + b)  # again: a difference of two halves may be no half
