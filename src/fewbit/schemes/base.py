"""What a scheme is: grids fitted to a weight, and codes on those grids turned into plain tensors and back.

A weight is always 2-D, [N out, K in]. A *grid* is the finite set of values that the weights of one group may take. A
method chooses codes and sees nothing of a scheme but `fit`, `encode` and `decode`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Self, TypeAlias

from fewbit import registry
from fewbit.errors import FormatError, PlanError
from fewbit.lazy import Tensor, torch

Columns: TypeAlias = "slice | Tensor | int"
Rows: TypeAlias = "slice | Tensor"
ALL = slice(None)
Parts: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class PartSpec:
    """Shape and dtype of a tensor that need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Uniform:
    """Grids of evenly spaced values as plain tensors: value = (code - zero) * scale - offset, code = 0 ... top.

    `group` columns of a row share scale, zero and offset [N, K / group], all in one dtype; one zero may serve all, and
    there may be no offset. The nearest code is round((w + offset) / scale) + zero, ties to even, and zero of a group
    whose scale is nought.
    """

    scale: Tensor
    zero: Tensor | int
    offset: Tensor | None
    top: int
    group: int


class Grids(ABC):
    """The grids of a whole weight: the values its entries may take, exactly as they will be stored."""

    def uniform(self) -> Uniform | None:
        """The same grids as plain tensors where their values are evenly spaced, for a kernel to read; None: they are
        not, or cannot be had so, and `encode` and `decode` are all there is."""
        return None

    @abstractmethod
    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        """Codes (uint8) of the grid values nearest to `w`: [N, columns], or [N] for one column given as an int."""

    @abstractmethod
    def decode(self, codes: Tensor, columns: Columns = ALL) -> Tensor:
        """Values (dtype of the grids, float32 unless fitted to float64) of `codes`, shaped as they are."""


class Codec(ABC):
    """What every stored form can do, decode-only ones included."""

    @property
    @abstractmethod
    def payload(self) -> str:
        """Name of the part that holds the codes."""

    @abstractmethod
    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Names, shapes and dtypes of the parts of a weight of this shape, without data: exact sizes come from here."""

    @abstractmethod
    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        """The values that the parts mean, [rows, K] in `dtype`. This is the truth every kernel is held to."""

    @abstractmethod
    def why_not(self, shape: tuple[int, int]) -> str | None:
        """None if a weight of this shape can be stored, else a sentence that says why not."""

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int], name: str = "weight") -> None:
        """Raise FormatError, naming tensor and part, unless the parts have the shapes and dtypes of `part_specs`."""
        specs = self.part_specs(shape)
        if set(specs) != set(parts):
            raise FormatError(f"{name}: parts {sorted(parts)} found, {sorted(specs)} expected for {self}")
        for part, spec in specs.items():
            found = parts[part]
            if tuple(found.shape) != spec.shape or found.dtype != spec.dtype:
                raise FormatError(
                    f"{name}: part {part!r} is {found.dtype} {list(found.shape)}, "
                    f"{spec.dtype} {list(spec.shape)} expected for {self} of shape {list(shape)}"
                )

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all parts of a weight of this shape."""
        return sum(spec.nbytes for spec in self.part_specs(shape).values())


