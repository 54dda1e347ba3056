"""Stacks the weights of all experts of a layer, so that one product serves all rows of all experts.

    experts.0.gate_proj [I, K], experts.0.up_proj [I, K], experts.1.gate_proj ...   ->   QExperts [E · 2I, K]

Each linear of an expert is replaced by an `ExpertSlice` of the stacked weight. The layer's own forward then multiplies
all rows at once. Code that looks for `experts.3.up_proj` still finds a `QLinear` with that weight: it can be called
alone, LoRA can wrap it, and saving can read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel, runs
from fewbit.nn.choose import choose
from fewbit.nn.fused import Product, Slice
from fewbit.nn.layers import Packed, QLinear, input_gradient
from fewbit.schemes.base import QTensor
from fewbit.schemes.stacked import concatenated, unstack


class QExperts(Packed):
    """The packed weights of E experts, [E·N, K]. Each row of x meets the weight of its expert.

    `permutation` is [E, K], one order of the columns for each expert, or None.
    """

    def __init__(self, experts: int, in_features: int, rows: int, module: str = "") -> None:
        super().__init__(in_features, experts * rows, module)
        self.experts, self.rows = experts, rows

    def _choose(self, weight: QTensor, device: torch.device, dtype: torch.dtype) -> Kernel:
        for name, spec in weight.codec.part_specs(self._shapes[1:]).items():
            found, wanted = weight.parts[name].shape[0], self.experts * spec.shape[0]
            if found != wanted:  # such as scales of NF4 that belong to rows of several experts
                raise KernelError(
                    f"{self.module or 'experts'}: {name!r} of {weight.codec} has size {found}, not {wanted}, so it "
                    f"cannot be cut into the parts of {self.experts} weights",
                    "Quantize each expert by itself, and concatenate the parts.",
                )
        return choose(weight, device, dtype, self.forced, self.experts)

    def forward(self, x: Tensor, where: Tensor | int) -> Tensor:
        """Rows x [M, K] times the transposes of their experts' weights: [M, N].

        where: int32 [E], the end of each expert's rows, which are sorted by expert; or one expert for all rows.
        Rows after the last end belong to no expert, and their result is 0.
        """
        return self.multiplied(x, where)

    def kernel_product(self, x: Tensor, where: Any) -> Tensor:
        assert self.kernel is not None
        order = self._buffers["permutation"]
        if isinstance(where, int):
            x = x if order is None else x[:, order[where]]
            own = self.kernel.of_expert(self.codec, self.prepared, self._shapes, where)
            return self.kernel.linear(x, self.codec, own, self._shapes[1:])
        if order is not None:
            x = x.gather(1, order[expert_of(where, x.shape[0])])
        return self.kernel.grouped(x, self.codec, self.prepared, self._shapes, where)

    def gradient(self, grad: Tensor, where: Any) -> Tensor:
        if isinstance(where, int):
            return input_gradient(grad, self.of_expert(where))
        out = torch.zeros(grad.shape[0], self.in_features, dtype=grad.dtype, device=grad.device)
        for expert, start, end in runs(where):
            out[start:end] = input_gradient(grad[start:end], self.of_expert(expert))
        return out

    def of_expert(self, expert: int) -> QTensor:
        """The weight of one expert as canonical parts, [N, K]."""
        assert self.kernel is not None
        own = self.kernel.of_expert(self.codec, self.prepared, self._shapes, expert)
        order = self._buffers["permutation"]
        parts = self.kernel.restore(self.codec, own, self._shapes[1:])
        return QTensor(self.codec, self._shapes[1:], parts, None if order is None else order[expert])

    def values(self) -> Tensor:
        return torch.cat([self.of_expert(expert).dequantize(self.dtype) for expert in range(self.experts)])

    @property
    def values_shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    @property
    def _shapes(self) -> tuple[int, int, int]:
        return (self.experts, self.rows, self.in_features)

    def extra_repr(self) -> str:
        kind = f"{self.codec}, kernel={self.kernel.name}" if self.kernel is not None else "empty"
        return f"{self.experts} x {self.in_features}, {self.rows}, {kind}"


def expert_of(ends: Tensor, rows: int) -> Tensor:
    """The expert of each row, int64 [rows]; for rows after the last end, the last expert."""
    numbers = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, numbers, right=True).clamp_(max=len(ends) - 1)


class ExpertProduct(Product):
    """x Wᵀ for the rows of one expert, kept until its slices have taken their part.

    rows: of the slices of one expert, which follow one another in the stacked weight.
    """

    linear: QExperts

    def multiply(self, x: Tensor, which: int) -> Tensor:
        product: Tensor = self.linear(x, which)
        return product


class ExpertSlice(Slice):
    """A linear of one expert: rows of the stacked weight. `index` counts the slices of all experts."""

    product: ExpertProduct

    @property
    def codec(self) -> Any:  # type: ignore[override]
        return self.product.linear.codec

    def qtensor(self) -> QTensor:
        expert, own = divmod(self.index, len(self.product.rows))
        return unstack(self.product.linear.of_expert(expert), self.product.rows)[own]


def stacked(
    linears: Sequence[Sequence[QLinear]], weights: Sequence[Sequence[QTensor]], dtype: torch.dtype, kernel: str | None
) -> list[list[ExpertSlice]] | str:
    """The slices that replace linears which read the same rows, or a sentence that says why they cannot be stacked.

    linears, weights: for each expert, its linears and their weights, on their device. dtype: of activations. kernel:
    the kernel's name; None for the best.
    """
    first = weights[0]
    for each in weights:
        for own, like in zip(each, first, strict=True):
            if own.codec != like.codec:
                return f"they differ in scheme: {like.codec}, {own.codec}"
            if own.shape != like.shape:
                return f"they differ in shape: {list(like.shape)}, {list(own.shape)}"
        if len({(w.codec, w.shape[1]) for w in each}) > 1:
            return "those of an expert differ in scheme or columns"
        if any(not _same(w.permutation, each[0].permutation) for w in each):
            return "the columns of an expert's weights are stored in different orders"
    orders = [each[0].permutation for each in weights]
    if len({order is None for order in orders}) > 1:
        return "the columns of some experts are stored in another order, and those of others are not"
    if len(first) > 1 and not all(w.codec.by_rows(w.shape) for w in first):
        return f"parts of {first[0].codec} belong to a whole weight"
    rows = [w.shape[0] for w in first]
    whole = QExperts(len(weights), first[0].shape[1], sum(rows), linears[0][0].module)
    whole.compute = linears[0][0].compute
    together = concatenated([w for each in weights for w in each])
    together.permutation = None if orders[0] is None else torch.stack([order for order in orders if order is not None])
    device = together.parts[together.codec.payload].device
    try:
        whole.adopt(together, dtype, kernel)
    except KernelError as error:
        return f"{error.message} ({error.hint})"
    assert whole.kernel is not None
    if whole.kernel.priority < choose(first[0], device, dtype, kernel).priority:
        return f"the kernel of a single {first[0].codec} weight does not multiply several at once"
    product = ExpertProduct(whole, rows)
    return [
        [ExpertSlice(product, e * len(rows) + i, linear) for i, linear in enumerate(own)]
        for e, own in enumerate(linears)
    ]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
