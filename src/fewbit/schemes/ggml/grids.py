"""The grids of a weight in ggml blocks: encoding, decoding, packing, and refitting the scales of chosen codes.

A value is scale * level[code] - offset, with scale = d sc and offset = dmin m for each sub-block. All products are
exact in float32 (11 bits times at most 8 bits). Only the subtraction of an offset rounds, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TypeVar

from fewbit.lazy import Tensor, torch
from fewbit.products import add_halves
from fewbit.schemes.base import ALL, Columns, Grids, Plain, Uneven, Uniform
from fewbit.schemes.ggml import layout
from fewbit.schemes.ggml.layout import LAYOUTS, NONLINEAR, Fields, Layout
from fewbit.schemes.ggml.search import half

G = TypeVar("G", bound="BlockGrids")
_PANEL = 256  # columns processed between updates of the full gradient; at least one block
# The smallest det / (uu dd) at which scale and offset are solved together; below it they are nearly parallel.
_NARROW = 1e-3

# By whether there is an m: by how much sc and m of a sub-block may change, from nothing to the most.
_NEAR = {
    False: sorted(product(range(-4, 5), [0]), key=lambda by: abs(by[0])),
    True: sorted(product(range(-2, 3), range(-4, 5)), key=lambda by: abs(by[0]) + abs(by[1])),
}


@dataclass(frozen=True)
class BlockGrids(Grids):
    """The stored grid: d, dmin [N, blocks] in the dtype of the values; sc, m int16 [N, sub-blocks]; None if absent."""

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
        """The factor of a level, d sc, [N, sub-blocks]."""
        return self._times(self.d, self.sc)

    @cached_property
    def offset(self) -> Tensor | None:
        """The subtracted offset, dmin m, [N, sub-blocks]."""
        return None if self.dmin is None else self._times(self.dmin, self.m)

    @cached_property
    def _divisor(self) -> Tensor:
        return torch.where(self.scale == 0, torch.inf, self.scale)  # with a scale of 0, all weights get level 0

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

    def plain(self) -> Plain | None:
        kind = self.kind
        if kind.nonlinear:
            return Uneven.of(self.scale, NONLINEAR, kind.sub)
        return Uniform(self.scale, kind.zero, self.offset, 2**kind.bits - 1, kind.sub)

    @property
    def run(self) -> int:
        return self.kind.run

    @cached_property
    def _steps(self) -> Tensor:
        """The choices for sc and m, int16 [2, choices]."""
        return torch.tensor(_NEAR[self.m is not None], dtype=torch.int16, device=self.d.device).T

    def _stepped(self, steps: Tensor, sc: Tensor | None, m: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert sc is not None
        return (sc + steps[0]).clamp_(*self.kind.sc), None if m is None else (m + steps[1]).clamp_(0, self.kind.m)

    def nearby(self, group: int, most: int | None = None) -> Uniform:
        kind, block = self.kind, group * self.kind.sub // self.kind.columns
        own = (None if x is None else x[:, group] for x in (self.sc, self.m))
        sc, m = self._stepped(self._steps[:, :most].unsqueeze(-1), *own)
        offset = None if m is None or self.dmin is None else self.dmin[:, block] * m
        return Uniform(self.d[:, block] * sc, kind.zero, offset, 2**kind.bits - 1, kind.sub)

    def near(self, choice: Tensor) -> BlockGrids:
        sc, m = self._stepped(self._steps[:, choice.T], self.sc, self.m)
        return replace(self, sc=sc, m=m)

    def moved(self, floats: Mapping[str, Tensor]) -> Uniform | None:
        plain = replace(self, d=floats["d"], dmin=floats.get("dmin")).plain()
        return plain if isinstance(plain, Uniform) else None

    def _aligned(self, x: Tensor, columns: Columns, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`x`, and the scale and offset of its columns, in shapes that broadcast."""
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


