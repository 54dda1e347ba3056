"""The search for the scales of a type with a codebook: d and t with the smallest weighted squared error.

For entries g chosen at scale s, with A = sum h g² and B = sum h x g over a sub-block, the best scale is B / A, and it
lowers the error by B² / A. The search runs in three steps, as that of other block types (`search`):

1. Each sub-block on its own: choose entries at a few scales, keep the best B / A, and repeat from there.
2. Round the scales to d t, t odd: try values of d that put the largest scale at different t. The rounding error of a
   scale is weighed by A.
3. Refine in rounds: entries chosen at d t and at the two neighbours of t; the best t; d solved for these.

The result is the best stored grid of all rounds, with entries chosen anew at its scales.
"""

from __future__ import annotations

from functools import cache

from fewbit.lazy import Tensor, torch
from fewbit.schemes.ggml.search import half
from fewbit.schemes.ggml.vectors import Vectors, chunks, errors
from fewbit.system import ambient

# Scales tried in step 1, as shares of the one that maps the largest magnitude to the largest of the codebook.
_SHARES = {3: (0.4, 1.3, 12), 8: (0.55, 1.2, 10)}  # by the number of magnitudes
_SOLUTIONS = 2  # how often step 1 repeats from the best scale
_PLACES = 8  # values of t tried for the largest scale
_ROUNDS = 2  # of step 3
_FLOOR = 1e-4  # added to importances, relative to their mean: columns of importance 0 still get sensible values


def floored(importance: Tensor) -> Tensor:
    """Importances [..., K] under which vectors are chosen."""
    return importance + _FLOOR * importance.mean(-1, keepdim=True).clamp(min=1e-30)


def fit(kind: Vectors, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """d [N, blocks] and t [N, sub-blocks] of a weight x [N, K], float32: the plain grid without h, else a search.

    h [1 or N, K] are importances. Under them the result is never worse than the plain grid.
    """
    blocks = x.float().unflatten(1, (-1, kind.columns))
    size = blocks.abs().amax(2)
    # Scale each block to about 1, so that squares stay in range. Powers of two lose no digits.
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent.clamp_(min=-100))
    x = (blocks / unit.unsqueeze(2)).flatten(1)
    top = x.unflatten(1, (-1, kind.sub)).abs().amax(2) / kind.table[-1]
    if h is None:
        d, t = _projected(kind, top, torch.ones_like(top), unit)
        return d * unit, t
    h = h.float() / h.float().mean(1, keepdim=True).clamp(min=1e-30)
    d, t = torch.empty_like(unit), torch.empty_like(top)
    for rows in chunks(kind, x):
        own = h if len(h) == 1 else h[rows]
        search = _Search(kind, x[rows], own, unit[rows])
        d[rows], t[rows] = search.run(top[rows])
    return d * unit, t


class _Search:
    def __init__(self, kind: Vectors, x: Tensor, h: Tensor, unit: Tensor) -> None:
        self.kind, self.unit = kind, unit
        shape = (-1, kind.vector)
        self.errors = errors(kind, x.unflatten(1, shape), floored(h).unflatten(1, shape))
        self.spread = kind.sub // kind.vector

    def sums(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """A and B [N, sub-blocks] of the entries chosen at scales s [N, sub-blocks]."""
        square, cross = self.errors.sums(s.repeat_interleave(self.spread, 1))
        a, b = (each.unflatten(1, (-1, self.spread)).sum(2) for each in (square, cross))
        return a, b

    def least(self, s: Tensor) -> Tensor:
        """The error of the best entries at scales s, up to a constant: [tries, N, sub-blocks] both."""
        found: Tensor = self.errors.least(s.repeat_interleave(self.spread, 2)).unflatten(2, (-1, self.spread))
        return found.sum(3)

    def start(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """Step 1: scales and A [N, sub-blocks]."""
        tried = torch.stack([top * share for share in _shares(self.kind)])
        least, at = self.least(tried).min(0)
        best = torch.where(least < 0, tried.gather(0, at.unsqueeze(0)).squeeze(0), top)
        for _ in range(_SOLUTIONS):
            a, b = self.sums(best)
            best = torch.where(b > 0, b / a, best)
        return best, a

    def run(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """All three steps; the best grid found."""
        kind, subs = self.kind, self.kind.subs
        found = d, t = _projected(kind, top, torch.ones_like(top), self.unit)
        least = self._of_blocks(self.least(self._scales(d, t)[None])[0])
        d, t = _projected(kind, *self.start(top), self.unit)
        for last in (*[False] * _ROUNDS, True):
            near = torch.stack([(t + by).clamp_(*kind.sc) for by in ((0,) if last else (0, 2, -2))])
            s = self._scales(d, near)
            error = self.least(s)
            better = (whole := self._of_blocks(error[0])) < least
            found = torch.where(better, d, found[0]), torch.where(better.repeat_interleave(subs, 1), t, found[1])
            least = torch.minimum(whole, least)
            if last:
                break
            at = error.min(0, keepdim=True).indices
            t, s = (each.gather(0, at).squeeze(0) for each in (near, s))
            a, b = self.sums(s)
            d = half((self._of_blocks(t * b) / self._of_blocks(t * t * a)).nan_to_num(0.0).clamp_(min=0), self.unit)
        return found

    def _scales(self, d: Tensor, t: Tensor) -> Tensor:
        return d.repeat_interleave(self.kind.subs, 1) * t

    def _of_blocks(self, x: Tensor) -> Tensor:
        found: Tensor = x.unflatten(1, (-1, self.kind.subs))
        return found.sum(2)


@cache
@ambient.defaults()
def _shares(kind: Vectors) -> list[float]:
    low, high, count = _SHARES[len(kind.table) // 2]
    found: list[float] = torch.linspace(low, high, count, dtype=torch.float32, device="cpu").tolist()
    # Sub-blocks where all magnitudes are about the same, as in models with ternary weights.
    return [*found, *(kind.table[-1] / kind.table[-3 + i] for i in range(2))] if len(kind.table) == 6 else found


def _projected(kind: Vectors, scale: Tensor, weight: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """d [N, blocks], fp16 in units of `unit`, and odd t [N, sub-blocks] that minimize sum weight (scale - d t)²."""
    by_block = (-1, kind.subs)
    scale, weight = scale.unflatten(1, by_block), weight.unflatten(1, by_block)
    best_d, best_t = torch.zeros_like(unit), torch.ones_like(scale)
    least = torch.full_like(unit, torch.inf)
    for place in range(kind.sc[1], kind.sc[1] - 2 * _PLACES, -2):
        d = scale.amax(2) / place
        for last in (False, True):
            t = kind.step((scale / d.unsqueeze(2)).nan_to_num(1.0, 1.0, 1.0))
            if not last:
                d = half(((weight * scale * t).sum(2) / (weight * t * t).sum(2)).nan_to_num(0.0), unit)
        error = ((scale - d.unsqueeze(2) * t).square() * weight).sum(2)
        better = error < least
        best_d, least = torch.where(better, d, best_d), torch.where(better, error, least)
        best_t = torch.where(better.unsqueeze(2), t, best_t)
    return best_d, best_t.flatten(1)
