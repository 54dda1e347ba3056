"""AWQ: scale up the input channels with large activations before rounding, so that they lose less.

The rounding error of a weight hardly depends on the weight's size, but the error in column j is multiplied by the
input x_j. AWQ multiplies columns by s and divides their inputs by s (Lin et al. 2023,
https://arxiv.org/abs/2306.00978, eq. 4 and 5):

    y = Q(W diag(s)) (diag(s)⁻¹ x)

    s = m^α / sqrt(max m^α · min m^α),     m_j = mean |x_j|,     α = argmin ||f(Q(W diag(s)) diag(s)⁻¹) - f(W)||²

Q rounds to nearest. f is the output of the attention or MLP that reads x, on some of the calibration tokens. The
division is free at run time: it is folded into what produces x (a norm's weight, or the rows of the linear before).

α is searched over 0, 1/grid, 2/grid ... 1. α = 0 means s = 1, so the search always has a valid candidate; a tie keeps
the smaller α. The fold changes a norm's weight, which a file rounds to its own dtype. s is computed from the rounded
weight, so that the block stays exact.

Codes: the scheme's fit shrinks each range where that lowers sum_j E[x_j²] (w_j - ŵ_j)² (clip search), then weights are
rounded to nearest. In `awq+gptq`, AWQ only scales and GPTQ chooses the codes.

>>> from fewbit.schemes.base import parse
>>> torch.manual_seed(0) and None
>>> x, w = torch.randn(256, 32) * torch.linspace(0.1, 3, 32), torch.randn(8, 32)
>>> stats = Stats(32, Need.MEAN_SQUARE); stats.add(x)
>>> def error(q): return float(((w - q.dequantize()) @ x.T).square().mean())
>>> nearest = Method().quantize(w, parse("int3-g16-sym"), None).weight
>>> error(AWQ().quantize(w, parse("int3-g16-sym"), stats).weight) < 0.9 * error(nearest)
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from fewbit.errors import NumericsError, PlanError
from fewbit.lazy import Tensor, torch
from fewbit.methods.base import Choice, Fold, Method, in_compute_dtype, option
from fewbit.registry import register
from fewbit.schemes.base import QTensor, Scheme
from fewbit.stats import Need, Stats

_TINY = 1e-4  # smallest m_j, relative to their mean: limits the scales of channels with almost no input


@register("methods", "awq")
@dataclass(frozen=True)
class AWQ(Method):
    """Scales columns before they are rounded."""

    grid: int = option(20, "Steps in the search for the exponent of the column scales; 0: no scaling.")
    clip_search: bool = option(True, "Search scales that clip the largest weights where that lowers the error.")

    needs = Need.MEAN_SQUARE
    rewrites: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.grid <= 1000:
            raise PlanError(f"`grid`: '{self.grid}' is not a number of steps", "Use 0 to 1000; the default is 20.")

    def rewrite(self, fold: Fold, schemes: Mapping[str, Scheme]) -> Tensor | None:
        weights, size = fold.weights(), fold.mean_abs().double()
        size = size.clamp(min=_TINY * float(size.mean()) or 1.0)

        def error(scales: Tensor) -> float:
            try:
                return fold.error({m: _rounded(w * scales, schemes[m]).div_(scales) for m, w in weights.items()})
            except NumericsError:  # the scaled weight exceeds the range of the scheme
                return inf

        candidates = [torch.ones_like(size, dtype=torch.float32)]
        for step in range(1, self.grid + 1):
            power = size ** (step / self.grid)
            candidates.append(fold.stored((power / (power.max() * power.min()).sqrt()).float()))
        errors = fold.errors(candidates, error)
        best = errors.index(min(errors))
        return candidates[best] if best else None

    def quantize(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Choice:
        assert stats is not None
        w = in_compute_dtype(w)
        grids = scheme.fit(w, stats.mean_square.to(w.dtype) if self.clip_search else None)
        return Choice(QTensor(scheme, (w.shape[0], w.shape[1]), scheme.pack(grids.encode(w), grids)))


def _rounded(w: Tensor, scheme: Scheme) -> Tensor:
    codes, grids = scheme.nearest(w)
    return grids.decode(codes)
