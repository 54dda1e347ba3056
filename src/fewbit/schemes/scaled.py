"""Small floats times one scale for each block of a weight: the grids that FP8, MXFP4 and NVFP4 have in common.

    w = s * number(code)        s: scale of the block of rows and columns, number: E4M3 or E2M1 (`floats`)

A weight [N, K] in blocks of R x C has scales [ceil(N / R), ceil(K / C)]. The last blocks may be smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewbit.lazy import Tensor, torch
from fewbit.schemes import floats
from fewbit.schemes.base import ALL, Columns, Grids, Uneven, check_values, chunk_rows, refit_scales
from fewbit.system import threads

Block = tuple[int, int]


@dataclass(frozen=True)
class Element:
    """A type of small floats. nearest: codes (uint8) of the numbers nearest to x. values: the numbers of codes.

    levels: if there are few, the numbers in rising order, with their edges and codes as in `Uneven`.
    """

    nearest: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]
    levels: Callable[[], tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]] | None = None


def _fp4_values(codes: Tensor) -> Tensor:
    return floats.e2m1_levels(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


E4M3 = Element(floats.to_e4m3, floats.e4m3)
E2M1 = Element(floats.to_e2m1, _fp4_values, floats.e2m1_edges)


@dataclass(frozen=True)
class ScaledGrids(Grids):
    """Scales, rounded as a file stores them but held as float32 or float64, one for each block of `shape` [N, K]."""

    element: Element
    shape: tuple[int, int]
    block: Block
    scale: Tensor

    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        if not (isinstance(columns, slice) and columns == ALL):
            return self.element.nearest(w / self._of(columns))
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for rows in chunks(w, self.block):
            codes[rows] = self.element.nearest(self._divided(w, rows))
        return codes

    def decode(self, codes: Tensor, columns: Columns = ALL) -> Tensor:
        values = self.element.values(codes).to(self.scale.dtype)
        if isinstance(columns, slice) and columns == ALL:
            return floats.scaled(values, self.scale, self.block)
        return values.mul_(self._of(columns))

    def plain(self) -> Uneven | None:
        if self.element.levels is None or self.block[0] != 1 or self.shape[1] % self.block[1]:
            return None
        return Uneven(self.scale, *self.element.levels(), self.block[1])

    def sums(self, w: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each block, sums over the nearest codes l with column weights h: h (w - ŵ)², h w l and h l l.

        The best scale for these codes is sum h w l / sum h l l.
        """
        found = []
        for rows in chunks(w, self.block):
            x, h = w[rows].to(self.scale.dtype), importance.to(self.scale.dtype)
            level = self.element.values(self.element.nearest(self._divided(w, rows))).to(x.dtype)
            error = floats.scaled(level.clone(), self._of_rows(rows), self.block).sub_(x).square_().mul_(h)
            weighted = level * h
            terms = (error, weighted * x, weighted.mul_(level))
            found.append([by_blocks(term, self.block).sum((1, 3)) for term in terms])
        error, up, down = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        return error, up, down

    def refitted(
        self,
        w: Tensor,
        codes: Tensor,
        hessian: Tensor,
        ridge: float,
        stored: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """The scales re-solved for fixed codes (`refit_scales`), each rounded by `stored`."""

        def levels(columns: slice) -> Tensor:
            return self.element.values(codes[:, columns]).to(w.dtype)

        return refit_scales(w - self.decode(codes), levels, self.scale, hessian, ridge, stored, self.block)

    def _divided(self, w: Tensor, rows: slice) -> Tensor:
        """Rows of the whole weight, divided by their scales."""
        x = w[rows].to(self.scale.dtype, copy=True)
        return floats.unscaled(x, self._of_rows(rows), self.block)

    def _of_rows(self, rows: slice) -> Tensor:
        """The scales of the blocks that contain these rows. The first row is the first of a block."""
        return self.scale[rows.start // self.block[0] : -(-rows.stop // self.block[0])]

    def _of(self, columns: Columns) -> Tensor:
        """Scales of some columns, [N, columns], or [N] for one."""
        index: Tensor | int
        if isinstance(columns, int):
            index = columns // self.block[1]
        else:
            every = torch.arange(self.shape[1], device=self.scale.device, dtype=torch.int64)
            index = every[columns] // self.block[1]
        scale: Tensor = self.scale[:, index]
        return scale if self.block[0] == 1 else scale.repeat_interleave(self.block[0], 0).narrow(0, 0, self.shape[0])


def chunks(w: Tensor, block: Block) -> list[slice]:
    """Slices of rows of `w`, each of whole blocks, to keep temporaries small."""
    return chunk_rows(w.shape[0], w.shape[1], threads.entries() if w.device.type == "cpu" else 1 << 24, block[0])


def by_blocks(x: Tensor, block: Block) -> Tensor:
    """x [R, K] as [blocks, rows, blocks, columns], the last blocks padded with 0."""
    rows, columns = (-size % of for size, of in zip(x.shape, block, strict=True))
    if rows or columns:
        x = torch.nn.functional.pad(x, (0, columns, 0, rows))
    blocks: Tensor = x.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
    return blocks


def spans(w: Tensor, block: Block) -> Tensor:
    """The largest magnitude of each block, float32, or float64 for a weight in float64.

    NumericsError if the weight is empty, or has NaN, Inf or a value beyond the range of float32.
    """
    dtype = w.dtype if w.dtype == torch.float64 else torch.float32
    found = [spans_of(w[rows].to(dtype), block) for rows in chunks(w, block)] if w.numel() else [w]
    return check_spans(torch.cat(found))


def spans_of(x: Tensor, block: Block) -> Tensor:
    """The largest magnitude of each block, unchecked, for a few rows in float32 or float64."""
    if block[0] == 1 and x.shape[1] % block[1] == 0:
        x = x.unflatten(1, (-1, block[1]))
        return torch.maximum(x.amax(2), x.amin(2).neg_())
    x = by_blocks(x, block)
    return torch.maximum(x.amax(3), x.amin(3).neg_()).amax(1)


def check_spans(top: Tensor) -> Tensor:
    """`top`, the largest magnitudes of blocks. NumericsError as `spans` raises it."""
    check_values(top, floats.FLOAT32_LARGEST, "float32")
    return top
