"""Packed layers whose scales are trained, with the codes fixed.

    W = values(codes, s),        s = stored(s0 (1 + d))        d: what is trained, one for each scale, 0 at first

A scheme says which numbers of a weight are floats in a file (`Codec.trainable`). A step of d moves all of them in
proportion to their size, so one learning rate suits all weights. `stored` rounds as the file does, and gradients pass
through the rounding as if it were not there. So the loss that is minimized is that of the file, also where bfloat16
scales round most small steps away.

The weight is decoded a chunk of rows at a time, forward and backward. Memory is that of the inputs, plus d and its
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbit.nn.layers import QEmbedding, QLinear
from fewbit.schemes.base import QTensor, chunk_rows


class TunedWeight(nn.Module):
    """A packed weight with trainable numbers. It may belong to several layers, such as a tied embedding and head.

    narrow: a 16-bit type in which the file holds the numbers, if that is not the type of the weight's parts.
    """

    def __init__(self, weight: QTensor, narrow: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight, self.narrow = weight, narrow
        self.start = weight.codec.floats(weight.parts)
        self.delta = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(x)) for name, x in self.start.items()})

    @property
    def parameters_of(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.delta.values())

    @property
    def codes(self) -> Tensor:
        """The part that holds the codes."""
        return self.weight.parts[self.weight.codec.payload]

    def share(self, other: TunedWeight) -> None:
        """Train the numbers that servers expect to be equal in both weights as one, where they are equal now."""
        for name in self.weight.codec.shared:
            if name in other.start and torch.equal(self.start[name], other.start[name]):
                self.delta[name] = other.delta[name]

    def floats(self) -> dict[str, Tensor]:
        """The numbers as the file stores them, differentiable by `delta`."""
        moved = {name: start * (1 + self.delta[name]) for name, start in self.start.items()}
        stored = self._stored({name: value.detach() for name, value in moved.items()})
        return {name: stored[name] + (value - value.detach()) for name, value in moved.items()}

    def _stored(self, floats: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.narrow is not None:
            floats = {name: value.to(self.narrow).float() for name, value in floats.items()}
        return self.weight.codec.rounded(self.weight.parts, floats)

    @torch.no_grad()
    def tuned(self) -> QTensor:
        """The weight with its trained numbers."""
        parts = self.weight.codec.with_floats(self.weight.parts, self.floats())
        return QTensor(self.weight.codec, self.weight.shape, parts, self.weight.permutation)

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] times the transpose of the weight, [M, N] in the dtype of x."""
        if self.weight.permutation is not None:
            x = x[:, self.weight.permutation]
        floats = self.floats()
        y: Tensor = _Product.apply(x, self.weight, tuple(floats), *floats.values())  # type: ignore[no-untyped-call]
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of the weight, float32 [ids, K]. Every part and every number of the weight consists of rows."""
        floats = {name: value[ids] for name, value in self.floats().items()}
        parts = {name: part[ids] for name, part in self.weight.parts.items()}
        return self.weight.codec.values(parts, (len(ids), self.weight.shape[1]), floats)


class TunedLinear(QLinear):
    """A linear that computes with a `TunedWeight`. Its bias is that of the layer that it replaces."""

    def __init__(self, like: QLinear, tuned: TunedWeight) -> None:
        super().__init__(like.in_features, like.out_features, like.bias, like.module)
        self.transposed, self.dtype, self.tuned = like.transposed, like.dtype, tuned

    @property
    def held(self) -> Tensor:  # with it, `weight` reads as numbers
        return self.tuned.codes

    def qtensor(self) -> QTensor:
        return self.tuned.tuned()

    def forward(self, x: Tensor) -> Tensor:
        y = self.tuned.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.tuned.weight.codec}"


class TunedEmbedding(QEmbedding):
    """An embedding whose rows are those of a `TunedWeight`."""

    def __init__(self, like: QEmbedding, tuned: TunedWeight) -> None:
        super().__init__(like.num_embeddings, like.embedding_dim, like.module, like.scale)
        self.codec, self.dtype, self.stands_for, self.tuned = like.codec, like.dtype, like.stands_for, tuned

    @property
    def held(self) -> Tensor:  # with it, `weight` reads as numbers
        return self.tuned.codes

    def qtensor(self) -> QTensor:
        return self.tuned.tuned()

    def forward(self, ids: Tensor) -> Tensor:
        out = self.tuned.rows(ids.flatten()).to(self.dtype).view(*ids.shape, self.embedding_dim)
        return out if self.scale is None else out * torch.tensor(self.scale, dtype=out.dtype, device=out.device)


class _Product(torch.autograd.Function):
    """x Wᵀ. Both passes decode W a chunk of rows at a time; backward also differentiates the decoding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QTensor, names: tuple[str, ...], *floats: Tensor) -> Tensor:
        ctx.weight, ctx.names = weight, names
        ctx.save_for_backward(x, *floats)
        y = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
        numbers = dict(zip(names, floats, strict=True))
        with torch.autocast(x.device.type, enabled=False):
            for rows in chunk_rows(*weight.shape):
                values = weight.codec.values(weight.parts, weight.shape, numbers, rows)
                torch.matmul(x, values.to(x.dtype).T, out=y[:, rows])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *floats = ctx.saved_tensors
        weight, grad = ctx.weight, grads[0]
        leaves = [value.detach().requires_grad_() for value in floats]
        numbers = dict(zip(ctx.names, leaves, strict=True))
        of_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if ctx.needs_input_grad[0] else None
        of_floats = [torch.zeros_like(value) for value in floats]
        with torch.autocast(x.device.type, enabled=False):
            for rows in chunk_rows(*weight.shape):
                with torch.enable_grad():
                    values = weight.codec.values(weight.parts, weight.shape, numbers, rows)
                part = grad[:, rows].to(x.dtype)
                if of_x is not None:
                    of_x += part @ values.detach().to(x.dtype)
                if leaves:
                    of_values = (part.T @ x).float()
                    for total, own in zip(of_floats, torch.autograd.grad(values, leaves, of_values), strict=True):
                        total += own
        return None if of_x is None else of_x.to(x.dtype), None, None, *of_floats
