"""The CUDA kernel for few rows of activations, compiled when first needed by the compiler PyTorch brings (NVRTC)."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.nvidia.layout import PLAIN, Recipe, operands

_FLOAT = 3  # how s is stored, besides those of a recipe: as float32
_TABLE = 256 * 32 * 4  # bytes of shared memory that levels take


def linear(x: Tensor, y: Tensor, tensors: list[Tensor], how: Recipe, sizes: tuple[int, ...]) -> None:
    """y [M, N] = x [M, K] W for `sizes`: warps, tiles of 16 rows of W and of 8 rows of x in a warp, tiles at a time."""
    warps, of_w, of_x, _ = sizes
    (m, k), n = x.shape, y.shape[1]
    places = operands(how, tensors)
    kernel = _compiled(how, k, tensors[0].shape[1], _stored(how, places), sizes, x.dtype, x.device)
    shared = _shared(how, sizes)
    kernel(
        grid=(-(-n // (16 * of_w)), -(-m // (8 * of_x)), 1),
        block=(32 * warps, 1, 1),
        args=[x, y, *places, m, n],
        shared_mem=shared,
    )


@cache
def unusable(device: torch.device) -> str | None:
    """None if such kernels can be compiled and run there, else a sentence; it is also a warning, once."""
    text = 'extern "C" __global__ void nothing(int* x) { *x = 1; }'
    try:
        with torch.cuda.device(device):
            torch.cuda._compile_kernel(text, "nothing")  # type: ignore[attr-defined,unused-ignore]
    except Exception as error:  # no NVRTC, no headers of CUDA, a driver that is too old: what PyTorch raises differs
        reason = f"the kernels for few rows cannot be compiled, slower ones serve: {str(error).strip()[:200]}"
        warnings.warn(reason, stacklevel=2)
        return reason
    return None


def _shared(how: Recipe, sizes: tuple[int, ...]) -> int:
    warps, of_w, of_x, _ = sizes
    return max(warps * 8 * of_x * (16 * of_w + 1) * 4, _TABLE if how.table else 0)


def _stored(how: Recipe, places: tuple[Tensor, ...]) -> tuple[int, str]:
    scale = _FLOAT if how.scale == PLAIN and how.divisor == 1 and places[2].dtype == torch.float32 else how.scale
    return scale, "s8" if places[3].dtype == torch.int8 else "u8"


@cache
def source() -> str:
    """The kernel as it stands, before the macros that specialize it."""
    return Path(__file__).with_suffix(".cu").read_text()


def defined(how: Recipe, k: int, row_words: int, stored: tuple[int, str], sizes: tuple[int, ...], bfloat: bool) -> str:
    """The macros, and the kernel."""
    warps, of_w, of_x, deep = sizes
    macros = {
        "BITS": how.bits,
        "LOW": how.low,
        "GROUP": how.group,
        "BLOCK": how.block,
        "SCALE": stored[0],
        "OFFSET": how.offset,
        "ZERO_POINT": how.zero,
        "TABLE": how.table,
        "DIVISOR": how.divisor,
        "SUB": how.sub,
        "K": k,
        "ROW_WORDS": row_words,
        "GROUPS": k // how.group,
        "BLOCKS": k // how.block,
        "STEPS": stored[1],
        "WARPS": warps,
        "MT": of_w,
        "NT": of_x,
        "DEEP": deep,
        "BFLOAT": int(bfloat),
    }
    return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + source()


@cache
def _compiled(
    how: Recipe,
    k: int,
    row_words: int,
    stored: tuple[int, str],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    text = defined(how, k, row_words, stored, sizes, dtype == torch.bfloat16)
    with torch.cuda.device(device):
        kernel: Any = torch.cuda._compile_kernel(text, "packed_linear")  # type: ignore[attr-defined,unused-ignore]
        kernel.set_shared_memory_config(_shared(how, sizes))
    return kernel
