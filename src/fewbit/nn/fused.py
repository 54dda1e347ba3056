"""Fuses linears that read the same tensor: their weights are stacked and multiplied at once.

Each linear is replaced by a `Slice` of the stacked weight. A model calls q, k and v one after another with the same
input. The first call multiplies by the whole stacked weight, and the others take their part of that product. So the
model's own forward is unchanged. Code that looks for `k_proj` still finds a `QLinear`: LoRA can wrap it, and saving can
read its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbit.nn.layers import Packed, QLinear
from fewbit.schemes.base import QTensor
from fewbit.schemes.stacked import stack, unstack


class Product:
    """x Wᵀ for the stacked W, kept until all slices have taken their part.

    Threads may share it. A product is kept with its input and the slices that have taken their part, as one value: a
    thread that finds the product of another thread's input multiplies again.
    """

    def __init__(self, linear: Packed, rows: Sequence[int]) -> None:
        self.linear, self.rows = linear, list(rows)
        self.starts = [sum(rows[:index]) for index in range(len(rows))]
        self.kept: tuple[Tensor, Tensor, set[int], int] | None = None

    def multiply(self, x: Tensor, which: int) -> Tensor:
        """x Wᵀ. which: of several stacked weights with the same slices; here there is one."""
        product: Tensor = self.linear(x)
        return product

    def rows_of(self, index: int, x: Tensor) -> Tensor:
        """The columns of x Wᵀ that belong to slice `index`, [..., rows of the slice]."""
        which, part = divmod(index, len(self.rows))
        kept = self.kept
        if kept is None or kept[0] is not x or kept[3] != which or part in kept[2]:
            kept = self.kept = (x, self.multiply(x, which), set(), which)
        kept[2].add(part)
        if len(kept[2]) == len(self.rows):
            self.kept = None
        return kept[1].narrow(-1, self.starts[part], self.rows[part])


class Slice(QLinear):
    """Rows of a stacked weight that replace one of the original linears. The slice adds that linear's bias itself.

    The first slice has the stacked linear as a submodule, so that it is counted and moved once.
    """

    def __init__(self, product: Product, index: int, like: QLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.module = like.in_features, like.out_features, like.module
        self.register_parameter("bias", like.bias)
        self.transposed, self.placeholders = like.transposed, {}
        self.product, self.index = product, index
        if index == 0:
            self.stacked = product.linear

    # These attributes of a QLinear are those of the stacked linear.
    @property
    def kernel(self) -> Any:  # type: ignore[override]
        return self.product.linear.kernel

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.product.linear.dtype

    @property
    def held(self) -> Tensor | None:  # of the stacked linear: the rows of a device layout are not a layout themselves
        return self.product.linear.held

    @property
    def codec(self) -> Any:  # type: ignore[override]
        return self.qtensor().codec

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return (self.out_features, self.in_features)

    def qtensor(self) -> QTensor:
        return unstack(self.product.linear.qtensor(), self.product.rows)[self.index]

    def forward(self, x: Tensor) -> Tensor:
        y = self.product.rows_of(self.index, x)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        nn.Module._apply(self, fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, slice {self.index}"


def packed_linears(model: nn.Module) -> dict[str, QLinear]:
    """The quantized linears of a model by name. Slices are included; the stacked linears behind them are not."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
    inner = {f"{name}.stacked" for name, m in found.items() if isinstance(m, Slice)}
    return {name: m for name, m in found.items() if name not in inner}


def slices(linears: Sequence[QLinear]) -> list[Slice] | str:
    """The slices that replace these linears, in the same order; or a sentence that says why they cannot be fused."""
    first = linears[0]
    for attribute, what in (("codec", "scheme"), ("in_features", "columns"), ("dtype", "activations")):
        if len(found := {getattr(linear, attribute) for linear in linears}) > 1:
            return f"they differ in {what}: {', '.join(sorted(map(str, found)))}"
    if any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
        return "they have hooks"
    orders = [linear.permutation for linear in linears]
    if any((order is None) != (orders[0] is None) for order in orders) or not all(
        torch.equal(order, orders[0]) for order in orders if order is not None and orders[0] is not None
    ):
        return "their columns are stored in different orders"
    weight = stack([linear.qtensor() for linear in linears])
    whole = QLinear(first.in_features, weight.shape[0], None, " + ".join(linear.module for linear in linears))
    whole.adopt(weight, first.dtype, first.forced)
    assert whole.kernel is not None
    if any(linear.kernel is not None and linear.kernel.priority > whole.kernel.priority for linear in linears):
        return f"the kernel that each uses alone does not support {list(weight.shape)} of {weight.codec}"
    product = Product(whole, [linear.out_features for linear in linears])
    return [Slice(product, index, linear) for index, linear in enumerate(linears)]
