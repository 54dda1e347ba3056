"""The NVIDIA kernels, as functions and as PyTorch operators, and the choice of kernel by the number of rows.

`torch.compile` and other tracers see operators, with a fake implementation that computes only the output shape. Without
a tracer the functions are called directly: the way through an operator takes longer than the launch of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.base import Shapes, runs
from fewbit.kernels.nvidia import in_cuda, sizes
from fewbit.kernels.nvidia.in_cuda import Sizes
from fewbit.kernels.nvidia.layout import MAPPED, WORDS, Recipe, of_expert, operands, recipe
from fewbit.schemes.base import Codec

Config = tuple[int, ...]


@cache
def device() -> Any:
    """The module of Triton kernels, imported on first use because it imports Triton."""
    from fewbit.kernels.nvidia import in_triton as module

    return module


def product(x: Tensor, codec: Codec, tensors: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    """x [M, K] times the transpose of a packed weight of `shape` [N, K]: [M, N] in the dtype of x."""
    if _traced(x):
        y: Tensor = packed_linear(x, list(tensors), list(recipe(codec, shape[1])), shape[0])
        return y
    with torch.cuda.device_of(x):  # launches use the current GPU, not that of their tensors
        return linear(x, tensors, _described(codec, shape[1]), shape[0])


def grouped_product(x: Tensor, codec: Codec, tensors: tuple[Tensor, ...], shape: Shapes, ends: Tensor) -> Tensor:
    """Rows of x [M, K] times the transposes of their experts' packed weights: see `packed_grouped`."""
    if _traced(x):
        y: Tensor = packed_grouped(x, list(tensors), list(recipe(codec, shape[2])), ends, shape[1])
        return y
    with torch.cuda.device_of(x):
        return grouped(x, tensors, _described(codec, shape[2]), ends, shape[1])


