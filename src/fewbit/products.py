"""Products of float32 matrices on the tensor cores of a GPU, which multiply numbers of 8 or 11 bits and sum in float32.

Elsewhere they are PyTorch's own products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from fewbit.lazy import Tensor, torch

_AT_ONCE = 1 << 25  # entries of a that are split at a time


def add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """out [M, N] = beta out + alpha a b, in place, for a [M, K] and b [K, N], which may be bfloat16 on a GPU."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b, beta=beta, alpha=alpha)
    return torch.addmm(out, a, b, out.dtype, beta=beta, alpha=alpha, out=out)


def add_halves(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """out [M, N] += alpha a b, where a GPU takes each float32 factor as the sum of two bfloat16 numbers.

    a b = a₁ b₁ + a₁ b₂ + a₂ b₁ + a₂ b₂, of which the last is left out. Two numbers have 16 bits together, so the error
    is one part in 50,000 of |a| |b|.
    """
    if a.dtype != torch.float32 or not a.is_cuda or not tensor_cores(a.device):
        return add_product(out, a, b, alpha=alpha)
    high, low = _halves(b)
    right = torch.cat([high, low, high])
    for start in range(0, len(a), rows := max(1, _AT_ONCE // max(1, a.shape[1]))):
        high, low = _halves(a[start : start + rows])
        add_product(out[start : start + rows], torch.cat([high, high, low], 1), right, alpha=alpha)
    return out


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


@cache
def tensor_cores(device: torch.device) -> bool:
    """Whether a GPU multiplies bfloat16 numbers on tensor cores, as NVIDIA's do since Ampere."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def in_tf32(device: torch.device) -> Iterator[None]:
    """Context in which a GPU multiplies float32 matrices in TF32: factors rounded to 11 bits, sums in float32.

    It is for what needs three digits only: a correction, or an error that is reported.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