def unpack(name: str, rows: Tensor) -> tuple[Tensor, BlockGrids]:
    """The codes uint8 [N, K] and grids of the part `blocks`, whose rows are uint8 [N, bytes]."""
    kind, n = LAYOUTS[name], len(rows)
    blocks = rows.shape[1] // kind.nbytes
    fields = layout.unpack(name, rows.reshape(-1, kind.nbytes))
    d, dmin = (None if x is None else x.view(n, blocks) for x in (fields.d, fields.dmin))
    sc, m = (None if x is None else x.view(n, blocks * kind.subs) for x in (fields.sc, fields.m))
    assert d is not None
    return fields.codes.view(n, blocks * kind.columns), BlockGrids(name, d, dmin, sc, m)


def pack(codes: Tensor, grids: BlockGrids) -> Tensor:
    """The part `blocks`, uint8 [N, bytes], with these codes and grids: the inverse of `unpack`."""
    kind, n = grids.kind, len(codes)
    d, dmin = (None if x is None else x.reshape(-1, 1) for x in (grids.d, grids.dmin))
    sc, m = (None if x is None else x.reshape(-1, kind.subs) for x in (grids.sc, grids.m))
    assert d is not None
    blocks = layout.pack(grids.name, Fields(codes.reshape(-1, kind.columns), d, dmin, sc, m))
    return blocks.view(n, codes.shape[1] // kind.columns * kind.nbytes)


def units(name: str, rows: Tensor) -> dict[str, Tensor]:
    """d, and dmin if the type has it, of the part `blocks`: float32 [N, blocks] each."""
    found = layout.units(name, rows.reshape(-1, LAYOUTS[name].nbytes))
    return {key: value.view(len(rows), -1) for key, value in found.items()}


def with_units(name: str, rows: Tensor, units: Mapping[str, Tensor]) -> Tensor:
    """A copy of the part `blocks` with other d and dmin [N, blocks], which fp16 holds."""
    flat = {key: value.reshape(-1, 1) for key, value in units.items()}
    return layout.with_units(name, rows.reshape(-1, LAYOUTS[name].nbytes), flat).view(rows.shape)


def level(kind: Layout, codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The level of each code, in float32 by default."""
    dtype = dtype or torch.float32
    if kind.table:
        table = torch.tensor(kind.table, dtype=dtype, device=codes.device)
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    return codes.to(dtype).sub_(kind.zero) if kind.zero else codes.to(dtype)


def nearest(kind: Layout, x: Tensor) -> Tensor:
    """Codes (uint8) of the levels nearest to x. Ties go to even; of nonlinear levels, to the lower. Overwrites x."""
    if kind.nonlinear:
        levels = torch.tensor(NONLINEAR, dtype=x.dtype, device=x.device)
        return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    return x.round_().add_(kind.zero).clamp_(0, 2**kind.bits - 1).to(torch.uint8)


def refit(w: Tensor, codes: Tensor, grids: G, hessian: Tensor, ridge: float) -> G:
    """The grids re-solved for fixed codes, under tr(E (H + ridge I) Eᵀ): first a block's sub-scales, then d and dmin.

    Scale and offset are solved together and rounded as stored. A row keeps the new ones only if they lower its error.
    Blocks are processed in panels of columns; the gradient beyond a panel is updated once per panel.
    """
    kind, k = grids.kind, w.shape[1]
    error = w - grids.decode(codes)
    gradient = add_halves(error * ridge, error, hessian)
    del error
    dtype, width = gradient.dtype, max(kind.columns, _PANEL)
    d, dmin = grids.d.to(dtype, copy=True), None if grids.dmin is None else grids.dmin.to(dtype, copy=True)
    sc, m = (None if x is None else x.to(dtype) for x in (grids.sc, grids.m))
    for start in range(0, k, width):
        panel = slice(start, min(start + width, k))
        inner = hessian[panel, panel].clone()
        inner.diagonal().add_(ridge)
        state = _Panel(gradient[:, panel].clone(), inner)
        levels = level(kind, codes[:, panel], dtype)
        for block in range(start // kind.columns, panel.stop // kind.columns):
            first = block * kind.subs
            for g in range(first, first + kind.subs) if sc is not None else ():
                here = slice(g * kind.sub - start, (g + 1) * kind.sub - start)
                up, down = levels[:, here] * d[:, block, None], None
                if dmin is not None:
                    down = -dmin[:, block, None].expand_as(up)
                _solve(state, here, up, down, (sc, m), g, (kind.step, lambda m: m.round_().clamp_(0, kind.m)))
            here = slice(block * kind.columns - start, (block + 1) * kind.columns - start)
            up = levels[:, here] if sc is None else levels[:, here] * _spread(sc, first, kind)
            down = None
            if dmin is not None:
                down = torch.full_like(up, -1) if m is None else -_spread(m, first, kind)
            _solve(state, here, up, down, (d, dmin), block, (half, half))
        add_halves(gradient[:, panel.stop :], state.moves, hessian[panel, panel.stop :], alpha=-1)
    sc, m = (None if x is None else x.to(torch.int16) for x in (sc, m))
    return replace(grids, d=d, dmin=dmin, sc=sc, m=m)


def _spread(steps: Tensor, first: int, kind: Layout) -> Tensor:
    """The sub-scales of one block, repeated for its columns, [N, columns]. `first`: index of its first sub-block."""
    return steps[:, first : first + kind.subs].repeat_interleave(kind.sub, 1)


@dataclass
class _Panel:
    """The state of a panel of columns during a refit.

    gradient: E (H + ridge I) in these columns, [N, columns]. inner: H + ridge I among them, [columns, columns].
    moves: how far the decoded values have moved so far, [N, columns].
    """

    gradient: Tensor
    inner: Tensor

    def __post_init__(self) -> None:
        self.moves = torch.zeros_like(self.gradient)

    def apply(self, here: slice, moved: Tensor) -> None:
        self.gradient -= moved @ self.inner[here]
        self.moves[:, here] += moved


def _solve(
    panel: _Panel,
    here: slice,
    up: Tensor,
    down: Tensor | None,
    params: tuple[Tensor | None, Tensor | None],
    at: int,
    store: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
) -> None:
    """Replace one scale and offset of each row by the best of a few candidates that can be stored, in place.

    params: scales and offsets, of which column `at` is solved. up, down: derivatives [N, columns] of the values in the
    columns `here` by the scale and by the offset. store: functions that round a scale and an offset as stored.
    """
    scale, offset = params
    assert scale is not None
    inner, gradient = panel.inner[here, here], panel.gradient[:, here]
    bent = up @ inner
    uu, gu = (bent * up).sum(1), (gradient * up).sum(1)
    s, o = scale[:, at], scale[:, at] if offset is None else offset[:, at]

    def stored_step(store: Callable[[Tensor], Tensor], old: Tensor, by: Tensor) -> Tensor:
        return store(torch.where(by.isfinite(), old + by, old)) - old

    if down is None or offset is None:
        a = stored_step(store[0], s, gu / uu)
        a = torch.where(a * (2 * gu - a * uu) > 0, a, 0.0)
        panel.apply(here, a.unsqueeze(1) * up)
        scale[:, at] = store[0](s + a)
        return
    ud, gd, dd = (bent * down).sum(1), (gradient * down).sum(1), ((down @ inner) * down).sum(1)
    determinant, none = uu * dd - ud * ud, torch.zeros_like(s)
    joint = torch.where(determinant > _NARROW * uu * dd, (gu * dd - gd * ud) / determinant, 0.0)
    best, a, b = none, none, none
    for step in (joint, gu / uu, none):
        # Solve the offset for the scale as it is stored.
        moved = stored_step(store[0], s, step)
        shift = stored_step(store[1], o, (gd - moved * ud) / dd)
        for tried in (shift, none):
            gain = moved * (2 * gu - moved * uu) + tried * (2 * gd - tried * dd) - 2 * moved * tried * ud
            better = gain > best
            best, a, b = (torch.where(better, x, y) for x, y in ((gain, best), (moved, a), (tried, b)))
    panel.apply(here, a.unsqueeze(1) * up + b.unsqueeze(1) * down)
    # Round again: old + (new - old) may differ from the fp16 number in the last digit.
    scale[:, at], offset[:, at] = store[0](s + a), store[1](o + b)
