"""A weight whose codes are trained together with its scales, through the rounding.

    W = s (c - z) - o,      c = round(u) limited to 0 ... top      u: what is trained, one real number for each code

s, z and o are scale, zero point and offset of a group, as a scheme gives them (`Grids.moved`). The gradient of the
rounding is taken as 1 (straight-through): dL/du = s dL/dW. Where u is beyond the first or last code, a gradient that
pushes it further out counts as 0, and one that brings it back counts.

u starts at the code that a method chose. In a block it is moved by 0.7 of the way to where the weight to be
approximated lies on the grid, but by at most 0.34. So the first values are the method's, and a code far from its weight
moves after a smaller step of u.

Codes of a table (NF4) or of a scheme whose grids are not evenly spaced stay, and only the scales are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.nn.tuned import TunedWeight
from fewbit.schemes.base import Grids, QTensor, Scheme, Uniform
from fewbit.schemes.stacked import concatenated, unstack

UNIT = 5.0  # codes for a step of 1, so that one learning rate suits codes and scales of a block
_NEAR = 0.49  # codes; beyond it a weight counts as if it lay there
_PULL = 0.7  # with 1, the noise of the first steps moves the codes that GPTQ chose away from the nearest one


class MovedWeight(TunedWeight):
    """A quantized weight whose codes move.

    towards: the weight [N, K] that it approximates; without it, codes start in the middle between their neighbours,
    where noise moves the fewest. narrow: as in `TunedWeight`. unit: the codes that a step of 1 of `latent` moves.
    """

    def __init__(
        self, weight: QTensor, towards: Tensor | None, narrow: torch.dtype | None = None, unit: float = UNIT
    ) -> None:
        super().__init__(weight, narrow)
        self.unit = unit
        self.grids: Grids | None = None
        if isinstance(weight.codec, Scheme):
            codes, grids = weight.codec.unpack(weight.parts, weight.shape)
            if (uniform := grids.moved(self.start)) is not None:
                self.grids, self.first = grids, codes
                if towards is None:
                    start = codes.float()
                else:
                    aim = towards if weight.permutation is None else towards[:, weight.permutation]
                    start = _start(aim.float(), codes, uniform)
                self.latent = nn.Parameter(start.div_(unit))

    @property
    def parameters_of(self) -> list[nn.Parameter]:
        """What is trained: scales, and the positions of codes."""
        return [*self.delta.values(), *([] if self.grids is None else [self.latent])]

    @torch.no_grad()
    def codes_now(self) -> Tensor | None:
        """The trained codes, uint8 [N, K]; None if they stay."""
        if self.grids is None:
            return None
        uniform = self.grids.moved(self.start)
        assert uniform is not None
        return _rounded(self.latent, self.unit, uniform.top).to(torch.uint8)

    @property
    def share_moved(self) -> float | None:
        """The share of the codes that differ from those at the start; None if they stay."""
        now = self.codes_now()
        return None if now is None else float((now != self.first).double().mean())

    def values(self) -> Tensor:
        """The weight [N, K] as its file stores it, float32, differentiable by all that is trained."""
        floats = self.floats()
        if self.grids is None:
            values = self.weight.codec.values(self.weight.parts, self.weight.shape, floats)
        else:
            uniform = self.grids.moved(floats)
            assert uniform is not None
            values = decoded(self.latent, uniform, self.unit)
        if self.weight.permutation is None:
            return values
        return torch.zeros_like(values).index_copy(1, self.weight.permutation, values)

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] times the transpose of the weight, [M, N] in the dtype of x. The values are kept for backward."""
        return super().product(x) if self.grids is None else x @ self.values().to(x.dtype).T

    @torch.no_grad()
    def tuned(self) -> QTensor:
        """The weight with its trained codes and numbers."""
        weight, codes = self.weight, self.codes_now()
        parts = weight.parts
        if codes is not None:
            assert isinstance(weight.codec, Scheme)
            assert self.grids is not None
            parts = weight.codec.pack(codes, self.grids)
        parts = weight.codec.with_floats(parts, self.floats())
        return QTensor(weight.codec, weight.shape, parts, weight.permutation)


