"""Calibration statistics of a linear layer's input, over the rows x [K] that reached it.

There are four kinds, in rising order of cost:

    mean |x_j|           [K]
    mean x_j²            [K]
    H = mean x xᵀ        [K, K], the Hessian: an error e [K] in a row of the weight costs e H eᵀ

    S = mean d mᵀ        [K, K], the shift: d = x' - x and m = (x' + x) / 2, for the rows x' [K] of the original model

and besides max |x_j| [K], which servers need that round inputs with a fixed scale. The Hessian's diagonal is
mean x_j². Rows may have weights. All statistics are float32. Rows with NaN or Inf are
dropped and counted. `methods/targets.py` says what the shift is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from enum import IntEnum

from fewbit.errors import NumericsError
from fewbit.lazy import Tensor, torch
from fewbit.products import add_product, tensor_cores
from fewbit.system import ranks


class Need(IntEnum):
    """The statistic of a linear's input that a method needs, in rising order of cost."""

    NOTHING = 0
    MEAN_ABS = 1
    MEAN_SQUARE = 2
    HESSIAN = 3
    SHIFT = 4


@dataclass(frozen=True)
class Shift:
    """The shift of an input: the mean over most of the rows, and that over held-out rows, each [K, K].

    middle: mean m mᵀ over most of the rows.
    """

    fit: Tensor
    held_out: Tensor
    middle: Tensor


