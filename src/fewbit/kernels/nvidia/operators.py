"""What a step does besides products, each in one Triton kernel: norm, rotary positions, gated activation, attention.

All take float16 or bfloat16 tensors on an NVIDIA GPU, and round where PyTorch's separate operations round. With them a
Llama of 8B's shape in int4-g128-sym makes 455 tokens a second of one text on an H200. The version before made 257, with
a packed head too (benchmarks/results/2026-11-h200.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.nvidia import Nvidia

ROUNDED, SCALED, ONE = range(3)  # weight · round(x), round(weight · x), round((1 + weight) · x)
SILU, TANH, ERF = range(3)  # silu; gelu with tanh; gelu

WIDEST = 1 << 14  # the most values of a row of `rms_norm`
PAGE = 32  # keys that `attend` reads at once, and slots of a page of `attend_pages`
_PROMPT = 64  # tokens from which on a program of `rotate` takes eight heads: with one, 2048 tokens take 100 µs a layer


@cache
def _device() -> Any:
    """The module of the Triton kernels, imported on first use because it imports Triton."""
    from fewbit.kernels.nvidia import operators_in_triton as module

    return module


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether kernels can start before earlier ones end: compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, **constants: Any) -> None:
    device = args[0].device
    overlaps = _overlaps(device)
    options = {"launch_pdl": True} if overlaps else {}
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants, OVERLAPS=overlaps, num_warps=warps, **options)


def _power(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()


_there: list[bool] = []  # what `available` found; a compiler that traces a step reads it, and does not trace the search


def available() -> bool:
    """Whether Triton and a GPU are there."""
    if not _there:
        _there.append(Nvidia().unavailable() is None)
    return _there[0]


def serves(x: Tensor) -> bool:
    """Whether the operators take a tensor of this kind. They have no gradient."""
    short = x.dtype in (torch.float16, torch.bfloat16)
    trained = torch.is_grad_enabled() and x.requires_grad
    return x.is_cuda and available() and short and x.stride(-1) == 1 and not trained


def rms_norm(x: Tensor, weight: Tensor, eps: float, kind: int) -> Tensor:
    """x [..., K] / sqrt(mean(x²) + eps) in float32, times weight [K] as `kind` says."""
    k = x.shape[-1]
    heads = x.shape[-2] if x.dim() > 3 else 1
    try:
        rows = x.view(-1, heads, k)
    except RuntimeError:  # the strides do not allow it
        rows = x.reshape(-1, heads, k)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = rows.shape[0] * heads
    if count:
        strides = (rows.stride(0), rows.stride(1), k)
        block = _power(k)
        _launch(
            _device().norm, (count,), rows, weight, y, eps, heads, *strides,
            KIND=kind, BLOCK=block, warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return y


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, heads, T, D] and k [B, shared, T, D] with their first R values rotated, halves apart.

    cos, sin: [B or 1, T, R], contiguous. The results are views of [B, T, heads, D].
    """
    batch, heads, tokens, d = q.shape
    shared, r = k.shape[1], cos.shape[-1]
    to_q, to_k = (torch.empty(batch, tokens, n, d, dtype=q.dtype, device=q.device) for n in (heads, shared))
    if count := batch * tokens:
        together = 1 if count < _PROMPT else 8
        _launch(
            _device().rotate, (count, -(-heads // together) + -(-shared // together)), q, k, cos, sin, to_q, to_k,
            heads, shared, tokens, d, r, cos.stride(0) if len(cos) > 1 else 0, *q.stride()[:3], *k.stride()[:3],
            HEADS=together, BLOCK=_power(r // 2), REST=_power(d - r) if d > r else 0, warps=4 if together > 1 else 1,
        )  # fmt: skip
    return to_q.transpose(1, 2), to_k.transpose(1, 2)


def rotates(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these tensors."""
    return (
        serves(q)
        and serves(k)
        and q.dim() == k.dim() == 4
        and cos.dim() == sin.dim() == 3
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.shape[-1] == k.shape[-1]
        and cos.shape == sin.shape
        and cos.shape[0] in (1, len(q))
        and cos.shape[1] == q.shape[2] == k.shape[2]
        and cos.shape[-1] <= q.shape[-1]
        and cos.shape[-1] % 2 == 0
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def gated(a: Tensor, b: Tensor, kind: int) -> Tensor:
    """activation(a) · b for a and b [..., K], each rounded; kind: SILU, TANH or ERF."""
    k = a.shape[-1]
    left, right = (t if t.dim() == 2 else t.flatten(0, -2) for t in (a, b))
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if y.numel():
        grid = (len(left), -(-k // 1024))
        strides = (left.stride(0), right.stride(0), k)
        _launch(_device().gate, grid, left, right, y, *strides, KIND=kind, BLOCK=1024, warps=4)
    return y


def stores(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `store` takes these tensors."""
    one = k.shape[:3] == (*keys.shape[:2], 1) and v.shape[:3] == (*values.shape[:2], 1)
    same = k.dtype == keys.dtype and v.dtype == values.dtype and k.shape[-1] == keys.shape[-1]
    whole = v.shape[-1] == values.shape[-1] and keys.is_contiguous() and values.is_contiguous()
    return one and same and whole and serves(k) and serves(v)


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, at: Tensor, ticket: Tensor) -> None:
    """Write k and v [B, heads, 1, D] at position `at` of a cache [B, heads, L, D], and add one to `at`.

    at: int64, one value. ticket: int32, one zero, which is zero again afterwards.
    """
    batch, heads, length, dk = keys.shape
    dv = values.shape[-1]
    _launch(
        _device().store, (batch * heads,), keys, values, k, v, at, ticket,
        heads, length, dk, dv, *k.stride()[:2], *v.stride()[:2], BLOCK=_power(max(dk, dv)), warps=1,
    )  # fmt: skip


@torch.library.custom_op("fewbit::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one token for each text: [B, heads, DV].

    q: [B, heads, 1, DK]. k: [B, shared, L, DK], v: [B, shared, L, DV], contiguous; heads a multiple of shared, at most
    16 times. mask: [B or 1, 1, 1, L], bool, or numbers that are added to the logits. Keys are divided among programs,
    so that one text uses the whole GPU. Blocks of keys that the mask hides are not read.
    """
    mask = mask[:, 0, 0]
    return _attended(q, k, v, mask.view(torch.uint8) if mask.dtype == torch.bool else mask, None, scale)


def attend_pages(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor, scale: float) -> Tensor:
    """Attention of one token for each text, over keys and values in pages of `PAGE` slots: [B, heads, DV].

    q: [B, heads, 1, DK]. k: [slots, shared, DK], v: [slots, shared, DV], contiguous. lengths: int32 [B], the keys of
    each text. pages: int32 [B, most pages], the first slot of each page.
    """
    return _attended(q, k, v, lengths, pages, scale)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pages: Tensor | None, scale: float) -> Tensor:
    """The two kernels of `attend` and, with pages, of `attend_pages`. mask: [B or 1, L], or the lengths [B]."""
    batch, heads, _, dk = q.shape
    shared, dv = k.shape[1], v.shape[-1]
    length = k.shape[2] if pages is None else pages.shape[1] * PAGE
    blocks = -(-length // PAGE)
    parts = max(1, min(blocks, 2 * _multiprocessors(q.device) // (batch * shared), 64))
    out = torch.empty(batch, heads, dv, dtype=q.dtype, device=q.device)
    more = 0 if parts == 1 else batch * heads * parts
    partial = torch.empty(more * dv, dtype=torch.float32, device=q.device)
    tops = torch.empty(more * 2, dtype=torch.float32, device=q.device)
    _launch(
        _device().attend, (batch * shared, parts), q, k, v, mask, mask if pages is None else pages,
        out, partial, tops, scale, shared, length, dk, dv, q.stride(0), q.stride(1),
        mask.stride(0) if len(mask) > 1 else 0, 0 if pages is None else pages.stride(0), -(-blocks // parts),
        GROUP=heads // shared, BK=_power(dk), BV=_power(dv), BLOCK=PAGE,
        ADDED=mask.dtype != torch.uint8, PAGED=pages is not None, warps=4,
    )  # fmt: skip
    if parts > 1:
        grid, sizes = (batch * heads,), {"PARTS": _power(parts), "BV": _power(dv)}
        _launch(_device().join, grid, partial, tops, out, parts, dv, **sizes, warps=4)
    return out


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[-1])


def attends(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> bool:
    """Whether `attend` takes these tensors."""
    return attends_pages(q, k, v) and mask.stride(-1) == 1 and len(mask) in (1, len(q))


def attends_pages(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_pages` takes these tensors."""
    return (
        serves(q)
        and q.dtype == k.dtype == v.dtype
        and k.is_contiguous()
        and v.is_contiguous()
        and q.shape[1] % k.shape[1] == 0
        and q.shape[1] // k.shape[1] <= 16
        and max(k.shape[-1], v.shape[-1]) <= 256
        and min(k.shape[-1], v.shape[-1]) >= 16
    )
