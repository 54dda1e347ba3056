"""GPTQ: quantize a weight column by column, and correct each rounding error in the columns that remain.

With the Hessian H = mean x xᵀ of the inputs, quantizing w to q costs tr((w - q) H (w - q)ᵀ). Once column j is rounded,
the best change of the remaining columns F has a closed form (Frantar et al. 2022, https://arxiv.org/abs/2210.17323,
eq. 2 and algorithm 1). With U the upper Cholesky factor of the inverse, H⁻¹ = Uᵀ U,

    e = (w_j - q_j) / U_jj,        w_F <- w_F - e U_jF.

1. Scales are searched under sum_j (w_j - ŵ_j)² / [H⁻¹]_jj. 1 / [H⁻¹]_jj is the cost of an error in column j after the
   other columns have adapted to it. H_jj is the cost if they do not adapt; with it the KL divergence of the demo model
   is 6 % higher.
2. Columns are quantized in falling order of H_jj (act-order). Each keeps the grid of its own group, which was fitted
   before (static groups), so columns are stored in their own order. Columns beyond a panel of 128 are updated once per
   panel. If a scheme stores only some vectors of adjacent codes, a step takes a vector of columns instead of one.
3. With a target, the codes are chosen for a weight that corrects errors of its input: see `targets.py`.
4. `refine` sweeps follow. Each re-solves the scales in closed form, then runs coordinate descent: each column moves to
   its best code under the whole H while all other columns stay. Where scales have only a few bits (k-quants), each
   group first chooses its scales and codes together. No step can raise the error.

Each value is rounded to the nearest value of the stored grid. A column whose input was always 0 is rounded to nearest.
If H is not positive definite with `damp`, the damping is raised tenfold at a time, up to 1. If that fails too, the
weight is rounded to nearest, and a note says so.

>>> from fewbit.schemes.base import parse
>>> torch.manual_seed(0) and None
>>> x, w = torch.randn(256, 32) @ torch.randn(32, 32), torch.randn(8, 32)
>>> stats = Stats(32, Need.HESSIAN); stats.add(x)
>>> def error(q): return float(((w - q.dequantize()) @ x.T).square().mean())
>>> nearest = Method().quantize(w, parse("int3-g16-sym"), None).weight
>>> error(GPTQ().quantize(w, parse("int3-g16-sym"), stats).weight) < 0.5 * error(nearest)
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fewbit.errors import PlanError
from fewbit.lazy import Tensor, torch
from fewbit.methods.base import Choice, Method, in_compute_dtype, option
from fewbit.methods.sweep.choose import sweep_for
from fewbit.methods.sweep.definition import PANEL
from fewbit.methods.targets import moved
from fewbit.products import add_halves
from fewbit.registry import register
from fewbit.schemes.base import Grids, QTensor, Scheme
from fewbit.schemes.stacked import unstack
from fewbit.stats import Need, Stats

_WIDE = 512  # columns of a triangular matrix that are inverted at once
_STACK = 1 << 24  # most values of weights that are quantized as one, on devices of these types
_STACKING = ("cuda",)
TARGET = 0.75
_TARGETED = (3, 7)  # bits a weight; with fewer a target loses on SmolLM2, and with more there is little to correct


@register("methods", "gptq")
@dataclass(frozen=True)
class GPTQ(Method):
    """Quantizes column by column; the remaining columns compensate for each error."""

    damp: float = option(0.01, "Damping: share of the Hessian's mean diagonal that is added to its diagonal.")
    act_order: bool = option(True, "Quantize the columns with the largest inputs first.")
    clip_search: bool = option(True, "Search scales that clip the largest weights where that lowers the error.")
    refine: int = option(2, "Final sweeps of scale refit and coordinate descent. More take longer and gain a little.")
    target: float | None = option(
        TARGET,
        "Correct up to this share of the error that earlier linears leave in the input.",
        optional=f"{TARGET:g}, and 0 below {_TARGETED[0]} or above {_TARGETED[1]} bits a weight",
    )

    needs = Need.HESSIAN

    def need(self, scheme: Scheme) -> Need:
        return Need.SHIFT if self.strength(scheme) else Need.HESSIAN

    def strength(self, scheme: Scheme) -> float:
        """The target for a weight of this scheme."""
        if self.target is None:
            return TARGET if _TARGETED[0] <= bits_per_weight(scheme) <= _TARGETED[1] else 0.0
        return self.target

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= 1:
            raise PlanError(
                f"`damp`: '{self.damp:g}' is not a fraction of the diagonal", "Use 0 to 1; the default is 0.01."
            )
        if self.refine < 0:
            raise PlanError(f"`refine`: '{self.refine}' is not a number of sweeps", "Use 0 or more.")
        if self.target is not None and not 0 <= self.target <= 1:
            raise PlanError(f"`target`: '{self.target:g}' is not a share", "Use 0 to 1; 0: no target.")

    def quantize(self, w: Tensor, scheme: Scheme, stats: Stats | None) -> Choice:
        return self.quantize_alike([w], [scheme], stats)[0]

    def quantize_alike(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Stats | None) -> list[Choice]:
        """Quantize weights of the same order of columns together: schemes with vectors of columns have their own."""
        assert stats is not None
        choices: dict[int, Choice] = {}
        for run in dict.fromkeys(scheme.run for scheme in schemes):
            those = [i for i, scheme in enumerate(schemes) if scheme.run == run]
            found = self._in_one_order([weights[i] for i in those], [schemes[i] for i in those], stats)
            choices |= zip(those, found, strict=True)
        return [choices[i] for i in range(len(schemes))]

    def _in_one_order(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Stats) -> list[Choice]:
        """Quantize all weights with one inverse factor. It is freed before the refinement, to keep peak memory low."""
        hessian = stats.hessian.to(in_compute_dtype(weights[0]).dtype)
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        notes = [f"{int(dead.sum())} input columns were always 0 during calibration"] if dead.any() else []
        order = self._order(diagonal, schemes[0].run)
        inverse, damp = inverse_factor(hessian, order, self.damp)
        if inverse is None:
            notes.append(f"Hessian not positive definite even with damping {damp:g}: rounded to nearest")
            nearest = [
                Method.quantize(self, in_compute_dtype(w), s, None) for w, s in zip(weights, schemes, strict=True)
            ]
            return [Choice(choice.weight, list(notes)) for choice in nearest]
        if damp > self.damp:
            notes.append(f"Hessian not positive definite: damping raised from {self.damp:g} to {damp:g}")
        importance = remaining_importance(inverse, order) if self.clip_search else None
        strengths: list[float | None] = [None] * len(weights)
        wanted = [self.strength(scheme) for scheme in schemes]
        if any(wanted) and (shift := stats.shift) is not None:
            found = moved([in_compute_dtype(w) for w in weights], shift, wanted, self.damp)
            weights, strengths = [w for w, _ in found], [strength for _, strength in found]
        stacks, swept, choices = _stacks(weights, schemes), [], list[Choice]()
        for scheme, stack in stacks:
            grids = scheme.fit(_stacked(stack), importance)
            swept.append(feed_back(_stacked(stack), grids, inverse, order))
        del inverse
        ridge = damp * float(diagonal.mean())
        for scheme, stack in stacks:
            w = _stacked(stack)
            codes, grids = swept.pop(0)
            for _ in range(self.refine):
                grids = scheme.refit(w, codes, grids, hessian, ridge)
                for run in sorted({scheme.run, scheme.vector}, reverse=True):
                    codes, grids = descend(w, codes, grids, hessian, self._order(diagonal, run), ridge, run=run)
            whole = QTensor(scheme, (w.shape[0], w.shape[1]), scheme.pack(codes, grids))
            own = unstack(whole, [len(each) for each in stack]) if len(stack) > 1 else [whole]
            choices.extend(Choice(weight, list(notes)) for weight in own)
        return [replace(choice, target=strength) for choice, strength in zip(choices, strengths, strict=True)]

    def _order(self, diagonal: Tensor, run: int) -> Tensor:
        """The order of columns, `run` of them together."""
        if self.act_order:
            return in_order(diagonal, run)
        return torch.arange(len(diagonal), dtype=torch.int64, device=diagonal.device)


def bits_per_weight(scheme: Scheme) -> float:
    """The bits that a large weight takes for each of its values, scales included."""
    shape = 256, 16384 * (scheme.group or 1)
    return 8 * scheme.nbytes(shape) / (shape[0] * shape[1])


def in_order(diagonal: Tensor, vector: int = 1) -> Tensor:
    """The columns in falling order of H_jj; vectors of columns by their sum, each vector's columns together."""
    size = diagonal.unflatten(0, (-1, vector)).sum(1)
    first = torch.argsort(size, descending=True, stable=True) * vector
    return (first.unsqueeze(1) + torch.arange(vector, dtype=torch.int64, device=first.device)).flatten()


