"""PyTorch's 4-bit kernels: `_weight_int4pack_mm` on CUDA, and `_weight_int4pack_mm_for_cpu`.

Both take bfloat16 activations (the CPU kernel is vectorized for no other dtype) and 4-bit groups of 32 to 256 columns.
Scale and offset of each group are a bfloat16 pair [groups, N, 2], with w = (c - 8) * scale + zero. Rounding the fp16
scales to bfloat16 changes a result by about 2.4e-3. The fp16 scales are kept too, because `restore` must be exact.

One thread of a Xeon with AVX-512 reads int4-g128-sym at 8.3 GB/s, where a plain read reaches 13.5
(benchmarks/results/2026-11-cpu.md). An H200 multiplies one row by a weight of 28672 x 8192, 124.8 MB, in 94.7 µs: 1.3
TB/s (benchmarks/results/2026-11-h200.md).

PyTorch packs the codes in an undocumented order that depends on the machine's vector width. `restore` does not need to
know it: a product with the identity matrix, with all scales 1 and all offsets 0, returns the codes.
"""

from __future__ import annotations

from typing import ClassVar

from fewbit.kernels.base import Kernel, Prepared, part_order
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes import bits
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import Codec, Parts

_INNER_K_TILES = 2  # tiles of 16 columns each. The smallest value, so that K only has to be a multiple of 32


@register("kernels", "torch_int4")
class TorchInt4(Kernel):
    """Device layout: packed codes, bfloat16 (scale, zero) pairs, and the fp16 parts from which the pairs are made."""

    name: ClassVar[str] = "torch_int4"
    activations: ClassVar[str] = "exact"
    priority: ClassVar[int] = 10

    def why_not(self, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        n, k = shape
        if not isinstance(codec, Affine) or codec.bits != 4:
            return f"it supports 4-bit integers only, not {codec}"
        if not codec.symmetric:
            return "symmetric weights only: rounding a zero point to bfloat16 would shift its whole group"
        if (group := codec.group or k) not in (32, 64, 128, 256):
            return f"groups of 32, 64, 128 or 256 columns only, not {group}"
        if dtype != torch.bfloat16:
            return f"activations in bfloat16 only, not {str(dtype).removeprefix('torch.')}"
        if device.type not in ("cpu", "cuda"):
            return f"it runs on CPU and CUDA, not on {device.type}"
        rows = 16 if device.type == "cpu" else 8
        if n % rows or k % (16 * _INNER_K_TILES):
            return f"rows in multiples of {rows} and columns of {16 * _INNER_K_TILES} only, not {n} x {k}"
        return None

    def prepare(self, codec: Codec, parts: Parts, shape: tuple[int, int]) -> Prepared:
        assert isinstance(codec, Affine)
        codes, grids = codec.unpack(parts, shape)
        if codes.is_cuda:
            pairs = codes[:, ::2] << 4 | codes[:, 1::2]
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_K_TILES)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        scale = grids.scale.T
        pairs = torch.stack([scale, torch.zeros_like(scale)], dim=-1).to(torch.bfloat16)
        return (packed, pairs, *(parts[name] for name in part_order(codec, shape)[1:]))

    def restore(self, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Parts:
        n, k = shape
        kept = dict(zip(part_order(codec, shape)[1:], prepared[2:], strict=True))
        unit = torch.zeros_like(prepared[1])
        unit[..., 0] = 1
        codes = torch.empty(n, k, dtype=torch.uint8, device=unit.device)
        for start in range(0, k, 256):
            columns = torch.arange(start, min(start + 256, k), device=unit.device, dtype=torch.int64)
            one_hot = torch.zeros(len(columns), k, dtype=torch.bfloat16, device=unit.device)
            one_hot[torch.arange(len(columns), dtype=torch.int64, device="cpu"), columns] = 1
            codes[:, columns] = (_multiply(one_hot, prepared[0], unit, k) + 8).to(torch.uint8).T
        return {codec.payload: bits.pack(codes, 4), **kept}

    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        return _multiply(x.contiguous(), prepared[0], prepared[1], shape[1])


def _multiply(x: Tensor, packed: Tensor, pairs: Tensor, k: int) -> Tensor:
    group = k // pairs.shape[0]
    op = torch.ops.aten._weight_int4pack_mm if x.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
    y: Tensor = op(x, packed, group, pairs)
    return y
