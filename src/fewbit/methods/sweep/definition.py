"""A sweep over columns as it is defined, in torch, for any grids and any device."""

from __future__ import annotations

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import Grids

PANEL = 128  # columns; a multiple would be slower, the moves within a panel being vectors


_TINY = 1e-30


class Sweep:
    """`codes` uint8 [K, N], columns by rows, are written as columns are taken in `order` [K]."""

    def __init__(self, grids: Grids, codes: Tensor, order: Tensor) -> None:
        self.grids, self.codes = grids, codes
        self.columns: list[int] = order.tolist()

    def feed_back(self, start: int, stop: int, panel: Tensor, factor: Tensor) -> Tensor:
        """The errors [columns, N] of the columns start ... stop of the order, each over its own diagonal entry.

        `panel` [columns, N] holds what they have become and is overwritten; `factor` [columns, columns] is U there.
        """
        errors = torch.empty_like(panel)
        for i, column in enumerate(self.columns[start:stop]):
            row = factor[i, i:]
            self.codes[column] = chosen = self.grids.encode(panel[i], column)
            errors[i] = (panel[i] - self.grids.decode(chosen, column)) / row[0]
            panel[i + 1 :].addr_(row[1:], errors[i], alpha=-1)
        return errors

    def descend(self, start: int, stop: int, panel: Tensor, inner: Tensor, values: Tensor) -> Tensor:
        """How far [columns, N] the values of the columns start ... stop of the order have moved.

        `panel` [columns, N] holds their gradients and is overwritten, `inner` [columns, columns] is H among them,
        `values` [K, N] are those of the codes as they were.
        """
        moves = torch.empty_like(panel)
        for i, column in enumerate(self.columns[start:stop]):
            chosen = self.grids.encode(values[column] + panel[i] / inner[i, i].clamp(min=_TINY), column)
            moves[i] = self.grids.decode(chosen, column) - values[column]
            self.codes[column] = chosen
            panel.addr_(inner[:, i], moves[i], alpha=-1)
        return moves