def _stacks(weights: Sequence[Tensor], schemes: Sequence[Scheme]) -> list[tuple[Scheme, list[Tensor]]]:
    """The weights in order, those that are quantized as one weight together.

    On a GPU, small weights cost launches, not arithmetic, and no row depends on another. So neighbours of one scheme
    are stacked, such as gate and up of an expert. On a CPU each weight stays alone: larger matrices would save nothing.
    A global scale (`Scheme.for_all`) belongs to a scheme, though schemes compare without it.
    """
    stacks: list[tuple[Scheme, list[Tensor]]] = []
    for w, scheme in zip(weights, schemes, strict=True):
        if stacks and w.device.type in _STACKING and vars(stacks[-1][0]) == vars(scheme):
            stack = [*stacks[-1][1], w]
            shapes = [(each.shape[0], each.shape[1]) for each in stack]
            if sum(n * k for n, k in shapes) <= _STACK and all(scheme.by_rows(shape) for shape in shapes):
                stacks[-1] = (scheme, stack)
                continue
        stacks.append((scheme, [w]))
    return stacks


def _stacked(stack: Sequence[Tensor]) -> Tensor:
    return torch.cat([in_compute_dtype(w) for w in stack]) if len(stack) > 1 else in_compute_dtype(stack[0])


def inverse_factor(hessian: Tensor, order: Tensor, damp: float) -> tuple[Tensor | None, float]:
    """L⁻¹ [K, K], lower triangular, with L Lᵀ the damped H in *reverse* `order` of columns; and the damping used.

    With its rows and columns reversed, L⁻¹ is the U of the formula; `feed_back` reads it a few rows at a time. None if
    there is no factor even with the largest damping. A column without input counts as independent of all others.
    """
    diagonal = hessian.diagonal()
    scale = float(diagonal.mean()) or 1.0
    backwards = order.flip(0)
    while True:
        damped = hessian[backwards[:, None], backwards]
        damped.diagonal().add_(damp * scale)
        damped.diagonal()[damped.diagonal() == damp * scale] = scale
        # If H reversed is L Lᵀ, then H = R Rᵀ with R upper triangular, and U = R⁻¹. So one factorization is enough,
        # and H is never inverted. The factorization works in place, which needs column-major order; H is symmetric,
        # so its transpose is H in that order.
        failed = torch.empty((), dtype=torch.int32, device=damped.device)
        lower, failed = torch.linalg.cholesky_ex(damped.mT, out=(damped.mT, failed))
        del damped
        if not failed and torch.isfinite(lower.diagonal()).all():
            return _inverted(lower), damp
        if damp >= 1:
            return None, damp
        damp = min(1.0, max(damp, 1e-3) * 10)


