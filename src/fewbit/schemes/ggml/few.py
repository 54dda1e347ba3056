"""The block types of ggml with two to four levels: q1_0, q2_0, tq1_0, tq2_0.

They were made for models that were trained with such weights (BitNet). Of other models they leave little.

`fit` without importances gives ggml's own scale: the largest magnitude, or for q1_0 the mean. So a weight of -s, 0 and
s is stored without loss. With importances, and in `nearest`, d is searched: for the levels of some ranges, the scale of
least error follows in closed form.

>>> scheme = Few.from_spec("tq2_0")
>>> w = 0.25 * (torch.arange(256.0)[None] % 3 - 1)
>>> codes, grids = scheme.nearest(w)
>>> torch.equal(scheme.dequantize(scheme.pack(codes, grids), (1, 256), torch.float32), w)
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import ALL, FP16_LARGEST, Columns, Grids, Parts, Scheme, Uniform, check_values, chunk_rows
from fewbit.schemes.ggml import digits
from fewbit.schemes.ggml import grids as blockwise
from fewbit.schemes.ggml.codec import OfCodebook
from fewbit.schemes.ggml.digits import DIGITS, Digits
from fewbit.schemes.ggml.grids import BlockGrids
from fewbit.schemes.ggml.search import half
from fewbit.schemes.ggml.vector_search import floored

_TRIED = [0.2 + i / 23 for i in range(24)]  # parts of the range of levels that a search begins with
_ROUNDS = 3
_CHUNK = {"cpu": 1 << 18}


@dataclass(frozen=True)
class FewGrids(BlockGrids):
    """d [N, blocks]; the other fields are None."""

    @property
    def kind(self) -> Digits:
        return DIGITS[self.name]

    def plain(self) -> Uniform | None:
        kind = self.kind
        return Uniform(self.scale, kind.zero, None, kind.top, kind.sub) if kind.zero else None

    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        x, divisor, _ = self._aligned(w, columns, self._divisor)
        return _nearest(self.kind, x / divisor).reshape(w.shape)


def _nearest(kind: Digits, x: Tensor) -> Tensor:
    """Codes (uint8) of the levels nearest to x. Ties go to even, and 0 to the level 1 where there is no 0."""
    if not kind.zero:
        return (x >= 0).to(torch.uint8)
    return x.round().add_(kind.zero).clamp_(0, kind.top).to(torch.uint8)


@register("schemes", "few")
@dataclass(frozen=True)
class Few(OfCodebook, Scheme):
    """`q1_0`, `q2_0`, `tq1_0`, `tq2_0`: the name of a block type with two to four levels. A group is a block."""

    group: int
    name: str

    family: ClassVar[str] = "few"
    examples: ClassVar[tuple[str, ...]] = tuple(DIGITS)

    @classmethod
    def from_spec(cls, spec: str) -> Few | None:
        return cls(group=DIGITS[spec].columns, name=spec) if spec in DIGITS else None

    def fit(self, w: Tensor, importance: Tensor | None = None) -> FewGrids:
        check_values(w, FP16_LARGEST, "fp16 scales")
        return self._fitted(w, None if importance is None else floored(importance.float()))

    def nearest(self, w: Tensor) -> tuple[Tensor, FewGrids]:
        """Codes and grids from a search with equal weights for all columns."""
        check_values(w, FP16_LARGEST, "fp16 scales")
        grids = self._fitted(w, torch.ones(w.shape[1], device=w.device, dtype=torch.float32))
        return grids.encode(w), grids

    def _fitted(self, w: Tensor, importance: Tensor | None) -> FewGrids:
        kind, found = DIGITS[self.name], []
        h = None if importance is None else importance.unflatten(0, (-1, kind.columns))
        for rows in chunk_rows(w.shape[0], w.shape[1], _CHUNK.get(w.device.type, 1 << 24)):
            blocks = w[rows].float().unflatten(1, (-1, kind.columns))
            found.append(_scale(kind, blocks) if h is None else _searched(kind, blocks, h))
        dtype = w.dtype if w.dtype == torch.float64 else torch.float32
        return FewGrids(self.name, torch.cat(found).to(dtype), None, None, None)

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> FewGrids:
        """Re-solve d block by block. The error does not rise in any row."""
        assert isinstance(grids, FewGrids)
        return blockwise.refit(w, codes, grids, hessian, ridge)

    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        assert isinstance(grids, FewGrids)
        kind, n = grids.kind, len(codes)
        blocks = torch.empty(grids.d.numel(), kind.nbytes, dtype=torch.uint8, device=codes.device)
        blocks[:, kind.d : kind.d + 2] = grids.d.reshape(-1, 1).to(torch.float16).view(torch.uint8)
        blocks[:, digits.place(self.name)] = digits.pack(self.name, codes.reshape(-1, kind.columns))
        return {"blocks": blocks.view(n, -1)}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, FewGrids]:
        kind = DIGITS[self.name]
        blocks = parts["blocks"].reshape(-1, kind.nbytes)
        codes = digits.unpack(self.name, blocks[:, digits.place(self.name)])
        d = self.floats(parts)["d"]
        return codes.view(shape), FewGrids(self.name, d, None, None, None)


def _scale(kind: Digits, x: Tensor) -> Tensor:
    """ggml's scale of each block [N, blocks] of x [N, blocks, columns]."""
    return half(x.abs().amax(2) if kind.zero else x.abs().mean(2))


def _searched(kind: Digits, x: Tensor, h: Tensor) -> Tensor:
    """The scale of least error under the importances h [blocks, columns], as stored. Never worse than ggml's."""
    size = x.abs().amax(2)
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent.clamp_(min=-100))
    x = x / unit.unsqueeze(2)  # squares stay in range; powers of two lose no digits
    table = torch.tensor(kind.levels, dtype=torch.float32, device=x.device)
    best = _scale(kind, x * unit.unsqueeze(2)) / unit
    least = _error(kind, table, x, h, best)
    signs = (1, -1) if kind.top == 3 else (1,)  # a negative scale gives the outermost level to the other side
    starts = [sign * part / kind.levels[kind.top] for sign in signs for part in _TRIED]
    for start in starts if kind.zero else [1.0]:
        d = size / unit * start
        for _ in range(_ROUNDS):
            levels = table[_nearest(kind, x / _divisor(d)).int()]
            d = half(torch.nan_to_num((h * x * levels).sum(2) / (h * levels * levels).sum(2), 0.0, 0.0, 0.0), unit)
            error = _error(kind, table, x, h, d)
            best, least = torch.where(error < least, d, best), torch.minimum(error, least)
    return best * unit


def _error(kind: Digits, table: Tensor, x: Tensor, h: Tensor, d: Tensor) -> Tensor:
    values = table[_nearest(kind, x / _divisor(d)).int()] * d.unsqueeze(2)
    return ((values - x).square_() * h).sum(2)


def _divisor(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.inf, d).unsqueeze(2)
