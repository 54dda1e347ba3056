"""The reference: dequantize a chunk of rows, multiply, go on. Serves every codec on every device.

It is what the other kernels are checked against, so it takes no short cut: the weight is decoded in the dtype of the
activations (float32 for half precision on the CPU, where half matmuls are slow and less exact).
"""

from __future__ import annotations

from typing import ClassVar

from fewbit.kernels.base import Kernel, Prepared
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import Codec, chunk_rows


@register("kernels", "reference")
class Reference(Kernel):
    """Keeps the canonical parts."""

    name: ClassVar[str] = "reference"

    def why_not(self, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        parts = self.restore(codec, prepared, shape)
        work = torch.float32 if x.device.type == "cpu" else x.dtype
        rows, y = x.to(work), torch.empty(x.shape[0], shape[0], dtype=x.dtype, device=x.device)
        for chunk in chunk_rows(*shape):
            y[:, chunk] = (rows @ codec.dequantize(parts, shape, work, chunk).T).to(x.dtype)
        return y
