"""The reference kernel: dequantizes a chunk of rows at a time and multiplies. It supports every codec and device.

The other kernels are checked against it, so it takes no shortcuts. The weight is decoded to the dtype of the
activations; on a CPU always to float32, since half-precision products are slow and less exact there. A Llama in iq2_xxs
makes 0.6 tokens a second with it, and 32 with the kernel `cpu` (benchmarks/results/2026-11-cpu.md).
"""

from __future__ import annotations

from typing import ClassVar

from fewbit.kernels.base import Kernel, Prepared
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import Codec, chunk_rows


@register("kernels", "reference")
class Reference(Kernel):
    """The device layout is the canonical parts."""

    name: ClassVar[str] = "reference"

    def why_not(self, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        parts = self.restore(codec, prepared, shape)
        work = torch.float32 if x.device.type == "cpu" else x.dtype
        rows, y = x.to(work), torch.empty(x.shape[0], shape[0], dtype=x.dtype, device=x.device)
        # On a CPU 4 MB at a time, in floats: of 16 MB, each new page costs more than its numbers.
        for chunk in chunk_rows(*shape, budget=1 << (20 if x.device.type == "cpu" else 22)):
            y[:, chunk] = (rows @ codec.dequantize(parts, shape, work, chunk).T).to(x.dtype)
        return y
