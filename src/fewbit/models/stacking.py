"""Gives packed linears their weights when a model is loaded. Those of the experts of a layer are stacked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fewbit.models import experts, parallel  # not its names: it may still be importing transformers, which imports this
from fewbit.nn.experts import stacked
from fewbit.nn.layers import Packed, QLinear
from fewbit.schemes.base import QTensor

WeightOf = Callable[[str, QLinear], QTensor]  # returns the weight of the linear of that name
Done = Callable[[list[Packed]], None]  # gets the layers that have their weights now


def pack(model: nn.Module, weight_of: WeightOf, done: Done, dtype: torch.dtype, kernel: str | None) -> None:
    """Give every packed linear its weight, and stack those of experts, one layer at a time.

    dtype: of activations. kernel: the kernel's name; None for the best. A warning names experts that cannot be stacked:
    they are multiplied one at a time.
    """
    apart: dict[str, list[str]] = {}
    weight_of = parallel.parts_of(model, weight_of)
    for name, module in list(model.named_modules()):
        if isinstance(module, experts.SeparateExperts) and (
            why := _Layer(name, module, weight_of, done).pack(dtype, kernel)
        ):
            apart.setdefault(why, []).append(name)
    for name, module in model.named_modules():
        if isinstance(module, QLinear) and module.placeholders:
            module.adopt(weight_of(name, module), dtype, kernel)
            done([module])
    for why, names in apart.items():
        more = f" and those of {len(names) - 1} more layers" if len(names) > 1 else ""
        warnings.warn(f"{names[0]}{more} are multiplied one expert at a time, which is slow: {why}", stacklevel=2)


class _Layer:
    """The experts of one layer. `weights` holds the weights that are read and not yet in a device layout."""

    def __init__(self, path: str, module: experts.SeparateExperts, weight_of: WeightOf, done: Done) -> None:
        self.path, self.module, self.weight_of, self.done = path, module, weight_of, done
        self.weights: dict[str, list[QTensor]] = {}

    def pack(self, dtype: torch.dtype, kernel: str | None) -> str | None:
        """Stack what can be stacked. Otherwise says why not; the linears then keep their own weights."""
        *into, down = self.module.leaves
        found = [self._linears(leaf) for leaf in self.module.leaves]
        if not any(isinstance(linear, QLinear) for linears in found for linear in linears):
            return None
        if not all(isinstance(linear, QLinear) for linears in found for linear in linears):
            return "not all of them are packed"
        for group in filter(None, (into, [down])):  # JetMoe's have one linear each
            self.weights = {leaf: self._read(leaf) for leaf in group}
            why = self._stack(group, dtype, kernel)
            if why and len(group) > 1:  # gate and up may differ from each other
                why = next((other for leaf in group if (other := self._stack([leaf], dtype, kernel))), None)
            if why:
                self._adopt(dtype, kernel)
                return why
        return None

    def _adopt(self, dtype: torch.dtype, kernel: str | None) -> None:
        """Give the linears the weights that were read for them but not stacked."""
        adopted: list[Packed] = []
        for leaf, weights in self.weights.items():
            for linear, weight in zip(self._linears(leaf), weights, strict=True):
                if linear.kernel is None:
                    adopted.append(linear.adopt(weight, dtype, kernel))
        self.done(adopted)

    def _linears(self, leaf: str) -> list[Any]:
        return [getattr(self.module.get_submodule(str(e)), leaf) for e in range(self.module.count)]

    def _read(self, leaf: str) -> list[QTensor]:
        return [self.weight_of(f"{self.path}.{e}.{leaf}", linear) for e, linear in enumerate(self._linears(leaf))]

    def _stack(self, group: list[str], dtype: torch.dtype, kernel: str | None) -> str | None:
        linears = list(zip(*(self._linears(leaf) for leaf in group), strict=True))
        made = stacked(linears, list(zip(*(self.weights[leaf] for leaf in group), strict=True)), dtype, kernel)
        if isinstance(made, str):
            return made
        for expert, slices in enumerate(made):
            for leaf, own in zip(group, slices, strict=True):
                setattr(self.module.get_submodule(str(expert)), leaf, own)
        for leaf in group:
            del self.weights[leaf]
        whole = made[0][0].product.linear
        self.done([whole])
        del linears
        if whole.prepared[0].is_cuda:
            # PyTorch keeps the small pieces that were freed, and the next stacked weight does not fit into them.
            torch.cuda.empty_cache()
        return None