def remaining_importance(inverse: Tensor, order: Tensor) -> Tensor:
    """1 / diag(H⁻¹) [K]: the cost of a squared error in a column after all other columns have adapted to it."""
    importance = torch.empty(len(order), dtype=inverse.dtype, device=inverse.device)
    importance[order.flip(0)] = torch.linalg.vector_norm(inverse, dim=0).square_().reciprocal_()
    return importance


def _inverted(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, in place, one panel of columns at a time.

    The solution for a panel is zero above it, so the columns left of it do not matter. On a CPU they are passed to the
    solver all the same: a slice of the matrix would be copied first. A GPU copies faster than it solves.
    """
    for start in range(0, len(lower), _WIDE):
        first = start if lower.is_cuda else 0
        unit = torch.zeros_like(lower[first:, start : start + _WIDE])
        unit[start - first :].diagonal().fill_(1)
        solved = torch.linalg.solve_triangular(lower[first:, first:], unit, upper=False)
        lower[start:, start : start + _WIDE] = solved[start - first :]
    return lower


def feed_back(w: Tensor, grids: Grids, inverse: Tensor, order: Tensor) -> tuple[Tensor, Grids]:
    """GPTQ's pass: codes uint8 [N, K], columns in `order`, the error of each fed into the columns that remain.

    Also the grids, with the chosen ones of their `nearby` scales if they have any.

    inverse: L⁻¹ of `inverse_factor`.
    """
    rest = w.T[order]  # [K, N], so that each column of the weight is contiguous
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
    sweep, k = sweep_for(grids, codes, order, grids.run), len(order)
    for start in range(0, k, PANEL):
        stop = min(start + PANEL, k)
        factor = inverse[k - stop : k - start, : k - start].flip(0, 1)  # U[start:stop, start:]
        errors = sweep.feed_back(start, stop, rest[start:stop], factor[:, : stop - start])
        add_halves(rest[stop:], factor[:, stop - start :].T, errors, alpha=-1)
    return codes.T.contiguous(), sweep.chosen


def descend(
    w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, order: Tensor, ridge: float = 0.0, *, run: int
) -> tuple[Tensor, Grids]:
    """Codes uint8 [N, K] and grids after a sweep of coordinate descent on tr(E (H + ridge I) Eᵀ). It never rises.

    run: columns of a step, `run` or `vector` of the grids.

    With ridge > 0 columns without input move to their nearest value; with ridge = 0 they keep their codes.
    """
    codes = codes.T.clone(memory_format=torch.contiguous_format)  # of a single row, `contiguous` is no copy
    values = grids.decode(codes.T).T.contiguous()
    errors = w.T - values
    gradient = add_halves(errors * ridge, hessian, errors)  # [K, N]
    del errors
    gradient = gradient[order]
    sweep, k = sweep_for(grids, codes, order, run), len(order)
    for start in range(0, k, PANEL):
        stop = min(start + PANEL, k)
        rows = hessian[order[start:stop]][:, order[start:]]
        inner = rows[:, : stop - start]
        inner.diagonal().add_(ridge)
        moves = sweep.descend(start, stop, gradient[start:stop], inner, values)
        add_halves(gradient[stop:], rows[:, stop - start :].T, moves, alpha=-1)
    return codes.T.contiguous(), sweep.chosen