class Stats:
    """Statistics of one input of K columns. Linears that read the same tensor share them.

    need: the statistic to gather. rows, dropped: how many rows were counted, and how many had NaN or Inf. borrowed: how
    many rows of other inputs `shrink` added to them.
    """

    def __init__(self, k: int, need: Need, device: torch.device | str = "cpu") -> None:
        self.columns, self.need = k, need
        self.rows = 0
        self.borrowed = 0
        self._weight_sum = 0.0
        self.dropped = 0
        self._top = torch.zeros(k, device=device, dtype=torch.float32) if need > Need.NOTHING else None
        self._abs = torch.zeros(k, device=device, dtype=torch.float32) if need >= Need.MEAN_ABS else None
        self._square = torch.zeros(k, device=device, dtype=torch.float32) if need == Need.MEAN_SQUARE else None
        self._hessian = torch.zeros(k, k, device=device, dtype=torch.float32) if need >= Need.HESSIAN else None
        # [3, K, K]: the shift over most rows, that over held-out rows, mean m mᵀ; and the sums of the weights of rows.
        self._shift: Tensor | None = None
        self._shift_weights = [0.0, 0.0]
        # Whether what is right of the panels of H, and of mean m mᵀ, is not up to date.
        self._is_partial = self._middle_is_partial = False

    @classmethod
    def from_mean_square(cls, mean_square: Tensor, rows: int) -> Stats:
        """Statistics that another program measured: mean x_j² [K] over `rows` rows."""
        stats = cls(len(mean_square), Need.NOTHING, mean_square.device)
        stats.need, stats.rows, stats._square = Need.MEAN_SQUARE, rows, mean_square.float()
        return stats

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add the rows of x [..., K]. `weight` [...] holds a weight for each row; None: all rows weigh the same."""
        given = x.dtype
        x = x.detach().reshape(-1, x.shape[-1]).float()
        weight = (
            torch.ones(len(x), device=x.device, dtype=torch.float32)
            if weight is None
            else weight.detach().reshape(-1).float()
        )
        finite = torch.isfinite(x.sum(1)) & torch.isfinite(weight)
        if not finite.all():
            self.dropped += int((~finite).sum())
            x, weight = x[finite], weight[finite]
        if not len(x):
            return
        # Running means: float32 sums of millions of squares would lose digits, and dividing a sum at the end would
        # need a second [K, K] tensor.
        before = self._weight_sum
        self.rows += len(x)
        self._weight_sum += float(weight.sum())
        keep, share = before / self._weight_sum, 1 / self._weight_sum
        if self._top is not None:
            torch.maximum(self._top, x.abs().amax(0), out=self._top)
        if self._abs is not None:
            self._abs.mul_(keep).add_(weight @ x.abs(), alpha=share)
        if self._square is not None:
            self._square.mul_(keep).add_(weight @ x.square(), alpha=share)
        if self._hessian is not None:
            _add_gram(self._hessian, _factor(x * weight.sqrt().unsqueeze(1), given), keep, share)
            self._is_partial = True

    def add_shift(self, x: Tensor, original: Tensor, held_out: Tensor, weight: Tensor | None = None) -> None:
        """Add rows x [..., K] and those of the original model to the shift.

        held_out: bool [...], the rows that are held out. `weight` as in `add`. Rows that are not finite are left out.
        """
        given = x.dtype
        x, original = (each.detach().reshape(-1, self.columns).float() for each in (x, original))
        weight = torch.ones_like(x[:, 0]) if weight is None else weight.detach().reshape(-1).float()
        finite = torch.isfinite(x.sum(1)) & torch.isfinite(original.sum(1)) & torch.isfinite(weight)
        shift = self._shift_sums()
        for part, rows in enumerate((finite & ~held_out.reshape(-1), finite & held_out.reshape(-1))):
            count = int(rows.sum())
            if not count:
                continue
            here = slice(None) if count == len(x) else rows
            before, own = self._shift_weights[part], weight[here]
            self._shift_weights[part] += float(own.sum())
            root = own.sqrt().unsqueeze(1)
            apart = (original[here] - x[here]).mul_(root)
            middle = apart.mul(0.5).addcmul_(x[here], root)
            keep, share = before / self._shift_weights[part], 1 / self._shift_weights[part]
            apart, middle = _factor(apart, given), _factor(middle, given)
            add_product(shift[part], apart.T, middle, beta=keep, alpha=share)
            if part == 0:
                _add_gram(shift[2], middle, keep, share)
                self._middle_is_partial = True

    def _shift_sums(self) -> Tensor:
        if self._shift is None:
            like = self._hessian
            assert like is not None
            self._shift = torch.zeros(3, *like.shape, device=like.device, dtype=torch.float32)
        return self._shift

    def shrink(self, pool: Stats, strength: float) -> None:
        """Shrink the means, in place, towards those of `pool`, which count as `strength` rows.

        With n rows of its own and n0 = strength, H becomes (n H + n0 H_pool) / (n + n0). Without rows it is H_pool.
        """
        share = strength / (self.rows + strength) if self.rows else 1.0
        if not pool.rows or not share:
            return
        for own, other in ((self._abs, pool._abs), (self._square, pool._square), (self._hessian, pool._hessian)):
            if own is not None and other is not None:
                own.lerp_(other, share)
        self._is_partial |= pool._is_partial
        if self._top is not None and pool._top is not None:
            torch.maximum(self._top, pool._top, out=self._top)
        self.borrowed = pool.rows

    @property
    def is_empty(self) -> bool:
        """Whether the means are of no row at all."""
        return not self.rows and not self.borrowed

    def all_reduce(self) -> None:
        """Combine the statistics of all ranks, in place: afterwards each rank has those of all rows."""
        if ranks.size() == 1:
            return
        own = self._weight_sum
        counts = torch.tensor([own, self.rows, self.dropped], dtype=torch.float64, device="cpu")
        self._weight_sum, rows, dropped = ranks.all_reduce(counts).tolist()
        self.rows, self.dropped = int(rows), int(dropped)
        if self._top is not None:
            self._top.copy_(
                torch.stack([top.to(self._top.device) for top in ranks.all_gather(self._top.cpu())]).amax(0)
            )
        for mean in (self._abs, self._square, self._hessian):
            if mean is not None:
                ranks.all_reduce(mean.mul_(own / self._weight_sum if self._weight_sum else 0.0))
        self._is_partial = True  # another rank may have added rows since its last reading

    def all_reduce_shift(self) -> None:
        """The same for the shift."""
        if ranks.size() == 1:
            return
        owns = self._shift_weights
        self._shift_weights = ranks.all_reduce(torch.tensor(owns, dtype=torch.float64, device="cpu")).tolist()
        if not any(self._shift_weights):
            return
        shares = [own / total if total else 0.0 for own, total in zip(owns, self._shift_weights, strict=True)]
        for mean, share in zip(self._shift_sums(), (*shares, shares[0]), strict=True):
            ranks.all_reduce(mean.mul_(share))
        self._middle_is_partial = True

    def _complete(self) -> None:
        """Bring what is right of the panels up to date."""
        if self._is_partial and self._hessian is not None:
            _mirror(self._hessian)
        if self._middle_is_partial and self._shift is not None:
            _mirror(self._shift[2])
        self._is_partial = self._middle_is_partial = False

    def divided(self, scales: Tensor) -> Stats:
        """The statistics of the same input with its columns divided by `scales` [K]."""
        self._complete()
        stats = copy(self)
        stats._top = None if self._top is None else self._top / scales
        stats._abs = None if self._abs is None else self._abs / scales
        stats._square = None if self._square is None else self._square / scales.square()
        stats._hessian = None if self._hessian is None else self._hessian / scales / scales.unsqueeze(1)
        stats._shift = None if self._shift is None else self._shift / scales / scales.unsqueeze(1)
        return stats

    def ordered(self, order: Tensor) -> Stats:
        """The statistics of the same input with column `order[j]` at place j. order: int64 [K]."""
        self._complete()
        stats = copy(self)
        stats._top, stats._abs, stats._square = (
            None if each is None else each[order] for each in (self._top, self._abs, self._square)
        )
        stats._hessian, stats._shift = (
            None if each is None else each[..., order, :][..., order] for each in (self._hessian, self._shift)
        )
        return stats

    @property
    def shift(self) -> Shift | None:
        """The shift; None if it was not gathered, or there are no rows to fit it or none held out."""
        self._complete()
        return Shift(*self._shift) if self._shift is not None and all(self._shift_weights) else None

    @property
    def mean_abs(self) -> Tensor:
        """mean |x_j|, [K]. NumericsError if it was not gathered, or no finite row was seen; likewise below."""
        return self._checked(self._abs)

    @property
    def mean_square(self) -> Tensor:
        """mean x_j², [K]. It is the diagonal of the Hessian."""
        return self.hessian.diagonal() if self._hessian is not None else self._checked(self._square)

    @property
    def hessian(self) -> Tensor:
        """H = mean x xᵀ, [K, K]. It is not a copy: do not write to it."""
        self._complete()
        return self._checked(self._hessian)

    @property
    def largest(self) -> float:
        """max |x|. NumericsError as for the others, and for statistics that another program measured."""
        return float(self._checked(self._top).max())

    def _checked(self, mean: Tensor | None) -> Tensor:
        if mean is None:
            raise NumericsError(f"this statistic was not gathered (only {self.need.name} was)")
        if self.is_empty:
            raise NumericsError("no finite row reached this input during calibration")
        return mean


def _panels(k: int) -> Iterator[slice]:
    """Eight panels of k rows, or fewer of at least 64 rows."""
    size = -(-k // (8 * 64)) * 64
    yield from (slice(start, min(start + size, k)) for start in range(0, k, size))


def _add_gram(out: Tensor, x: Tensor, keep: float, share: float) -> None:
    """out [K, K] = keep out + share xᵀ x for x [rows, K], which is symmetric: without what is right of each panel.

    That is 44 % less work than the whole product. `_mirror` fills in the rest.
    """
    for rows in _panels(x.shape[1]):
        add_product(out[rows, : rows.stop], x[:, rows].T, x[:, : rows.stop], beta=keep, alpha=share)


def _mirror(matrix: Tensor) -> None:
    for rows in _panels(len(matrix)):
        matrix[: rows.start, rows] = matrix[rows, : rows.start].T


def _factor(x: Tensor, given: torch.dtype) -> Tensor:
    """Rows x float32, as a factor of a product of statistics. given: the dtype of the activations.

    On a GPU, activations that came in 16 bits are rounded to bfloat16, and tensor cores sum their products in float32.
    The rounding of a value, one part in 500, is random, and a mean over thousands of rows hardly has it. Both factors
    of x xᵀ are rounded the same way, so the Hessian stays symmetric and positive semidefinite.
    """
    narrow = given in (torch.bfloat16, torch.float16)
    return x.bfloat16() if narrow and x.is_cuda and tensor_cores(x.device) else x