@dataclass(frozen=True)
class Scheme(Codec):
    """A codec that can also encode. Value-equal; `str` is its spec and `parse(str(s)) == s`."""

    family: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]  # specs, which lists show and the contract tests use
    group: int  # columns that share one fit; 0: the whole row

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: str) -> Scheme | None:
        """The scheme that `spec` names, None if this family does not know it; PlanError if it is malformed."""

    @abstractmethod
    def fit(self, w: Tensor, importance: Tensor | None = None) -> Grids:
        """The grids as they will be stored, for the whole weight `w` [N, K].

        `importance` [K] weighs the squared error of each column in a search; without it no search is made.
        """

    def nearest(self, w: Tensor) -> tuple[Tensor, Grids]:
        """Codes and grids of `w` rounded to nearest, the baseline of all methods.

        A scheme overrides this where a peer's bytes ask for more than its stored grid can tell: scales before they are
        rounded, a weight cast first.
        """
        grids = self.fit(w)
        return grids.encode(w), grids

    @abstractmethod
    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        """Plain tensors, as `part_specs` describes, that hold `codes` [N, K] and `grids`."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grids]:
        """The codes and grids that `parts` hold: the inverse of `pack`."""

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> Grids:
        """The best stored grids for codes already chosen, under tr(E (H + ridge I) Eᵀ); by default unchanged."""
        return grids

    def with_group(self, group: int) -> Self:
        """The same scheme with another group size."""
        return replace(self, group=group)

    def groups(self, k: int) -> int:
        """Groups in a row of `k` columns."""
        return k // self.group if self.group else 1


def refit_scales(
    error: Tensor,
    levels: Callable[[slice], Tensor],
    scale: Tensor,
    hessian: Tensor,
    ridge: float,
    stored: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Scales [N, G] re-solved one group at a time, all others held: s += (E H l) / (l H_gg l), as they will be stored.

    `error` [N, K] is w - ŵ, `levels` gives ŵ / s for some columns, and `stored` the scales nearest to some [N] of one
    group that a file can hold. No row gets worse under tr(E (H + ridge I) Eᵀ).
    """
    scale, group = scale.clone(), error.shape[1] // scale.shape[1]
    gradient = (error @ hessian).add_(error, alpha=ridge)
    del error
    for g in range(scale.shape[1]):
        columns = slice(g * group, (g + 1) * group)
        level = levels(columns)
        curvature = (level @ hessian[columns, columns]).add_(level, alpha=ridge).mul_(level).sum(1)
        step = (gradient[:, columns] * level).sum(1) / curvature
        solved = scale[:, g] + step
        solved = stored(torch.where(solved.isfinite() & (solved != 0), solved, scale[:, g]), g)
        # Storing can cost more than the step gains: keep the old scale where it does.
        moved = solved - scale[:, g]
        moved = torch.where(2 * step * moved > moved * moved, moved, torch.zeros_like(moved))
        scale[:, g] += moved
        level *= moved.unsqueeze(1)
        # What the groups before have become of the gradient, nobody asks.
        gradient[:, columns.stop :].addmm_(level, hessian[columns, columns.stop :], alpha=-1)
    return scale


def vanished(scheme: Scheme, w: Tensor, values: Tensor) -> int:
    """Groups of `w` [rows, K] that are not zero and whose stored `values` all are: smaller than any scale can say."""
    k = w.shape[1]
    group = scheme.group if scheme.group and k % scheme.group == 0 else k
    gone = w.unflatten(1, (-1, group)).any(-1) & ~values.unflatten(1, (-1, group)).any(-1)
    return int(gone.sum())


def chunk_rows(n: int, k: int, budget: int = 1 << 22) -> list[slice]:
    """Row slices of an [n, k] matrix of at most `budget` elements each, so that temporaries stay small."""
    step = max(1, budget // max(k, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


@dataclass
class QTensor:
    """A quantized weight: a codec, the shape of what it stands for, and the parts that hold it.

    `permutation` [K], where not None, says that stored column j is column `permutation[j]` of the weight (a foreign
    file's act-order `g_idx`).
    """

    codec: Codec
    shape: tuple[int, int]
    parts: Parts
    permutation: Tensor | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in `dtype`, float32 by default, decoded a chunk of rows at a time."""
        device, dtype = self.parts[self.codec.payload].device, dtype or torch.float32
        out = torch.empty(self.shape, dtype=dtype, device=device)
        for rows in chunk_rows(*self.shape):
            values = self.codec.dequantize(self.parts, self.shape, dtype, rows)
            if self.permutation is None:
                out[rows] = values
            else:
                out[rows, self.permutation] = values
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the parts (and of the permutation, where there is one)."""
        order = 0 if self.permutation is None else self.permutation.nbytes
        return order + sum(part.nbytes for part in self.parts.values())

    def map(self, fn: Callable[[Tensor], Tensor]) -> QTensor:
        """The same weight with `fn` applied to each tensor, for moves between devices."""
        order = None if self.permutation is None else fn(self.permutation)
        return QTensor(self.codec, self.shape, {name: fn(part) for name, part in self.parts.items()}, order)


def parse(spec: str) -> Scheme:
    """The scheme that `spec` names, such as `int4-g128-sym`; PlanError with the known ones otherwise."""
    families = registry.entries("schemes")
    for family in families.values():
        scheme = family.from_spec(spec)
        if scheme is not None:
            assert isinstance(scheme, Scheme)
            return scheme
    examples = [example for family in families.values() for example in family.examples]
    raise registry.unknown("scheme", spec, examples)


def parse_group(text: str, spec: str) -> int:
    """The group size written as `g128` or `row`; PlanError naming `spec` otherwise."""
    if text == "row":
        return 0
    if match := re.fullmatch(r"g(\d+)", text):
        return int(match[1])
    raise PlanError(f"scheme {spec!r}: {text!r} is no group size", "Write g16 to g1024, or row for the whole row.")
