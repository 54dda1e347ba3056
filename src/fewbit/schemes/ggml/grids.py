"""Grids of a whole weight in blocks, and the re-solving of their scales for codes that are chosen.

A value is scale * level[code] - offset, with scale = d sc and offset = dmin m for each sub-block. Those products are
exact in float32 (11 bits by at most 8), and so is the value but for one rounding where an offset is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fewbit.schemes.base import ALL, Columns, Grids
from fewbit.schemes.ggml import layout
from fewbit.schemes.ggml.layout import LAYOUTS, NONLINEAR, Fields, Layout
from fewbit.schemes.ggml.search import half

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

    def _aligned(self, x: Tensor, columns: Columns, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`x`, and scale and offset of its columns in a shape that broadcasts to it."""
        sub, offset = self.kind.sub, self.offset
        if isinstance(columns, int):
            at = columns // sub
            return x, scale[:, at], None if offset is None else offset[:, at]
        if isinstance(columns, slice) and columns == ALL:
            return x.unflatten(1, (-1, sub)), scale.unsqueeze(-1), None if offset is None else offset.unsqueeze(-1)
        if isinstance(columns, slice):
            columns = torch.arange(scale.shape[1] * sub, device=scale.device)[columns]
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


def level(kind: Layout, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The level of each code."""
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
    """The grids with sub-scales, then d and dmin, re-solved one block after the other under tr(E (H + ridge I) Eᵀ).

    Scale and offset of a block are solved together, rounded as they are stored, and kept only where a row gains.
    """
    gradient = (error := w - grids.decode(codes)) @ hessian
    gradient.add_(error, alpha=ridge)
    del error
    if grids.kind.super:
        grids = _refit_subs(codes, grids, hessian, ridge, gradient)
    return _refit_blocks(codes, grids, hessian, ridge, gradient)


def _refit_subs(codes: Tensor, grids: BlockGrids, hessian: Tensor, ridge: float, gradient: Tensor) -> BlockGrids:
    kind = grids.kind
    assert grids.sc is not None
    sc, m = grids.sc.to(gradient.dtype), None if grids.m is None else grids.m.to(gradient.dtype)
    for g in range(sc.shape[1]):
        columns, block = slice(g * kind.sub, (g + 1) * kind.sub), g // kind.subs
        up, down = level(kind, codes[:, columns], gradient.dtype) * grids.d[:, block, None], None
        if grids.dmin is not None:
            down = -grids.dmin[:, block, None].expand_as(up)
        step = _Step(gradient, hessian, ridge, columns, up, down)
        sc[:, g], least = step.best(sc[:, g], None if m is None else m[:, g], _whole(kind.sc), _whole((0, kind.m)))
        if m is not None:
            m[:, g] = least
    return replace(grids, sc=sc.to(torch.int16), m=None if m is None else m.to(torch.int16))


def _refit_blocks(codes: Tensor, grids: BlockGrids, hessian: Tensor, ridge: float, gradient: Tensor) -> BlockGrids:
    kind, d, dmin = grids.kind, grids.d.clone(), None if grids.dmin is None else grids.dmin.clone()
    for block in range(d.shape[1]):
        columns = slice(block * kind.columns, (block + 1) * kind.columns)
        subs = slice(block * kind.subs, (block + 1) * kind.subs)
        up, down = level(kind, codes[:, columns], gradient.dtype), None
        if grids.sc is not None:
            up *= grids.sc[:, subs].repeat_interleave(kind.sub, 1)
        if dmin is not None:
            down = torch.full_like(up, -1)
            if grids.m is not None:
                down *= grids.m[:, subs].repeat_interleave(kind.sub, 1)
        step = _Step(gradient, hessian, ridge, columns, up, down)
        d[:, block], least = step.best(d[:, block], None if dmin is None else dmin[:, block], half, half)
        if dmin is not None:
            dmin[:, block] = least
    return replace(grids, d=d, dmin=dmin)


def _whole(bounds: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.round().clamp_(*bounds)


class _Step:
    """Values in `columns` move along `up` and, if there is one, `down` [N, columns]; E H is the `gradient` [N, K]."""

    def __init__(
        self, gradient: Tensor, hessian: Tensor, ridge: float, columns: slice, up: Tensor, down: Tensor | None
    ) -> None:
        self.gradient, self.hessian, self.ridge, self.columns = gradient, hessian, ridge, columns
        self.up, self.down = up, down
        inner = hessian[columns, columns]
        bent = (up @ inner).add_(up, alpha=ridge)
        self.uu, self.gu = (bent * up).sum(1), (gradient[:, columns] * up).sum(1)
        if down is not None:
            self.ud, self.gd = (bent * down).sum(1), (gradient[:, columns] * down).sum(1)
            self.dd = (down @ inner).add_(down, alpha=ridge).mul_(down).sum(1)

    def best(
        self, s: Tensor, o: Tensor | None, store_s: Callable[[Tensor], Tensor], store_o: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Scale and offset [N] that lower the error most, of a few that can be stored; or those there are."""
        if self.down is None or o is None:
            moved = self._usable(store_s, s, s + self.gu / self.uu)
            gain = moved * (2 * self.gu - moved * self.uu)
            moved = torch.where(gain > 0, moved, 0.0)
            self._apply(moved.unsqueeze(1) * self.up)
            return store_s(s + moved), s
        whole = self.uu * self.dd - self.ud * self.ud
        joint = (self.gu * self.dd - self.gd * self.ud) / whole
        joint = torch.where(whole > _NARROW * self.uu * self.dd, joint, 0.0)
        best = torch.zeros_like(s)
        a, b = torch.zeros_like(s), torch.zeros_like(s)
        for wanted in (joint, self.gu / self.uu, torch.zeros_like(s)):
            # The offset answers the scale as it is stored.
            moved = self._usable(store_s, s, s + wanted)
            shift = self._usable(store_o, o, o + (self.gd - moved * self.ud) / self.dd)
            for tried in (shift, torch.zeros_like(s)):
                gain = moved * (2 * self.gu - moved * self.uu) + tried * (2 * self.gd - tried * self.dd)
                gain -= 2 * moved * tried * self.ud
                better = gain > best
                best = torch.where(better, gain, best)
                a, b = torch.where(better, moved, a), torch.where(better, tried, b)
        self._apply(a.unsqueeze(1) * self.up + b.unsqueeze(1) * self.down)
        return store_s(s + a), store_o(o + b)  # again: a difference of two halves may be no half

    def _usable(self, store: Callable[[Tensor], Tensor], old: Tensor, new: Tensor) -> Tensor:
        """The step from `old` to `new` as it will be stored; none where that is no number."""
        return store(torch.where(new.isfinite(), new, old)) - old

    def _apply(self, moved: Tensor) -> None:
        self.gradient -= moved @ self.hessian[self.columns]
        self.gradient[:, self.columns].sub_(moved, alpha=self.ridge)
