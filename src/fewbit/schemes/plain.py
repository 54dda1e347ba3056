"""Grids as plain tensors and numbers, which a kernel for a GPU can read (`Grids.plain`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from fewbit.lazy import Tensor, torch


@dataclass(frozen=True)
class Uniform:
    """Grids of evenly spaced values: value = (code - zero) * scale - offset, code = 0 ... top.

    scale, zero and offset are [N, K / group] and of one dtype; `group` columns of a row share an entry. A zero given
    as an int holds for all groups; an offset of None is 0. The nearest code is round((w + offset) / scale) + zero,
    ties to even. Where the scale is 0, the code is `zero`.
    """

    scale: Tensor
    zero: Tensor | int
    offset: Tensor | None
    top: int
    group: int

    @property
    def span(self) -> float:
        """The distance from the lowest value to the highest, in scales."""
        return float(self.top)

    @property
    def kind(self) -> tuple[object, ...]:
        """All but the numbers of one weight."""
        return self.top, self.group, self.offset is None


@dataclass(frozen=True)
class Uneven:
    """Grids of a few values at other distances: value = level * scale.

    scale is [N, K / group]; `group` columns of a row share an entry. levels: in rising order. codes: the code of each.
    The nearest level is the one whose index is the number of `edges` below w / scale, in float32. Where the scale is 0,
    w / scale counts as 0.
    """

    scale: Tensor
    levels: tuple[float, ...]
    edges: tuple[float, ...]
    codes: tuple[int, ...]
    group: int

    @classmethod
    def of(cls, scale: Tensor, levels: Sequence[float], group: int) -> Self:
        """Grids where code i means `levels[i]`. Ties go to the lower level. Of codes of one level, the first counts."""
        codes = {level: code for code, level in reversed([*enumerate(levels)])}
        rising = torch.tensor(sorted(codes), dtype=torch.float32, device="cpu")
        edges = ((rising[1:] + rising[:-1]) / 2).tolist()
        return cls(scale, tuple(sorted(codes)), tuple(edges), tuple(codes[level] for level in sorted(codes)), group)

    @property
    def span(self) -> float:
        """The distance from the lowest value to the highest, in scales."""
        return self.levels[-1] - self.levels[0]

    @property
    def kind(self) -> tuple[object, ...]:
        """All but the numbers of one weight."""
        return self.levels, self.group


Plain = Uniform | Uneven
