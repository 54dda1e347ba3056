"""The definition of a sweep over columns, in torch, for any grids and any device."""

from __future__ import annotations

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import Grids

PANEL = 128  # columns of a panel; wider ones are slower, because updates inside a panel are vector operations


_TINY = 1e-30


class Sweep:
    """A sweep over the columns of a weight in `order` [K]. It writes `codes` uint8 [K, N], one row for each column."""

    def __init__(self, grids: Grids, codes: Tensor, order: Tensor) -> None:
        self.grids, self.codes = grids, codes
        self.columns: list[int] = order.tolist()

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
            chosen = self.grids.encode(values[column] + panel[i] / inner[i, i].clamp(min=_TINY), column)
            moves[i] = self.grids.decode(chosen, column) - values[column]
            self.codes[column] = chosen
            panel.addr_(inner[:, i], moves[i], alpha=-1)
        return moves
