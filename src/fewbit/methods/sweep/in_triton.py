"""A sweep over a panel of columns in one launch, for plain grids. It computes what `definition.Sweep` does.

Where scales are chosen with the codes (`groups`), a launch rounds one group under all of its `nearby` scales, one after
the other, and keeps the best of each row.

Each program holds all columns of the panel for a few rows in registers. Rows do not depend on each other, so programs
never wait for one another. A program takes one column after another: it extracts the column by a masked sum, rounds it,
and subtracts its move from the whole panel by a rank-one update. This takes about five operations for each pair of
columns and each row, which is negligible beside 128 times ten launches: on an H200, GPTQ's pass over a decoder block of
an 8B model takes 98 ms, and 5.5 s in torch (benchmarks/results/2026-11-h200-quantize.md).

Division and rounding are those of torch: IEEE division, and ties to even, or as the edges between uneven levels say.
Sums may run in another order, and products and sums may be fused, so results may differ in the last digit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbit.methods.sweep.definition import PANEL, Sweep
from fewbit.methods.sweep.groups import GroupSweep, Rounded
from fewbit.schemes.base import Grids, Plain, Uniform

_GROUP_ROWS = 32  # rows of a program that rounds one group: 32 x 16 floats, and as many of codes, values and errors
_ROWS = 16  # rows of a program: 16 x 128 floats take 16 registers in each of 128 threads


class FusedSweep(Sweep):
    """`Sweep` with one launch per panel. `plain` is the same grids; all its tensors are float32."""

    def __init__(self, grids: Grids, plain: Plain, codes: Tensor, order: Tensor) -> None:
        self.grids, self.codes, self.order, self.plain = grids, codes, order.contiguous(), plain
        # [groups, N], so that the rows of a program are contiguous.
        self.scale = plain.scale.T.contiguous()
        self.zero = self.offset = self.table = None
        self.middle, self.top = 0.0, 0.0  # the zero of all groups, and the largest code
        if isinstance(plain, Uniform):
            self.top = float(plain.top)
            self.offset = None if plain.offset is None else plain.offset.T.contiguous()
            if isinstance(plain.zero, Tensor):
                self.zero = plain.zero.T.contiguous()
            else:
                self.middle = float(plain.zero)
        else:  # levels, codes, edges
            rows = (plain.levels, tuple(map(float, plain.codes)), (*plain.edges, float("inf")))
            self.table = torch.tensor(rows, dtype=torch.float32, device=codes.device)

    def feed_back(self, start: int, stop: int, panel: Tensor, factor: Tensor) -> Tensor:
        return self._launch(start, stop, panel, factor, None)

    def descend(self, start: int, stop: int, panel: Tensor, inner: Tensor, values: Tensor) -> Tensor:
        return self._launch(start, stop, panel, inner, values)

    def _launch(self, start: int, stop: int, panel: Tensor, mixing: Tensor, values: Tensor | None) -> Tensor:
        width, n = panel.shape
        assert width == stop - start <= PANEL
        assert panel.stride(1) == 1
        mixing = mixing.contiguous()  # U arrives in column-major order
        moves = torch.empty(width, n, dtype=torch.float32, device=panel.device)
        with torch.cuda.device_of(panel):  # a launch uses the current GPU
            _sweep[(triton.cdiv(n, _ROWS),)](
                panel,
                mixing,
                self.order[start:stop],
                self.scale,
                self.scale if self.zero is None else self.zero,
                self.scale if self.offset is None else self.offset,
                self.scale if self.table is None else self.table,
                self.scale if values is None else values,
                self.codes,
                moves,
                n,
                panel.stride(0),
                mixing.stride(0),
                self.plain.group,
                self.middle,
                self.top,
                LEVELS=0 if self.table is None else self.table.shape[1],
                ZEROS=self.zero is not None,
                OFFSETS=self.offset is not None,
                DESCENT=values is not None,
                ROWS=_ROWS,
                # A constexpr, because Triton's interpreter fails on other loop bounds with the newest NumPy.
                COUNT=width,
                WIDTH=PANEL,
                num_warps=4,
            )
        return moves


class FusedGroups(GroupSweep):
    """`GroupSweep` with one launch per group, for float32."""

    def rounded(self, w: Tensor, factor: Tensor, nearby: Uniform) -> Rounded:
        (width, n), choices = w.shape, len(nearby.scale)
        w, factor, scale = w.contiguous(), factor.contiguous(), nearby.scale.contiguous()
        offset = scale if nearby.offset is None else nearby.offset.contiguous()
        choice = torch.empty(n, dtype=torch.int64, device=w.device)
        codes, values, errors = torch.empty_like(w, dtype=torch.uint8), torch.empty_like(w), torch.empty_like(w)
        with torch.cuda.device_of(w):  # a launch uses the current GPU
            _round[(triton.cdiv(n, _GROUP_ROWS),)](
                w,
                factor,
                scale,
                offset,
                choice,
                codes,
                values,
                errors,
                n,
                float(nearby.zero),
                float(nearby.top),
                OFFSETS=nearby.offset is not None,
                CHOICES=choices,
                WIDTH=width,
                ROWS=_GROUP_ROWS,
                num_warps=4,
            )
        return Rounded(choice, codes, values, errors)


@triton.jit
def _sweep(
    panel,
    mixing,
    order,
    scales,
    zeros,
    offsets,
    table,
    values,
    codes,
    moves,
    n,
    panel_stride,
    mixing_stride,
    group,
    zero,
    top,
    LEVELS: tl.constexpr,
    ZEROS: tl.constexpr,
    OFFSETS: tl.constexpr,
    DESCENT: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n
    columns = tl.arange(0, WIDTH)
    held = tl.load(
        panel + columns[None, :].to(tl.int64) * panel_stride + rows[:, None],
        mask=inside[:, None] & (columns < COUNT)[None, :],
        other=0.0,
    )
    for i in range(COUNT):
        column = tl.load(order + i)
        here = (column // group) * n + rows
        scale = tl.load(scales + here, mask=inside, other=1.0)
        divisor = tl.where(scale == 0, float("inf"), scale)
        middle = tl.load(zeros + here, mask=inside, other=0.0) if ZEROS else zero
        down = tl.load(offsets + here, mask=inside, other=0.0) if OFFSETS else 0.0
        row = tl.load(mixing + i * mixing_stride + columns, mask=columns < COUNT, other=0.0)
        own = tl.load(mixing + i * mixing_stride + i)
        target = tl.sum(tl.where((columns == i)[None, :], held, 0.0), 1)
        if DESCENT:
            before = tl.load(values + column * n + rows, mask=inside, other=0.0)
            target = before + tl.div_rn(target, tl.maximum(own, 1e-30))
        level = tl.div_rn(target + down, divisor)
        if LEVELS:
            rank = tl.zeros_like(rows)
            for edge in range(LEVELS - 1):
                rank += (level > tl.load(table + 2 * LEVELS + edge)).to(tl.int64)
            code = tl.load(table + LEVELS + rank)
            value = tl.load(table + rank) * scale
        else:
            level = tl.minimum(tl.maximum(level, -4194304.0), 4194304.0)
            level = (level + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to the nearest integer, ties to even
            code = tl.minimum(tl.maximum(level + middle, 0.0), top)
            value = (code - middle) * scale - down
        if DESCENT:
            move = value - before
        else:
            move = tl.div_rn(target - value, own)
        held -= row[None, :] * move[:, None]
        tl.store(codes + column * n + rows, code.to(tl.uint8), mask=inside)
        tl.store(moves + i * n + rows, move, mask=inside)


@triton.jit
def _round(
    w,
    factor,
    scales,
    offsets,
    choice,
    codes,
    values,
    errors,
    n,
    zero,
    top,
    OFFSETS: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n
    columns = tl.arange(0, WIDTH)
    place = columns[None, :].to(tl.int64) * n + rows[:, None]
    first = tl.load(w + place, mask=inside[:, None], other=0.0)
    best_code, best_value, best_error = first, first, first
    least = tl.full((ROWS,), float("inf"), tl.float32)
    best = tl.zeros((ROWS,), tl.int64)
    for c in range(CHOICES):
        scale = tl.load(scales + c * n + rows, mask=inside, other=1.0)
        divisor = tl.where(scale == 0, float("inf"), scale)
        down = tl.load(offsets + c * n + rows, mask=inside, other=0.0) if OFFSETS else 0.0
        held, code, value, error = first, first, first, first
        cost = tl.zeros((ROWS,), tl.float32)
        for i in range(WIDTH):
            row = tl.load(factor + i * WIDTH + columns)
            own = tl.load(factor + i * WIDTH + i)
            target = tl.sum(tl.where((columns == i)[None, :], held, 0.0), 1)
            level = tl.div_rn(target + down, divisor)
            level = tl.minimum(tl.maximum(level, -4194304.0), 4194304.0)
            level = (level + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to the nearest integer, ties to even
            level = tl.minimum(tl.maximum(level + zero, 0.0), top)
            stored = (level - zero) * scale - down
            missed = tl.div_rn(target - stored, own)
            held -= row[None, :] * missed[:, None]
            here = (columns == i)[None, :]
            code = tl.where(here, level[:, None], code)
            value = tl.where(here, stored[:, None], value)
            error = tl.where(here, missed[:, None], error)
            cost += missed * missed
        better = (cost < least) | (c == 0)  # a row may have no cost that is finite
        least = tl.where(better, cost, least)
        best = tl.where(better, c, best)
        best_code = tl.where(better[:, None], code, best_code)
        best_value = tl.where(better[:, None], value, best_value)
        best_error = tl.where(better[:, None], error, best_error)
    tl.store(choice + rows, best, mask=inside)
    tl.store(codes + place, best_code.to(tl.uint8), mask=inside[:, None])
    tl.store(values + place, best_value, mask=inside[:, None])
    tl.store(errors + place, best_error, mask=inside[:, None])
