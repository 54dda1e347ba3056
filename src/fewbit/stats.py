"""What calibration measured of one linear's input: statistics over the rows x [K] that reached it.

Three kinds, each containing what the ones before it tell: the mean of |x_j|, the mean of x_j², and the Hessian
H = mean x xᵀ, of which the quadratic error of a row of the weight is e H eᵀ. The means may be weighted by row. All are
float32; rows with a NaN or
Inf are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from enum import IntEnum

from fewbit.errors import NumericsError
from fewbit.lazy import Tensor, torch
from fewbit.system import ranks


class Need(IntEnum):
    """What a method needs to know of a linear's input, in rising order of cost."""

    NOTHING = 0
    MEAN_ABS = 1
    MEAN_SQUARE = 2
    HESSIAN = 3


class Stats:
    """Statistics of the input rows of the linears that share one input of K columns."""

    def __init__(self, k: int, need: Need, device: torch.device | str = "cpu") -> None:
        self.need = need
        self.rows = 0
        self._mass = 0.0
        self.dropped = 0
        self._abs = torch.zeros(k, device=device, dtype=torch.float32) if need >= Need.MEAN_ABS else None
        self._square = torch.zeros(k, device=device, dtype=torch.float32) if need == Need.MEAN_SQUARE else None
        self._hessian = torch.zeros(k, k, device=device, dtype=torch.float32) if need == Need.HESSIAN else None

    @classmethod
    def known(cls, mean_square: Tensor, rows: int) -> Stats:
        """What another program measured: mean x_j² [K] over so many rows."""
        made = cls(len(mean_square), Need.NOTHING, mean_square.device)
        made.need, made.rows, made._square = Need.MEAN_SQUARE, rows, mean_square.float()
        return made

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Count the rows of x [..., K], each as much as its `weight` [...] says (all alike without)."""
        narrow = x.dtype in (torch.bfloat16, torch.float16)
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
        # Running means: sums of millions of squares would lose digits, and a mean needs no second [K, K] to be read.
        before = self._mass
        self.rows += len(x)
        self._mass += float(weight.sum())
        keep, share = before / self._mass, 1 / self._mass
        if self._abs is not None:
            self._abs.mul_(keep).add_(weight @ x.abs(), alpha=share)
        if self._square is not None:
            self._square.mul_(keep).add_(weight @ x.square(), alpha=share)
        if self._hessian is not None:
            x = x * weight.sqrt().unsqueeze(1)
            with _tf32() if narrow and x.is_cuda else nullcontext():
                self._hessian.addmm_(x.T, x, beta=keep, alpha=share)

    def add_up(self) -> None:
        """These become the statistics of the rows of all ranks."""
        if ranks.size() == 1:
            return
        counts = torch.tensor([self._mass, self.rows, self.dropped], dtype=torch.float64, device="cpu")
        own = self._mass
        self._mass, rows, dropped = ranks.add_up(counts).tolist()
        self.rows, self.dropped = int(rows), int(dropped)
        for mean in (self._abs, self._square, self._hessian):
            if mean is not None:
                ranks.add_up(mean.mul_(own / self._mass if self._mass else 0.0))

    def divided(self, scales: Tensor) -> Stats:
        """These statistics, had the columns [K] been divided by `scales`."""
        found = copy(self)
        found._abs = None if self._abs is None else self._abs / scales
        found._square = None if self._square is None else self._square / scales.square()
        found._hessian = None if self._hessian is None else self._hessian / scales / scales.unsqueeze(1)
        return found

    @property
    def mean_abs(self) -> Tensor:
        """mean |x_j|, [K]."""
        return self._checked(self._abs)

    @property
    def mean_square(self) -> Tensor:
        """mean x_j², [K]: the diagonal of the Hessian."""
        return self.hessian.diagonal() if self._hessian is not None else self._checked(self._square)

    @property
    def hessian(self) -> Tensor:
        """mean x xᵀ, [K, K]; not a copy."""
        return self._checked(self._hessian)

    def _checked(self, mean: Tensor | None) -> Tensor:
        if mean is None:
            raise NumericsError(f"this statistic was not gathered (only {self.need.name} was)")
        if not self.rows:
            raise NumericsError("no finite row reached this input during calibration")
        return mean


@contextmanager
def _tf32() -> Iterator[None]:
    """Within, a GPU multiplies float32 by its tensor cores, which round factors to 11 bits and add in float32.

    For activations that had 8 or 11 bits before: the product is that of rows of the same precision as those that came,
    symmetric and of no negative eigenvalue as it would be of those. On an H200 the
    statistics of a block of 8B take 0.74 s, not 2.8.
    """
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
