"""The Triton kernels: `gemv` for single rows of activations, `values` to dequantize the weight.

`gemv` is used if the CUDA kernels cannot be compiled.

Both kernels decode in the same way. A code c of b bits becomes the float 1 + c / 2^b: its bits are placed at the top of
the mantissa of 1.0, which takes a shift and one three-way logical instruction. The factor 2^b and the 1 are folded into
the scale and the offset of the group, so a weight costs one more fused multiply-add. Levels that are not integers are
looked up in a table; sixteen levels fit in one cache line. The bits of FP4 and FP8 numbers, moved, are those of a
float16, which is the number times a power of two; the scale of the group includes the reciprocal.

In `gemv` a program takes some rows of the weight and all of K. A thread reads four words (16 bytes) of each row, and
their activations once for all rows. K is split over threads, which add up their sums once at the end. Blocks and
layouts are chosen so that all tensors of a step are in the same threads, and nothing passes through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN, SUPER, MAPPED, POWER, FACTORED = (tl.constexpr(kind) for kind in (0, 1, 2, 4, 5))
CONSTANT, ZERO, MINIMUM, SUPER_MINIMUM = (tl.constexpr(kind) for kind in range(4))
TABLE, E2M1, E4M3 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _value(w, h, table, one, lane: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, LEVEL: tl.constexpr):
    """For the code of each word in one lane: its level (FP4: times 2^-14, FP8: times 2^-8), or 1 + code / 2^BITS.

    The result is float32. `one` has the bits of 1.0. It is a kernel argument because an instruction takes only one
    constant; this saves one instruction.
    """
    if LEVEL == E2M1:
        return _small(w >> (lane * LOW), LOW, 9)
    if LEVEL == E4M3:
        return _small(w >> (lane * LOW), LOW, 7)
    if LEVEL == TABLE:
        code = (w >> (lane * LOW)) & (2**LOW - 1)
        return tl.reshape(tl.gather(table, tl.reshape(code, [code.numel]), 0), code.shape)
    LEFT: tl.constexpr = 23 - BITS - lane * LOW
    if LEFT >= 0:
        code = w << LEFT
    else:
        code = w >> -LEFT
    code = (code & ((2**LOW - 1) << (23 - BITS))) | one
    if BITS > LOW:
        HIGH: tl.constexpr = BITS - LOW
        UP: tl.constexpr = 23 - HIGH - lane * HIGH
        code = code | ((h << UP) & ((2**HIGH - 1) << (23 - HIGH)))
    return code.to(tl.float32, bitcast=True)


@triton.jit
def _small(code, BITS: tl.constexpr, low: tl.constexpr):
    """A float of BITS bits as float32. Its exponent and mantissa become those of a float16 that end at bit `low`."""
    bits = ((code & (2 ** (BITS - 1) - 1)) << low) | ((code & 2 ** (BITS - 1)) << (16 - BITS))
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _place(row, across, at):
    """The index of piece `at` (of `across` per row) of a row. Rows are stored in groups of sixteen."""
    return ((row // 16) * across + at) * 16 + row % 16


@triton.jit
def _grid(
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    row,
    column,
    groups: tl.constexpr,
    blocks: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    LEVEL: tl.constexpr,
    FACTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    SHARED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scale S and offset B of w = S value + B for `column` of `row`. float32."""
    BESIDE: tl.constexpr = TILE // GROUP if TILE % GROUP == 0 else 1
    ACROSS: tl.constexpr = (groups + BESIDE - 1) // BESIDE
    if SHARED:
        at = (row // 16) * groups + column // GROUP
    else:
        beside = (column // GROUP) % BESIDE
        if SCALE == FACTORED:
            beside = beside % 2 * 4 + beside // 2
        at = _place(row, ACROSS, column // (GROUP * BESIDE)) * BESIDE + beside
    if BLOCK == GROUP:
        block = at
    else:
        block = _place(row, blocks, column // BLOCK)
    if SCALE == PLAIN:
        s = tl.load(a0 + at).to(tl.float32)
    elif SCALE == SUPER:
        s = tl.load(a0 + block).to(tl.float32) * tl.load(a1 + at).to(tl.float32)
    elif SCALE == POWER:
        s = tl.maximum(tl.load(a0 + at).to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    elif SCALE == FACTORED:
        s = _small(tl.load(a0 + at).to(tl.int32), 8, 7) * 2.0**8 * tl.load(a1 + row)
    else:
        s = tl.load(a3 + tl.load(a0 + at).to(tl.int32)) * tl.load(
            a1 + (row * groups + column // GROUP) // 256
        ) + tl.load(a2)
    if DIVISOR != 1:
        s = s * (FACTOR / DIVISOR)
    if LEVEL == TABLE:
        return s, s * 0.0
    if LEVEL == E2M1:
        return s * 2.0**14, s * 0.0
    if LEVEL == E4M3:
        return s * 2.0**8, s * 0.0
    if OFFSET == CONSTANT:
        b = s * (-(2.0**BITS) - ZERO_POINT)
    elif OFFSET == ZERO:
        b = s * (-(2.0**BITS) - tl.load(b0 + at).to(tl.float32))
    elif OFFSET == MINIMUM:
        b = tl.load(b0 + at).to(tl.float32) - s * 2.0**BITS
    else:
        least = tl.load(b0 + block).to(tl.float32) * tl.load(b1 + at).to(tl.float32)
        b = -s * 2.0**BITS - least
    return s * 2.0**BITS, b


@triton.jit
def _pair(q, TILE: tl.constexpr, SUB: tl.constexpr):
    """Half of the first column of word q. In every 32 columns, the word holds this column and the next."""
    if SUB == 16:
        return (q // 16) * (TILE // 2) + ((q % 4) // 2) * 8 + ((q % 16) // 4) * 2 + q % 2
    return (q // 16) * (TILE // 2) + q % 16


@triton.jit
def _column(run, TILE: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr):
    """A column of the group to which a run of words belongs, in the first 32 columns of its tile."""
    if RUN == 2:
        return (run // 8) * TILE + (run % 2) * 16
    if GROUP == 16:
        return (run // 4) * TILE + (run % 4) // 2 * 16
    return (run // 4) * TILE


@triton.constexpr_function
def _lane(span, side, LANES, LEVEL):
    if LEVEL == 1:  # a table
        return 2 * span + side
    else:
        return span + side * (LANES // 2)


@triton.jit
def _side(both, side: tl.constexpr, BFLOAT: tl.constexpr):
    """One of the two activations in a word, as float32."""
    if BFLOAT:
        return ((both << 16) if side == 0 else (both & -65536)).to(tl.float32, bitcast=True)
    return (both >> (16 * side)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def gemv(
    x,
    y,
    words,
    high,
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    table,
    one,
    N,
    K: tl.constexpr,
    row_words: tl.constexpr,
    groups: tl.constexpr,
    blocks: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    LEVEL: tl.constexpr,
    FACTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    SHARED: tl.constexpr,
    SUB: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BFLOAT: tl.constexpr,
):
    """y [M, N] = x [M, K] Wᵀ. Each program of the second axis takes one row of x, stored as two values per word."""
    if LEVEL == TABLE:
        table = tl.load(table + tl.arange(0, 16))
    LANES: tl.constexpr = 32 // LOW
    TILE: tl.constexpr = 16 * LANES
    RUN: tl.constexpr = 2 if SUB == 16 else 4  # consecutive words of one group that a thread has
    SPAN: tl.constexpr = 32 if SUB == 16 else SUB
    x += tl.program_id(1) * (K // 2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    acc = tl.zeros([BN, BW // RUN], dtype=tl.float32)
    for start in range(0, row_words, BW):
        q = start + tl.arange(0, BW)
        at = _place(row, row_words // 16, (q // 16)[None, :]) * 16 + (q % 16)[None, :]
        if EVEN:
            w = tl.load(words + at, eviction_policy="evict_first")
        else:
            w = tl.load(words + at, mask=q[None, :] < row_words, other=0)
        h = w
        if BITS > LOW:
            h = tl.load(high + at, mask=q[None, :] < row_words, other=0).to(tl.int32)
        pair = _pair(q, TILE, SUB)
        column = _column(start // RUN + tl.arange(0, BW // RUN), TILE, RUN, GROUP)
        for sub in tl.static_range(TILE // SPAN):
            part = tl.zeros([BN, BW], dtype=tl.float32)
            total = tl.zeros([BW], dtype=tl.float32)
            for i in tl.static_range(SPAN // 32):
                of_x = pair + 16 * (sub * (SPAN // 32) + i)
                both = tl.load(x + of_x, mask=of_x < K // 2, other=0)
                for side in tl.static_range(2):
                    xs = _side(both, side, BFLOAT)
                    part += (
                        _value(w, h, table, one, _lane(sub * (SPAN // 32) + i, side, LANES, LEVEL), BITS, LOW, LEVEL)
                        * xs[None, :]
                    )
                    total += xs
            dot = tl.sum(tl.reshape(part, [BN, BW // RUN, RUN]), 2)
            ones = tl.sum(tl.reshape(total, [BW // RUN, RUN]), 1)
            s, b = _grid(
                a0,
                a1,
                a2,
                a3,
                b0,
                b1,
                row,
                tl.minimum(column + sub * SPAN, K - 1)[None, :],
                groups,
                blocks,
                BITS,
                GROUP,
                BLOCK,
                SCALE,
                OFFSET,
                ZERO_POINT,
                LEVEL,
                FACTOR,
                DIVISOR,
                SHARED,
                TILE,
            )
            acc += s * dot + b * ones[None, :]
    out = tl.sum(acc, 1)
    tl.store(y + tl.program_id(1) * N + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def values(
    y,
    words,
    high,
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    table,
    one,
    top,
    bottom,
    N,
    K: tl.constexpr,
    row_words: tl.constexpr,
    groups: tl.constexpr,
    blocks: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    LEVEL: tl.constexpr,
    FACTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    SHARED: tl.constexpr,
    SUB: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BFLOAT: tl.constexpr,
):
    """Rows `top` to `bottom` of the weight, dequantized, as y [rows, K] with two values per word."""
    if LEVEL == TABLE:
        table = tl.load(table + tl.arange(0, 16))
    LANES: tl.constexpr = 32 // LOW
    TILE: tl.constexpr = 16 * LANES
    out = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(top + out, bottom - 1).to(tl.int64)[:, None]
    q = tl.program_id(1) * BW + tl.arange(0, BW)
    inside = (top + out < bottom)[:, None] & (q < row_words)[None, :]
    at = _place(row, row_words // 16, (q // 16)[None, :]) * 16 + (q % 16)[None, :]
    w = tl.load(words + at, mask=inside, other=0)
    h = w
    if BITS > LOW:
        h = tl.load(high + at, mask=inside, other=0).to(tl.int32)
    RUN: tl.constexpr = 2 if SUB == 16 else 4
    SPAN: tl.constexpr = 32 if SUB == 16 else SUB
    pair = _pair(q, TILE, SUB)
    run = tl.program_id(1) * (BW // RUN) + tl.arange(0, BW // RUN)
    for sub in tl.static_range(TILE // SPAN):
        column = tl.minimum(_column(run, TILE, RUN, GROUP) + sub * SPAN, K - 1)
        s, b = _grid(
            a0,
            a1,
            a2,
            a3,
            b0,
            b1,
            row,
            column[None, :],
            groups,
            blocks,
            BITS,
            GROUP,
            BLOCK,
            SCALE,
            OFFSET,
            ZERO_POINT,
            LEVEL,
            FACTOR,
            DIVISOR,
            SHARED,
            TILE,
        )
        for i in tl.static_range(SPAN // 32):
            k = pair + 16 * (sub * (SPAN // 32) + i)
            there = y + out.to(tl.int64)[:, None] * (K // 2) + k[None, :]
            kept = inside & (k < K // 2)[None, :]
            both = tl.zeros([BN, BW], dtype=tl.int32)
            for side in tl.static_range(2):
                v = tl.reshape(
                    _value(w, h, table, one, _lane(sub * (SPAN // 32) + i, side, LANES, LEVEL), BITS, LOW, LEVEL),
                    [BN, BW // RUN, RUN],
                )
                v = tl.reshape(v * s[:, :, None] + b[:, :, None], [BN, BW])
                half = v.to(tl.bfloat16 if BFLOAT else tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
                both = both | ((half & 65535) << (16 * side))
            tl.store(there, both, mask=kept)
