"""The CUDA kernels: `few.cu` for a few rows of activations, `many.cu` for tens, both on `decode.cuh`.

They are compiled when first needed, by the compiler that PyTorch brings (NVRTC).
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbit.kernels.nvidia.layout import MAPPED, PLAIN, WORDS, Recipe, operands

_FLOAT = 3  # how s is stored, besides those of a recipe: as float32
_PAIRS, _MAP = 256 * 32 * 4, 256 * 4  # bytes of shared memory that levels take, and a map of scales
_STAGES = 4  # tiles of x on their way to `many`


class Sizes(NamedTuple):
    """How a kernel cuts its work."""

    warps: int
    of_w: int  # tiles of 16 rows of W that a warp has
    of_x: int  # tiles of 8 rows of x
    resident: int  # blocks that a multiprocessor is to hold at once
    split: int = 0  # blocks that share K, of `many`; 0 for `few`


def linear(x: Tensor, y: Tensor, tensors: list[Tensor], how: Recipe, sizes: Sizes) -> None:
    """y [M, N] = x [M, K] W."""
    (m, k), n = x.shape, y.shape[1]
    places = operands(how, tensors)
    kernel = _compiled(how, k, tensors[0].shape[1] * WORDS, _stored(how, places), sizes, x.dtype, x.device)
    rows, over = 16 * sizes.of_w, -(-m // (8 * sizes.of_x))
    if sizes.split:
        blocks = -(-n // (rows * sizes.warps))
        work = torch.empty(sizes.split * m * n if sizes.split > 1 else 1, device=x.device)
        grid, more = (blocks, over, sizes.split), [work, _counters(x.device, torch.cuda.current_stream(x.device))]
    else:
        grid, more = (min(-(-n // rows), _multiprocessors(x.device) * sizes.resident), over, 1), []
    kernel(grid=grid, block=(32 * sizes.warps, 1, 1), args=[x, y, *places, m, n, *more], shared_mem=_shared(how, sizes))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _counters(device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    """Blocks that are done; the last of each lot sets its own to nought again. One for each stream."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


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


def _shared(how: Recipe, sizes: Sizes) -> int:
    tables = (_PAIRS if how.table else 0) + (_MAP if how.scale == MAPPED else 0)
    if sizes.split:
        return tables + _STAGES * 8 * sizes.of_x * how.tile * 2
    return tables + sizes.warps * 8 * sizes.of_x * (16 * sizes.of_w + 1) * 4


def _stored(how: Recipe, places: tuple[Tensor, ...]) -> tuple[int, bool]:
    scale = _FLOAT if how.scale == PLAIN and how.divisor == 1 and places[2].dtype == torch.float32 else how.scale
    return scale, places[3].dtype == torch.int8


@cache
def source(name: str) -> str:
    """A kernel as it stands, before the macros that specialize it."""
    folder = Path(__file__).parent
    return (folder / "decode.cuh").read_text() + (folder / f"{name}.cu").read_text()


def defined(how: Recipe, k: int, row_words: int, stored: tuple[int, bool], sizes: Sizes, bfloat: bool) -> str:
    """The macros, and the kernel."""
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
        "SIGNED": int(stored[1]),
        "BFLOAT": int(bfloat),
        "WARPS": sizes.warps,
        "MT": sizes.of_w,
        "NT": sizes.of_x,
        "RESIDENT": sizes.resident,
        "SPLIT": sizes.split,
        "STAGES": _STAGES,
    }
    text = source("many" if sizes.split else "few")
    return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + text


@cache
def _compiled(
    how: Recipe,
    k: int,
    row_words: int,
    stored: tuple[int, bool],
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    text = defined(how, k, row_words, stored, sizes, dtype == torch.bfloat16)
    with torch.cuda.device(device):
        name = "many" if sizes.split else "few"
        kernel: Any = torch.cuda._compile_kernel(text, name)  # type: ignore[attr-defined,unused-ignore]
        kernel.set_shared_memory_config(_shared(how, sizes))
    return kernel
