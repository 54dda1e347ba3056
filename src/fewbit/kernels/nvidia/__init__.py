"""Kernels for NVIDIA GPUs in CUDA C++ and Triton.

They support integers, NF4, FP4, LLM.int8(), ggml's blocks, FP8, MXFP4 and NVFP4. On an H100, a product with one row of
activations reads a weight of 28672 x 8192 at this speed in TB/s (benchmarks/results/2026-11-floats-gpu.md):

    int4-g128 2.7    nf4-b64 2.5    fp8 2.9    mxfp4 2.6    nvfp4 2.5
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import ClassVar

from fewbit.kernels.base import Kernel, Prepared, Shapes
from fewbit.kernels.nvidia import layout
from fewbit.kernels.nvidia.layout import Recipe
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import Codec, Parts
from fewbit.schemes.fp8 import FP8
from fewbit.schemes.nf4 import NESTED

_CAPABILITY = (8, 0)  # the first compute capability with bfloat16 tensor cores


@register("kernels", "nvidia")
class Nvidia(Kernel):
    """Device layout: words of codes, a plane of high bits for some widths, then the scheme's scales and offsets."""

    name: ClassVar[str] = "nvidia"
    activations: ClassVar[str] = "exact"
    checked: ClassVar[tuple[int, ...]] = (4, 64)  # a few rows and many rows use different kernels
    priority: ClassVar[int] = 20

    def unavailable(self) -> str | None:
        return _unavailable()

    def why_not(self, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs, not on {device.type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"activations in float16 or bfloat16 only, not {str(dtype).removeprefix('torch.')}"
        if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
            return f"it needs compute capability 8.0 or later, and this GPU has {found[0]}.{found[1]}"
        if shape[0] * shape[1] >= 1 << 32:
            return f"weights with fewer than 2^32 values only, not {shape[0]} x {shape[1]}"
        how = layout.recipe(codec, shape[1])
        return how if isinstance(how, str) else None

    def prepare(self, codec: Codec, parts: Parts, shape: tuple[int, int]) -> Prepared:
        return layout.prepared(codec, parts, shape)

    def restore(self, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Parts:
        return layout.restored(codec, prepared, shape)

    def why_not_grouped(self, codec: Codec, shape: Shapes) -> str | None:
        experts, n, k = shape
        how = layout.recipe(codec, k)
        assert isinstance(how, Recipe)
        if n % 16:
            return f"weights of experts with rows in multiples of 16 only, not {n}"
        if isinstance(codec, FP8) and codec.group and n % codec.rows:
            return f"FP8 weights of experts with rows in multiples of {codec.rows} only, as in their blocks, not {n}"
        if how.scale == layout.MAPPED and n * (k // how.group) % NESTED:
            return f"double-quantized weights of experts with multiples of {NESTED} blocks only"
        if experts * n * -(-k // how.tile) * layout.WORDS >= 1 << 31:
            return f"all experts together with fewer than 2^31 words only, not {experts} x {n} x {k}"
        return None

    def grouped(self, x: Tensor, codec: Codec, prepared: Prepared, shape: Shapes, offsets: Tensor) -> Tensor:
        from fewbit.kernels.nvidia import ops

        return ops.grouped_product(x, codec, prepared, shape, offsets)

    def of_expert(self, codec: Codec, prepared: Prepared, shape: Shapes, expert: int) -> Prepared:
        how = layout.recipe(codec, shape[2])
        assert isinstance(how, Recipe)
        return layout.of_expert(how, prepared, shape[0], expert)

    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        from fewbit.kernels.nvidia import ops

        return ops.product(x, codec, prepared, shape)


@cache
def _unavailable() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU with a working driver"
    return None
