"""The linears of a model: `nn.Linear`, and GPT-2's Conv1D, which stores its weight transposed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEARS = (nn.Linear, Conv1D)


def shape_of(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """The shape [N, K] of the weight of a linear, also of a packed one."""
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear as a writable view [N, K]."""
    assert isinstance(linear.weight, Tensor)
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores the weight of a linear as [K, N]."""
    return isinstance(module, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x · Wᵀ + b. A subclass with a `forward` of its own is tried with random numbers."""
    if not isinstance(module, LINEARS):
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    key = type(module), tuple(module.weight.shape)
    if key not in _tried:
        _tried[key] = _computes_product(module)
    return _tried[key]


_tried: dict[tuple[type, tuple[int, ...]], bool] = {}


def _computes_product(module: nn.Linear | Conv1D) -> bool:
    """Whether a copy of `module` with random weights multiplies two rows as a linear does."""
    generator = torch.Generator().manual_seed(0)
    own = copy.copy(module)
    own._parameters = {
        name: None
        if value is None
        else nn.Parameter(torch.randn(value.shape, generator=generator, dtype=torch.float32, device="cpu"))
        for name, value in module._parameters.items()
    }
    _, k = shape_of(module)
    x = torch.randn(2, k, generator=generator, device="cpu", dtype=torch.float32)
    expected = nn.functional.linear(x, weight_of(own), own.bias)
    try:
        with torch.no_grad():
            return torch.allclose(own(x), expected, rtol=1e-3, atol=1e-3 * k**0.5)
    except Exception:  # its `forward` does not take rows of K numbers
        return False