def _traced(x: Tensor) -> bool:
    """Whether something records or replaces the operators that it sees, and so must see ours."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@cache
def _described(codec: Codec, k: int) -> Recipe:
    how = recipe(codec, k)
    assert isinstance(how, Recipe)
    return how


@torch.library.custom_op("fewbit::packed_linear", mutates_args=())
def packed_linear(x: Tensor, tensors: list[Tensor], how: list[int], n: int) -> Tensor:
    """The operator of `product`."""
    with torch.cuda.device_of(x):
        return linear(x, tensors, Recipe(*how), n)


@packed_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], how: list[int], n: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


@packed_linear.register_vmap
def _(info: Any, batched: Any, x: Tensor, tensors: list[Tensor], how: list[int], n: int) -> tuple[Tensor, int]:
    """The product of all rows at once. Only activations can be batched."""
    x = x.movedim(batched[0], 0)
    return packed_linear(x.flatten(0, 1), tensors, how, n).unflatten(0, x.shape[:2]), 0


def linear(x: Tensor, tensors: Sequence[Tensor], how: Recipe, n: int, config: Config | None = None) -> Tensor:
    """The implementation of the operator. `config` overrides the choice of kernel, for benchmarks."""
    m, k = x.shape
    x = x.contiguous()
    if not m:
        return x.new_empty(0, n)
    path, *given = config or _chosen(m, n, k, how, x.device)
    if path == VALUES:
        y = x.new_empty(m, n)
        step = max(128, (1 << 28) // k)  # rows that are dequantized at a time: half a GiB of 16-bit values
        for top in range(0, n, step):
            weight = values(tensors, how, n, k, x.dtype, top, min(top + step, n))
            torch.mm(x, weight.T, out=y[:, top : top + step])
        return y
    y = x.new_empty(m, n)
    if path == CUDA:
        in_cuda.linear(x, y, tensors, how, Sizes(*given))
        return y
    rows, warps = given
    wide = 128 * warps
    device().gemv[(-(-n // rows), m)](
        x.view(torch.int32),
        y,
        *operands(how, tensors),
        ONE,
        n,
        k,
        *_strides(how, tensors, k),
        **how.constants,
        EVEN=tensors[0].shape[1] * WORDS % wide == 0,
        BN=rows,
        BW=wide,
        BFLOAT=x.dtype == torch.bfloat16,
        num_warps=warps,
    )
    return y


@torch.library.custom_op("fewbit::packed_grouped", mutates_args=())
def packed_grouped(x: Tensor, tensors: list[Tensor], how: list[int], ends: Tensor, n: int) -> Tensor:
    """Rows of x [M, K] times the transposes of their experts' packed weights [n, K]: [M, n] in the dtype of x.

    ends: int32 [experts], where the rows of each expert end. Rows after the last end get zeros.
    """
    with torch.cuda.device_of(x):
        return grouped(x, tensors, Recipe(*how), ends, n)


@packed_grouped.register_fake
def _(x: Tensor, tensors: list[Tensor], how: list[int], ends: Tensor, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


def grouped(
    x: Tensor, tensors: Sequence[Tensor], how: Recipe, ends: Tensor, n: int, config: Config | None = None
) -> Tensor:
    """The implementation of the operator. `config` overrides the choice of kernel, for benchmarks."""
    (m, k), experts = x.shape, len(ends)
    x = x.contiguous()
    if not m:
        return x.new_empty(0, n)
    path, *given = config or _chosen_grouped(m, n, k, experts, how, x.device)
    if path == CUDA:
        y = x.new_empty(m, n)
        in_cuda.grouped(x, y, tensors, how, Sizes(*given), experts, ends)
        return y
    if path == VALUES:
        weights = values(tensors, how, experts * n, k, x.dtype).view(experts, n, k)
        y = torch._grouped_mm(x, weights.transpose(1, 2), offs=ends)
        numbers = torch.arange(m, dtype=ends.dtype, device=ends.device)
        return y.masked_fill_((numbers >= ends[-1])[:, None], 0)
    y = x.new_zeros(m, n)
    for expert, start, end in runs(ends):
        y[start:end] = linear(x[start:end], list(of_expert(how, tensors, experts, expert)), how, n)
    return y


def choose_grouped(m: int, n: int, k: int, experts: int, how: Recipe, device: torch.device) -> Config:
    """The kernel (CUDA, VALUES or LOOP) and its sizes for m rows of x, which belong to `experts` weights [n, k]."""
    average = m / experts
    if in_cuda.unusable(device) is None and average <= _MOST:
        tiles = -(-k // how.tile)
        warps, resident = next((pair for pair in _WARPS if tiles % pair[0] == 0), (8, 2))
        return (CUDA, *in_cuda.Sizes(warps, 2, 1 if average <= _FEW else 2, resident))
    if how.scale != MAPPED and experts * n * k <= _AT_ONCE and k % 8 == n % 8 == 0 and hasattr(torch, "_grouped_mm"):
        return (VALUES,)
    return (LOOP,)


# Measured on an H100: see benchmarks/results/2026-11-packed-experts.md.
_WARPS = ((4, 3), (6, 2), (3, 3), (5, 2), (7, 2))  # warps of a block that divide the tiles of a row, resident blocks
_FEW = 6  # average number of rows of an expert up to which a block multiplies 8 rows of x at a time; above, 16
_MOST = 128  # average above which weights are dequantized for PyTorch's grouped product
_AT_ONCE = 1 << 30  # weights that are dequantized at once: 2 GiB of 16-bit values


def values(
    tensors: Sequence[Tensor], how: Recipe, n: int, k: int, dtype: torch.dtype, top: int = 0, bottom: int | None = None
) -> Tensor:
    """Rows `top` to `bottom` of the weight [n, k], dequantized to float16 or bfloat16."""
    bottom = n if bottom is None else bottom
    y = torch.empty(bottom - top, k, dtype=dtype, device=tensors[0].device)
    rows, wide = 8, 64
    device().values[(-(-(bottom - top) // rows), -(-tensors[0].shape[1] * WORDS // wide))](
        y.view(torch.int32),
        *operands(how, tensors),
        ONE,
        top,
        bottom,
        n,
        k,
        *_strides(how, tensors, k),
        **how.constants,
        EVEN=k % how.tile == 0,
        BN=rows,
        BW=wide,
        BFLOAT=dtype == torch.bfloat16,
        num_warps=4,
    )
    return y


GEMV, VALUES, CUDA, LOOP = 0, 2, 3, 4
ONE = 0x3F800000  # the bits of 1.0


def choose(m: int, n: int, k: int, how: Recipe, device: torch.device) -> Config:
    """The kernel (CUDA, GEMV or VALUES) and its sizes for m rows of activations and a weight [n, k]."""
    if in_cuda.unusable(device) is None:
        found = sizes.best(m, n, how, device)
        return (VALUES,) if found is None else (CUDA, *found)
    if m <= 4:
        words = -(-k // how.tile) * 16
        return (GEMV, 4, 4 if words % 512 == 0 else 2 if words % 256 == 0 else 1)
    return (VALUES,)


# Choosing again for each product would take longer than the launch of a kernel.
_chosen, _chosen_grouped = lru_cache(maxsize=4096)(choose), lru_cache(maxsize=4096)(choose_grouped)


def choose_again() -> None:
    """Forget which kernels were chosen, as other sizes were measured."""
    _chosen.cache_clear()


def _strides(how: Recipe, tensors: Sequence[Tensor], k: int) -> tuple[int, int, int]:
    return tensors[0].shape[1] * WORDS, how.groups(k), k // how.block
