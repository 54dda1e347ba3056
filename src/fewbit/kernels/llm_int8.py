"""LLM.int8(): rounds activations to 8 bits per row, keeps outlier columns exact, and multiplies int8 by int8.

The rule is that of bitsandbytes. A column of the activations is an outlier column if any row (any token in the call)
has a magnitude of at least the scheme's threshold there. Outlier columns are multiplied without rounding. In the other
columns each row, cast to float16, is divided by the row's largest magnitude below the threshold (in any column) and
rounded to -127 ... 127, ties to even. Threshold 0 means no outlier columns. By this rule, the result of a row depends
on the other rows of the batch.

On CPUs with AVX-512 and on GPUs the product is PyTorch's `_int_mm` if it supports the shapes. Elsewhere it is a float32
product of integers, over spans of columns short enough to be exact. This kernel is two to ten times as fast as the
reference on two cores with VNNI, but less accurate (see docs/reference.md), so it is used only if requested by name.
"""

from __future__ import annotations

from typing import ClassVar

from fewbit.kernels.base import Kernel, Prepared
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import Codec
from fewbit.schemes.int8 import Int8

_EXACT = 1024  # columns per span: 1024 * 127 * 128 < 2^24, so sums of these products are exact in float32
_STEP = 1 / 127


@register("kernels", "llm_int8")
class LlmInt8(Kernel):
    """The device layout is the canonical parts."""

    name: ClassVar[str] = "llm_int8"
    activations: ClassVar[str] = "int8 by row, outlier columns exact"
    priority: ClassVar[int] = -1

    def why_not(self, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        if not isinstance(codec, Int8):
            return f"it supports llm.int8 weights only, not {codec}"
        return None

    def rounded(self, x: Tensor, codec: Codec) -> Tensor:
        assert isinstance(codec, Int8)
        steps, scale, outliers = _rounded(x, codec.threshold)
        values = steps.float().mul_((scale * _STEP)[:, None])
        values[:, outliers] = x[:, outliers].float()
        return values

    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        assert isinstance(codec, Int8)
        weight, scb = prepared
        steps, scale, outliers = _rounded(x, codec.threshold)
        y = _product(steps, weight).mul_((scale * _STEP)[:, None]).mul_(scb * _STEP)
        if len(outliers):
            columns = weight[:, outliers].float().mul_(scb[:, None]).mul_(_STEP)
            y.addmm_(x[:, outliers].float(), columns.T)
        return y.to(x.dtype)


def _rounded(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Round x [M, K] to int8.

    Returns the int8 values with zeros in outlier columns, each row's largest magnitude below the threshold [M], and the
    indices of the outlier columns.
    """
    half = x.to(torch.float16)
    sizes = half.abs()
    outliers = torch.empty(0, dtype=torch.long, device=x.device)
    if threshold > 0:
        beyond = sizes >= threshold
        outliers = beyond.any(0).nonzero()[:, 0]
        sizes = sizes.masked_fill_(beyond, 0)
    scale = sizes.amax(1).float() if x.shape[0] else x.new_empty(0, dtype=torch.float32)
    by = torch.where(scale == 0, 0, 127 / scale)
    if len(outliers):
        half = half.index_fill(1, outliers, 0)
    return (half.float() * by[:, None]).round_().to(torch.int8), scale, outliers


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times the transpose of b [N, K], both int8, as float32 [M, N]. Only adding up the spans rounds."""
    if _has_int_mm(a, b):
        product: Tensor = torch._int_mm(a, b.T)
        return product.float()
    return sum(
        (a[:, part].float() @ b[:, part].float().T for part in _spans(a.shape[1])),
        start=torch.zeros(a.shape[0], b.shape[0], device=a.device, dtype=torch.float32),
    )


def _spans(k: int) -> list[slice]:
    return [slice(start, start + _EXACT) for start in range(0, k, _EXACT)]


def _has_int_mm(a: Tensor, b: Tensor) -> bool:
    if a.is_cuda:  # requirements of cuBLASLt
        return a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0
    # Without AVX-512 PyTorch falls back to a slow scalar loop.
    return a.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" and min(a.shape) > 0
