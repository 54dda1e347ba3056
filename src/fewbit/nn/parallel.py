"""What a rank of a tensor-parallel model does before and after a layer of which it holds a part: collectives, as hooks.

    by rows       y = x Wᵀ: each rank computes some columns of y; `Gather` joins them where the model reads all of y
    by columns    each rank multiplies its columns of x; `Sum` adds the products of all ranks
                  `Take` cuts the rank's columns out of x where x is whole, or stored in another order

Hooks do not change the layer: it is an ordinary linear of a smaller size. All ranks must call their layers in the same
order. The layers have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewbit.errors import PlanError


class Sum:
    """A forward hook: the sum of the outputs of all ranks."""

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        _check(out)
        out = out.contiguous()
        dist.all_reduce(out)
        return out


class Gather:
    """A forward hook: the outputs of all ranks side by side, in the order of ranks."""

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        _check(out)
        return gathered(out)


class Keep:
    """A forward hook: the columns of the output that belong to this rank, of a layer that is whole on each."""

    def __init__(self, columns: slice) -> None:
        self.columns = columns

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out[..., self.columns]


class Take:
    """A forward pre-hook: of the columns of x those with which this rank multiplies. gathers: x is a rank's part."""

    def __init__(self, columns: slice | Tensor, *, gathers: bool = False) -> None:
        self.columns, self.gathers = columns, gathers

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        if self.gathers:
            _check(x)
            x = gathered(x)
        return (x[..., self.columns], *others)


def gathered(x: Tensor) -> Tensor:
    """The tensors of all ranks, joined in their last dimension."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts, -1)


def _check(x: Tensor) -> None:
    if x.requires_grad:
        raise PlanError(
            "a tensor-parallel model has no gradients", "Generate inside torch.inference_mode() or torch.no_grad()."
        )
