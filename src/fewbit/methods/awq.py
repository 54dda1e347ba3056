"""AWQ: give the input channels that carry most a finer grid: scale them up before rounding, and down where they arise.

Rounding costs a weight about the same whatever its size, but an error in a column is multiplied by that column's
input. So columns are multiplied by s and their inputs divided by it, y = Q(W diag(s)) (diag(s)⁻¹ x), and the division
is folded into what feeds the linears (a norm's weight, the rows of the linear before), where it costs nothing (Lin et
al. 2023, https://arxiv.org/abs/2306.00978, eq. 4 and 5):

    s = m^α / sqrt(max m^α · min m^α),     m_j = mean |x_j|,     α = argmin ||f(Q(W diag(s)) diag(s)⁻¹) - f(W)||²

with f the output of the attention or MLP that reads the input, over some of the calibration tokens, and α from a grid
of 0, 1/grid ... 1. α = 0 is s = 1, so the search cannot fail, and at a tie the smaller α is kept. s is what can be
stored: a norm's weight is rounded to the type of its file first, and s follows from it.

Afterwards each range is shrunk as far as that lowers sum_j E[x_j²] (w_j - ŵ_j)² (the clip search of the scheme's own
fit), and weights go to the nearest value. Before a method that chooses better codes it only scales: `awq+gptq`.

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
from fewbit.methods.base import Choice, Fold, Method, option, working
from fewbit.registry import register
from fewbit.schemes.base import QTensor, Scheme
from fewbit.stats import Need, Stats

_TINY = 1e-4  # of the mean: channels that hardly carry anything are not scaled down without end


@register("methods", "awq")
@dataclass(frozen=True)
class AWQ(Method):
    """Columns scaled before they are rounded."""

    grid: int = option(20, "Steps in the search for the exponent of the column scales; 0: no scaling.")
    clip_search: bool = option(True, "Search scales that clip the largest weights where that lowers the error.")

    needs = Need.MEAN_SQUARE
    rewrites: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.grid <= 1000:
            raise PlanError(f"--grid: '{self.grid}' is no number of steps", "Give 0 to 1000; 20 is usual.")

    def rewrite(self, fold: Fold, schemes: Mapping[str, Scheme]) -> Tensor | None:
        weights, size = fold.weights(), fold.mean_abs().double()
        size = size.clamp(min=_TINY * float(size.mean()) or 1.0)

        def error(scales: Tensor) -> float:
            try:
                return fold.error({m: _rounded(w * scales, schemes[m]).div_(scales) for m, w in weights.items()})
            except NumericsError:  # beyond what the scheme can hold
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
        w = working(w)
        grids = scheme.fit(w, stats.mean_square.to(w.dtype) if self.clip_search else None)
        return Choice(QTensor(scheme, (w.shape[0], w.shape[1]), scheme.pack(grids.encode(w), grids)))


def _rounded(w: Tensor, scheme: Scheme) -> Tensor:
    codes, grids = scheme.nearest(w)
    return grids.decode(codes)
