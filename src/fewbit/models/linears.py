"""The linears of a model: `nn.Linear`, and GPT-2's Conv1D, which stores its weight transposed."""

from __future__ import annotations

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