class MovedStack(MovedWeight):
    """Weights above one another that are trained as one, so that a step takes few operations for all of them.

    weights: one of any kind, or several for which `alike` gives one list. towards: [N, K] each.
    """

    def __init__(
        self,
        weights: Sequence[QTensor],
        towards: Sequence[Tensor] | None,
        narrow: torch.dtype | None = None,
        unit: float = UNIT,
    ) -> None:
        self.counts = [weight.shape[0] for weight in weights]
        whole = concatenated(weights) if len(weights) > 1 else weights[0]
        super().__init__(whole, None if towards is None else torch.cat(list(towards)), narrow, unit)

    def each(self) -> Sequence[Tensor]:
        """The values of the weights, float32 [N, K] each, differentiable by all that is trained."""
        values: Sequence[Tensor] = self.values().split(self.counts)
        return values

    def part(self, index: int) -> MovedWeight:
        """One of the weights, with a copy of what is trained."""
        if len(self.counts) == 1:
            return self
        made = MovedWeight(unstack(self.weight, self.counts)[index], None, self.narrow, self.unit)
        with torch.no_grad():
            for name, delta in made.delta.items():
                delta.copy_(self._own(self.delta[name], index))
            if made.grids is not None:
                made.first = self._own(self.first, index)
                made.latent.copy_(self._own(self.latent, index))
        return made

    def _own(self, numbers: Tensor, index: int) -> Tensor:
        own: Tensor = numbers.split([len(numbers) * n // sum(self.counts) for n in self.counts])[index]
        return own


def alike(weights: Mapping[str, QTensor]) -> list[list[str]]:
    """The names of weights, in lists of those that can be stacked: of one codec and number of columns."""
    found: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        key = (weight.codec, weight.shape[1]) if stackable(weight) else name
        found.setdefault(key, []).append(name)
    return list(found.values())


def stackable(weight: QTensor) -> bool:
    """Whether every part and every trained number of a weight belongs to one of its rows."""
    codec = weight.codec
    return weight.permutation is None and codec.by_rows(weight.shape) and not codec.shared


def decoded(latent: Tensor, uniform: Uniform, unit: float = UNIT) -> Tensor:
    """The values [N, K] of the codes round(unit latent), differentiable by latent [N, K], scales and offsets."""
    values: Tensor = _Values.apply(  # type: ignore[no-untyped-call]
        latent, uniform.scale, uniform.offset, uniform.zero, unit, uniform.top, uniform.group
    )
    return values


def _start(towards: Tensor, codes: Tensor, uniform: Uniform) -> Tensor:
    """The first positions [N, K], between the codes and where `towards` lies on the grid."""
    w = towards.unflatten(1, (-1, uniform.group))
    offset = 0 if uniform.offset is None else uniform.offset.unsqueeze(-1)
    zero = uniform.zero if isinstance(uniform.zero, int) else uniform.zero.unsqueeze(-1)
    place = ((w + offset) / uniform.scale.unsqueeze(-1) + zero).flatten(1)
    near = (place - codes).nan_to_num_(0.0, 0.0, 0.0)  # not a number where the scale is 0
    start: Tensor = near.clamp_(-_NEAR, _NEAR).mul_(_PULL).add_(codes)
    return start


def _rounded(latent: Tensor, unit: float, top: int) -> Tensor:
    return (latent * unit).round_().clamp_(0, top)


class _Values(torch.autograd.Function):
    """s (c - z) - o of each group. Backward computes the codes again, so that one tensor of positions is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        zero: Tensor | int,
        unit: float,
        top: int,
        group: int,
    ) -> Tensor:
        ctx.save_for_backward(latent, scale)
        ctx.zero, ctx.unit, ctx.top, ctx.group = zero, unit, top, group
        out = _levels(ctx, latent).mul_(scale.unsqueeze(-1))
        return (out if offset is None else out.sub_(offset.unsqueeze(-1))).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        latent, scale = ctx.saved_tensors
        grad = grads[0].unflatten(1, (-1, ctx.group))
        of_scale = _levels(ctx, latent).mul_(grad).sum(-1)
        of_offset = grad.sum(-1).neg_() if ctx.needs_input_grad[2] else None
        of_latent = (grad * (scale * ctx.unit).unsqueeze(-1)).flatten(1)
        out = (latent < 0) & (of_latent > 0) | (latent * ctx.unit > ctx.top) & (of_latent < 0)
        return of_latent.masked_fill_(out, 0), of_scale, of_offset, None, None, None, None


def _levels(ctx: Any, latent: Tensor) -> Tensor:
    """c - z of each group, [N, groups, group]."""
    levels: Tensor = _rounded(latent, ctx.unit, ctx.top).unflatten(1, (-1, ctx.group))
    return levels.sub_(ctx.zero if isinstance(ctx.zero, int) else ctx.zero.unsqueeze(-1))
