"""Tensor parallelism of experts: each rank holds a part of every expert, and the outputs of all ranks are added.

    y = sum over experts of w D (act(G x) * U x)        rank r has the rows r of G and U, and the columns r of D

So a layer takes one sum of all ranks, after its experts' outputs are weighted and added. A layer stays whole on each
rank where a part cannot do so: groups of D would be cut, its columns are stored in another order, experts have a norm
after D, or some experts return their input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from fewbit.errors import PlanError
from fewbit.models import experts
from fewbit.models.separated import SeparateBatchedExperts, SeparateExperts, separated
from fewbit.nn.layers import QLinear
from fewbit.nn.parallel import Sum
from fewbit.schemes.base import QTensor
from fewbit.schemes.parted import part

STYLE = "moe_tp_experts"  # in transformers' plans, of the module of a layer's experts
_ADDED = (SeparateExperts.forward, SeparateBatchedExperts.forward)  # their outputs are sums of what parts compute

WeightOf = Callable[[str, Any], QTensor]


def _not_added(kind: type[SeparateExperts], module: Any) -> str | None:
    """Why the sum of what parts of the experts return is not what the experts return; None if it is."""
    if kind.forward not in _ADDED:
        return "not all that they return is a product of weights"
    return "a norm follows each expert" if getattr(module, "has_post_expert_norm", False) else None


def _not_shared(inner: int, size: int) -> str | None:
    return f"{size} processes cannot share {inner} inner features" if inner % size else None


class Experts:
    """The separate experts of one layer. cut: whether each rank gets a part of them; None until that is known."""

    def __init__(self, path: str, module: SeparateExperts) -> None:
        self.path, self.module = path, module
        self.cut: bool | None = None

    @property
    def linears(self) -> dict[str, Any]:
        """The linears of all experts, by their names in the model."""
        return {
            f"{self.path}.{expert}.{leaf}": getattr(self.module.get_submodule(str(expert)), leaf)
            for expert in range(self.module.count)
            for leaf in self.module.leaves
        }

    def axis(self, name: str) -> int:
        """The dimension in which the weight of a linear is cut: rows of gate and up, columns of down."""
        return 1 if name.rpartition(".")[2] == self.module.leaves[-1] else 0

    def why_whole(self, size: int, weight_of: WeightOf | None = None) -> str | None:
        """None if `size` ranks can share the experts, else why not.

        weight_of: of packed experts; the weights of all are read.
        """
        if why := _not_added(type(self.module), self.module):
            return why
        linears = self.linears
        if len({isinstance(linear, QLinear) for linear in linears.values()}) > 1:
            return "not all of them are packed"
        tried = set[tuple[Any, ...]]()
        for name, linear in linears.items():
            axis = self.axis(name)
            if weight_of is None:
                if why := _not_shared(linear.weight.shape[axis], size):
                    return why
                continue
            weight = weight_of(name, linear)
            if axis and weight.permutation is not None:  # some may lack it: no calibration input reached them
                return "the columns of their down projections are stored in another order"
            if (kind := (axis, weight.codec, weight.shape)) in tried:
                continue
            tried.add(kind)
            try:
                part(weight, axis, 0, size)
            except PlanError as error:
                return error.message
        return None

    def begin(self) -> None:
        """Let each rank have its part: the outputs of all ranks are added."""
        self.cut = True
        self.module.register_forward_hook(Sum())


def of_linears(model: nn.Module, plan: Mapping[str, str], generic: Callable[[str], str]) -> dict[str, Experts]:
    """Linear -> the experts that it belongs to, for the separate experts that the plan lets ranks share."""
    found = dict[str, Experts]()
    for path, module in model.named_modules():
        if isinstance(module, SeparateExperts) and plan.get(generic(path)) == STYLE:
            own = Experts(path, module)
            found |= dict.fromkeys(own.linears, own)
    return found


def cut_fused(model: Any, rank: int, size: int, shared: Callable[[str], bool]) -> dict[str, str]:
    """Give a rank its part of the fused experts of each layer whose name is `shared`. Name -> why others stay whole."""
    whole = {}
    for name, module in list(experts.fused_in(model)):
        if shared(name) and (why := _cut(model, name, module, (rank, size))) is not None:
            whole[name] = why
    return whole


def _cut(model: Any, name: str, module: Any, at: tuple[int, int]) -> str | None:
    kind, own = separated(type(module)), type(module)
    if why := _not_added(kind, module):
        return why
    mapping, (rank, size) = get_model_conversion_mapping(model), at
    module.__class__ = kind
    leaves, pieces = module.laid_out(name, mapping)
    inner = next(piece.of(getattr(module, piece.fused), 0).shape[0] for piece in pieces if piece.leaf == leaves[0])
    if why := _not_shared(inner, size):
        module.__class__ = own
        return why
    held = slice(inner * rank // size, inner * (rank + 1) // size)
    fused = {piece.fused: getattr(module, piece.fused).data for piece in pieces}
    for piece in pieces:
        shape, down = list(fused[piece.fused].shape), piece.leaf == leaves[-1]
        if not (down and piece.kind == "bias"):
            rows = 2 if piece.transposed else 1
            shape[3 - rows if down else rows] //= size
        like = fused[piece.fused]
        setattr(module, piece.fused, nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device), False))
    for piece, new in zip(pieces, module.laid_out(name, mapping)[1], strict=True):
        down, target = piece.leaf == leaves[-1], getattr(module, piece.fused).data
        for expert in range(len(target)):
            values = piece.of(fused[piece.fused], expert)
            if not down:
                new.of(target, expert).copy_(values[held])
            elif piece.kind == "weight":
                new.of(target, expert).copy_(values[:, held])
            elif rank == 0:  # else the sum would have it several times
                new.of(target, expert).copy_(values)
    module.__class__ = own
    module.register_forward_hook(Sum())
    return None
