"""A sweep over groups of columns that chooses the scales of each group together with its codes.

A group J of columns is rounded under each of the scales that its grids have `nearby`. Let U_JJ be upper triangular and
(U_JJᵀ U_JJ)⁻¹ the cost of an error of these columns. The first column is rounded to nearest, its error is fed into the
others of the group, and so on, as in GPTQ. Then |E|² with E = (w_J - q_J) (U_JJ)⁻¹ is the cost under these scales. Each
row keeps the scales with the least, and of equal ones the first.

- GPTQ's pass: U is the factor of H⁻¹, so the cost is that after the columns that remain have adapted to it.
- Descent: U_JJᵀ U_JJ = (H_JJ)⁻¹, so the cost is that while all other columns stay, and w_J is the best value for them.
  A row keeps codes and scales of a group unless others lower its error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from fewbit.lazy import Tensor, torch
from fewbit.methods.sweep.definition import DAMP, TINY, Sweep
from fewbit.schemes.base import Grids, Uniform, chunk_rows

_NEAREST = 13  # choices in a descent, where most groups keep their scales: all take twice as long and gain 0.4 %
_CHUNK = {"cpu": 1 << 17}  # values that are rounded at a time; on a CPU they stay in its cache


class Rounded(NamedTuple):
    """choice int64 [N]; codes uint8, values and errors E, [columns, N] each."""

    choice: Tensor
    codes: Tensor
    values: Tensor
    errors: Tensor


class GroupSweep(Sweep):
    """A sweep whose steps are groups of `grids.run` columns, which `order` keeps together."""

    def __init__(self, grids: Grids, codes: Tensor, order: Tensor) -> None:
        super().__init__(grids, codes, order)
        groups = len(order) // grids.run
        self.choice = torch.zeros(groups, codes.shape[1], dtype=torch.int64, device=codes.device)

    @property
    def chosen(self) -> Grids:
        return self.grids.near(self.choice)

    def feed_back(self, start: int, stop: int, panel: Tensor, factor: Tensor) -> Tensor:
        errors = torch.empty_like(panel)
        for here, group, columns in self._groups(start, stop):
            found = self.rounded(panel[here], factor[here, here], self.grids.nearby(group))
            self.choice[group], self.codes[columns], errors[here] = found.choice, found.codes, found.errors
            panel[here.stop :].addmm_(factor[here, here.stop :].T, found.errors, alpha=-1)
        return errors

    def descend(self, start: int, stop: int, panel: Tensor, inner: Tensor, values: Tensor) -> Tensor:
        moves = torch.empty_like(panel)
        metrics = torch.stack([inner[here, here] for here, *_ in self._groups(start, stop)])
        least = DAMP * metrics.diagonal(dim1=1, dim2=2).mean(1) + TINY
        damped = metrics + torch.diag_embed(least.unsqueeze(1).expand(-1, self.grids.run))
        inverses = torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)
        factors = torch.linalg.cholesky_ex(inverses, upper=True).L
        steps = zip(self._groups(start, stop), metrics, inverses, factors, strict=True)
        for (here, group, columns), metric, inverse, factor in steps:
            wanted, nearby = values[columns] + inverse @ panel[here], self.grids.nearby(group, _NEAREST)
            found = self.rounded(wanted, factor, nearby)
            moved = found.values - values[columns]
            better = (moved * (2 * panel[here] - metric @ moved)).sum(0) > 0
            moves[here] = torch.where(better, moved, 0.0)
            self.choice[group] = torch.where(better, found.choice, 0)
            self.codes[columns] = torch.where(better, found.codes, self.codes[columns])
            panel.addmm_(inner[:, here], moves[here], alpha=-1)
        return moves

    def _groups(self, start: int, stop: int) -> Iterator[tuple[slice, int, slice]]:
        """The groups of order[start:stop]: their places in the panel, their numbers and their columns."""
        run = self.grids.run
        for i in range(0, stop - start, run):
            first = self.columns[start + i]
            yield slice(i, i + run), first // run, slice(first, first + run)

    def rounded(self, w: Tensor, factor: Tensor, nearby: Uniform) -> Rounded:
        """The group w [columns, N] under the best of the scales `nearby`. factor: U_JJ [columns, columns]."""
        pieces = []
        for rows in chunk_rows(w.shape[1], nearby.scale.shape[0] * len(w), _CHUNK.get(w.device.type, 1 << 26)):
            offset = None if nearby.offset is None else nearby.offset[:, rows]
            pieces.append(_rounded(w[:, rows], factor, replace(nearby, scale=nearby.scale[:, rows], offset=offset)))
        return pieces[0] if len(pieces) == 1 else Rounded(*(torch.cat(each, -1) for each in zip(*pieces, strict=True)))


def _rounded(w: Tensor, factor: Tensor, nearby: Uniform) -> Rounded:
    """All choices at once, [choices N] values in each column."""
    shape, scale, offset = nearby.scale.shape, nearby.scale.flatten(), nearby.offset
    divisor, down = torch.where(scale == 0, torch.inf, scale), None if offset is None else offset.flatten()
    rest, cost = w.repeat(1, shape[0]), torch.zeros_like(scale)
    codes, values = torch.empty_like(rest), torch.empty_like(rest)
    for i, row in enumerate(factor):
        level = rest[i] if down is None else rest[i] + down
        torch.div(level, divisor, out=codes[i]).round_().add_(nearby.zero).clamp_(0, nearby.top)
        torch.sub(codes[i], nearby.zero, out=values[i]).mul_(scale)
        if down is not None:
            values[i].sub_(down)
        rest[i].sub_(values[i]).div_(row[i])
        rest[i + 1 :].addr_(row[i + 1 :], rest[i], alpha=-1)
        cost.addcmul_(rest[i], rest[i])
    choice = cost.view(shape).argmin(0)
    best = choice.expand(len(w), 1, -1)
    codes, values, errors = (x.view(-1, *shape).gather(1, best).squeeze(1) for x in (codes, values, rest))
    return Rounded(choice, codes.to(torch.uint8), values, errors)
