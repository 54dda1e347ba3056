"""Triton kernels of what a step does besides products: norm, rotary positions, gated activation, attention.

Each replaces several of PyTorch's kernels, and rounds where those round, so results are the same up to the order of
sums. Such a step spends most of its time on starting kernels. So each kernel lets the next one start while it runs
(`begin`), as those in `in_cuda` do.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDED, SCALED, ONE = (tl.constexpr(kind) for kind in (0, 1, 2))
SILU, TANH, ERF = (tl.constexpr(kind) for kind in (0, 1, 2))


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Wait for all that earlier kernels write, and then let the next kernel start."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def norm(x, weight, y, eps, heads, outer, inner, K, KIND: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """One row of K values: x / sqrt(mean(x²) + eps), times the weight. x has strides `outer` and `inner`."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < K
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    begin(OVERLAPS)
    start = (row // heads).to(tl.int64) * outer + (row % heads) * inner
    value = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.math.rsqrt(tl.sum(value * value) / K + eps)
    if KIND == ROUNDED:
        value = value.to(y.dtype.element_ty).to(tl.float32) * w
    elif KIND == ONE:
        value = value * (1.0 + w)
    else:
        value = value * w
    tl.store(y + row.to(tl.int64) * K + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    q, k, cos, sin, to_q, to_k,
    heads, shared, tokens, D, R, of_batch,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token: their first R values are rotated by cos and sin [batch or 1, tokens, R], D - R copied.

    The results are [batch, tokens, heads, D].
    """
    place, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, token = place // tokens, place % tokens
    begin(OVERLAPS)
    groups = tl.cdiv(heads, HEADS)
    if group < groups:
        head = group * HEADS + tl.arange(0, HEADS)
        there = head < heads
        start = q + batch * q_batch + token * q_token + head * q_head
        to = to_q + (place * heads + head) * D
    else:
        head = (group - groups) * HEADS + tl.arange(0, HEADS)
        there = head < shared
        start = k + batch * k_batch + token * k_token + head * k_head
        to = to_k + (place * shared + head) * D
    start, to, there = start[:, None], to[:, None], there[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    half = R // 2
    inside = at < half
    angle = batch * of_batch + token * R + at
    kind = to_q.dtype.element_ty
    a, b = tl.load(start + at, mask=there & inside), tl.load(start + half + at, mask=there & inside)
    c, s = tl.load(cos + angle, mask=inside), tl.load(sin + angle, mask=inside)
    e, t = tl.load(cos + angle + half, mask=inside), tl.load(sin + angle + half, mask=inside)
    a, b, c, s, e, t = (
        a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), s.to(tl.float32), e.to(tl.float32), t.to(tl.float32),
    )  # fmt: skip
    first = (a * c).to(kind).to(tl.float32) - (b * s).to(kind).to(tl.float32)
    second = (b * e).to(kind).to(tl.float32) + (a * t).to(kind).to(tl.float32)
    tl.store(to + at, first.to(kind), mask=there & inside)
    tl.store(to + half + at, second.to(kind), mask=there & inside)
    if REST:
        more = tl.arange(0, REST)[None, :]
        rest = there & (more < D - R)
        tl.store(to + R + more, tl.load(start + R + more, mask=rest), mask=rest)


@triton.jit
def gate(a, b, y, of_a, of_b, K, KIND: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """activation(a) · b for one row and BLOCK columns. of_a, of_b: distances of rows."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < K
    begin(OVERLAPS)
    value = tl.load(a + row * of_a + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(b + row * of_b + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == SILU:
        value = value / (1.0 + tl.exp(-value))
    elif KIND == TANH:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = value / (1.0 + tl.exp(-2.0 * inner))  # 0.5 (1 + tanh z) = 1 / (1 + exp(-2 z))
    else:
        value = 0.5 * value * (1.0 + tl.math.erf(value * 0.7071067811865476))
    kind = y.dtype.element_ty
    tl.store(y + row * K + at, (value.to(kind).to(tl.float32) * factor).to(kind), mask=inside)


@triton.jit
def store(
    keys, values, k, v, at, ticket,
    heads, L, DK, DV, k_batch, k_head, v_batch, v_head,
    BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Write the key and the value of one token of one head at position `at` of a cache [batch, heads, L, D].

    The last program to finish moves `at` on by one: then all have read it.
    """
    row, along = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    begin(OVERLAPS)
    position = tl.load(at)
    batch, head = row // heads, row % heads
    place = row * L + position
    key, value = along < DK, along < DV
    tl.store(keys + place * DK + along, tl.load(k + batch * k_batch + head * k_head + along, mask=key), mask=key)
    tl.store(values + place * DV + along, tl.load(v + batch * v_batch + head * v_head + along, mask=value), mask=value)
    before = tl.atomic_add(ticket, 1)
    if before == tl.num_programs(0) - 1:
        tl.store(ticket, 0)
        tl.store(at, position + 1)


@triton.jit
def attend(
    q, k, v, mask, pages, out, partial, tops, scale,
    shared, L, DK, DV, q_batch, q_head, of_mask, of_pages, count,
    GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
    ADDED: tl.constexpr, PAGED: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Attention of the query heads that share keys, over `count` blocks of keys, in base 2.

    q: [batch, heads, 1, DK] with strides. k, v: [batch, shared, L, D], contiguous. mask: [batch, L], of logits to add
    (ADDED), or true where a key is seen. With one part, out [batch, heads, DV]; else the sums of a part in partial
    [batch, heads, parts, DV], and its maximum and its sum of weights in tops [batch, heads, parts, 2].

    PAGED: k, v are [slots, shared, D], pages [batch, L / BLOCK] has the first slot of each page of BLOCK keys, and
    mask [batch] the number of keys.
    """
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    batch, head = row // shared, row % shared
    groups, of_k, of_v = tl.arange(0, 16), tl.arange(0, BK), tl.arange(0, BV)
    begin(OVERLAPS)
    first = q + batch * q_batch + head * GROUP * q_head
    inside = (groups[:, None] < GROUP) & (of_k[None, :] < DK)
    query = tl.load(first + groups[:, None] * q_head + of_k[None, :], mask=inside, other=0.0)
    best = tl.full([16], float("-inf"), dtype=tl.float32)
    total = tl.zeros([16], dtype=tl.float32)
    sums = tl.zeros([16, BV], dtype=tl.float32)
    if PAGED:
        L = tl.load(mask + batch)
        count = tl.cdiv(tl.cdiv(L, BLOCK) - part, parts)
    for i in range(count):
        at = (i * parts + part) * BLOCK + tl.arange(0, BLOCK)
        if PAGED:
            added = tl.where(at < L, 0.0, float("-inf"))
        elif ADDED:
            added = tl.load(mask + batch * of_mask + at, mask=at < L, other=float("-inf")).to(tl.float32)
        else:
            seen = tl.load(mask + batch * of_mask + at, mask=at < L, other=0)
            added = tl.where(seen != 0, 0.0, float("-inf"))
        if tl.max(added) > -1e30:  # else no key of this block counts, and it is not read
            if PAGED:
                slot = tl.load(pages + batch * of_pages + i * parts + part).to(tl.int64) + tl.arange(0, BLOCK)
                place = slot * shared + head
            else:
                place = row * L + at
            key_in, value_in = (at[:, None] < L) & (of_k[None, :] < DK), (at[:, None] < L) & (of_v[None, :] < DV)
            key = tl.load(k + place[:, None] * DK + of_k[None, :], mask=key_in, other=0.0)
            value = tl.load(v + place[:, None] * DV + of_v[None, :], mask=value_in, other=0.0)
            logits = (tl.dot(query, tl.trans(key)) * scale + added[None, :]) * 1.4426950408889634
            logits = tl.where(added[None, :] > -1e30, logits, float("-inf"))  # a hidden key may hold anything
            higher = tl.maximum(best, tl.max(logits, 1))
            weights = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(best - higher)
            total = total * shrink + tl.sum(weights, 1)
            sums = sums * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
            best = higher
    heads_at = row * GROUP + groups
    if parts == 1:
        to = out + heads_at[:, None] * DV + of_v[None, :]
        result = sums / tl.maximum(total, 1e-30)[:, None]
        tl.store(to, result.to(out.dtype.element_ty), mask=(groups[:, None] < GROUP) & (of_v[None, :] < DV))
    else:
        place = heads_at * parts + part
        left = partial + place[:, None] * DV + of_v[None, :]
        tl.store(left, sums, mask=(groups[:, None] < GROUP) & (of_v[None, :] < DV))
        tl.store(tops + place * 2, best, mask=groups < GROUP)
        tl.store(tops + place * 2 + 1, total, mask=groups < GROUP)


@triton.jit
def join(partial, tops, out, parts, DV, PARTS: tl.constexpr, BV: tl.constexpr, OVERLAPS: tl.constexpr):
    """Add up the parts of one head, in order."""
    row, part, along = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, BV)
    begin(OVERLAPS)
    place = row * parts + part
    best = tl.load(tops + place * 2, mask=part < parts, other=float("-inf"))
    total = tl.load(tops + place * 2 + 1, mask=part < parts, other=0.0)
    inside = (part[:, None] < parts) & (along[None, :] < DV)
    sums = tl.load(partial + place[:, None] * DV + along[None, :], mask=inside, other=0.0)
    highest = tl.maximum(tl.max(best), -1e30)
    weight = tl.exp2(best - highest)
    result = tl.sum(sums * weight[:, None], 0) / tl.maximum(tl.sum(total * weight), 1e-30)
    tl.store(out + row * DV + along, result.to(out.dtype.element_ty), mask=along < DV)
