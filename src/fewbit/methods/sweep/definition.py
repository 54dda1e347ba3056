"""The definition of a sweep over columns, in torch, for any grids and any device."""

from __future__ import annotations

from collections.abc import Iterator

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import Grids

PANEL = 128  # columns of a panel; wider ones are slower, because updates inside a panel are vector operations


TINY = 1e-30
DAMP = 1e-6  # share of its mean diagonal added to the Hessian of a vector or group, to solve for the best move


class Sweep:
    """A sweep over the columns of a weight in `order` [K]. It writes `codes` uint8 [K, N], one row for each column."""

    def __init__(self, grids: Grids, codes: Tensor, order: Tensor) -> None:
        self.grids, self.codes = grids, codes
        self.columns: list[int] = order.tolist()

    @property
    def chosen(self) -> Grids:
        """The grids of all codes, after the sweep."""
        return self.grids

    def feed_back(self, start: int, stop: int, panel: Tensor, factor: Tensor) -> Tensor:
        """GPTQ's pass over the columns order[start:stop]. Returns their errors e = (w_j - q_j) / U_jj, [columns, N].

        panel [columns, N]: the values of these columns after all earlier updates; it is overwritten.
        factor [columns, columns]: U in these columns.
        """
        errors = torch.empty_like(panel)
        for i, column in enumerate(self.columns[start:stop]):
            row = factor[i, i:]
            self.codes[column] = chosen = self.grids.encode(panel[i], column)
            errors[i] = (panel[i] - self.grids.decode(chosen, column)) / row[0]
            panel[i + 1 :].addr_(row[1:], errors[i], alpha=-1)
        return errors

    def descend(self, start: int, stop: int, panel: Tensor, inner: Tensor, values: Tensor) -> Tensor:
        """Coordinate descent on the columns order[start:stop]. Returns how far their values moved, [columns, N].

        panel [columns, N]: their gradients, H E; it is overwritten. inner [columns, columns]: H in these columns.
        values [K, N]: the values of all codes before the sweep.
        """
        moves = torch.empty_like(panel)
        for i, column in enumerate(self.columns[start:stop]):
            chosen = self.grids.encode(values[column] + panel[i] / inner[i, i].clamp(min=TINY), column)
            moves[i] = self.grids.decode(chosen, column) - values[column]
            self.codes[column] = chosen
            panel.addr_(inner[:, i], moves[i], alpha=-1)
        return moves


class VectorSweep(Sweep):
    """A sweep whose steps are vectors of `grids.vector` columns, which `order` keeps together. Codes are chosen under
    the whole Hessian of a vector."""

    def feed_back(self, start: int, stop: int, panel: Tensor, factor: Tensor) -> Tensor:
        """As for single columns, with the block of U of a vector: E = (w_J - q_J) (U_JJ)⁻¹, w_F <- w_F - E U_JF.

        The cost of an error of J, after the columns F have adapted to it, is |E|².
        """
        errors = torch.empty_like(panel)
        for here, columns in self._vectors(start, stop):
            corner = factor[here, here]
            metric = torch.cholesky_inverse(corner.contiguous(), upper=True)
            chosen = self.grids.encode_under(panel[here].T, columns, metric)
            self.codes[columns] = chosen.T
            missed = panel[here] - self.grids.decode(chosen, columns).T
            errors[here] = torch.linalg.solve_triangular(corner.T, missed, upper=False)
            panel[here.stop :].addmm_(factor[here, here.stop :].T, errors[here], alpha=-1)
        return errors

    def descend(self, start: int, stop: int, panel: Tensor, inner: Tensor, values: Tensor) -> Tensor:
        """Descent on one vector at a time. A row keeps its codes of a vector unless others lower its error."""
        moves = torch.empty_like(panel)
        for here, columns in self._vectors(start, stop):
            metric = inner[here, here]
            damped = metric.clone()
            damped.diagonal().add_(DAMP * metric.diagonal().mean() + TINY)
            wanted = torch.linalg.solve(damped, panel[here])  # [v, N]: the best move
            chosen = self.grids.encode_under((values[columns] + wanted).T, columns, metric)
            moved = self.grids.decode(chosen, columns).T - values[columns]
            gain = (moved * (2 * panel[here] - metric @ moved)).sum(0)
            better = gain > 0
            moves[here] = torch.where(better, moved, 0.0)
            self.codes[columns] = torch.where(better, chosen.T, self.codes[columns])
            panel.addmm_(inner[:, here], moves[here], alpha=-1)
        return moves

    def _vectors(self, start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """The vectors of order[start:stop]: their places in the panel, and their columns."""
        v = self.grids.vector
        for i in range(0, stop - start, v):
            first = self.columns[start + i]
            columns = torch.arange(first, first + v, dtype=torch.int64, device=self.codes.device)
            yield slice(i, i + v), columns
