"""The stacked experts of a layer, trained as one weight (`moved.py`).

y of the rows of expert e = x W[e]ᵀ,        W [E, N, K]: one decoding for all experts in each pass
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fewbit.nn.experts import ExpertSlice, QExperts
from fewbit.nn.moved import MovedStack
from fewbit.schemes.base import QTensor


class TunedExperts(nn.Module):
    """What `QExperts` computes, differentiable by what is trained of the weights of all experts."""

    kernel = None

    def __init__(self, like: QExperts, narrow: torch.dtype | None, unit: float) -> None:
        super().__init__()
        self.dtype = like.dtype
        weights = [like.of_expert(expert) for expert in range(like.experts)]
        self.tuned = MovedStack(weights, None, narrow, unit)

    @property
    def held(self) -> Tensor:
        """The codes."""
        return self.tuned.codes

    @property
    def codec(self) -> object:
        """The codec of every expert's weight."""
        return self.tuned.weight.codec

    def of_expert(self, expert: int) -> QTensor:
        """The trained weight of one expert, [N, K]."""
        return self.tuned.part(expert).tuned()

    def forward(self, x: Tensor, where: Tensor | int) -> Tensor:
        """Rows x [M, K] times the transposes of their experts' weights, [M, N]. where: as in `QExperts`."""
        weights = self.tuned.values().to(x.dtype).split(self.tuned.counts)
        if isinstance(where, int):
            y: Tensor = x @ weights[where].T
            return y
        ends = where.tolist()
        counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        *rows, beyond = x.split([*counts, len(x) - ends[-1]])
        y = torch.cat([own @ weight.T for own, weight in zip(rows, weights, strict=True)])
        out: Tensor = pad(y, (0, 0, 0, len(beyond)))
        return out


class TunedSlice:
    """One expert's linear of `TunedExperts`."""

    def __init__(self, linear: ExpertSlice, experts: TunedExperts) -> None:
        self.linear, self.parameters_of = linear, experts.tuned.parameters_of

    def tuned(self) -> QTensor:
        """The weight with its trained codes and numbers."""
        return self.linear.qtensor()


def replace_experts(slices: Sequence[ExpertSlice], narrow: torch.dtype | None, unit: float) -> TunedExperts:
    """Let the slices of one stacked weight compute with trained weights, which are `stackable`.

    narrow, unit: as in `MovedWeight`.
    """
    product: Any = slices[0].product
    whole: QExperts = product.linear
    made = TunedExperts(whole, narrow, unit)
    for each in slices:
        if each.index == 0:
            each.add_module("stacked", made)
    product.linear = made
    return made
