"""The interface of a scheme: fit grids to a weight, choose codes on the grids, and store both as plain tensors.

A weight is always 2-D, [N out, K in]. A *grid* is the finite set of values that the weights of one group may take.
A *code* is the index of a value in its grid, uint8. The *parts* are the named tensors that store codes and grids.

    fit:    w [N, K]  ->  grids          encode:  w, grids  ->  codes        pack:    codes, grids  ->  parts
    refit:  w, codes  ->  better grids   decode:  codes, grids  ->  values   unpack:  parts  ->  codes, grids

A method chooses codes. It knows nothing of a scheme but this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from math import inf, isfinite, prod
from typing import ClassVar, Self, TypeAlias

from fewbit import registry
from fewbit.errors import FormatError, NumericsError, PlanError
from fewbit.lazy import Tensor, torch
from fewbit.products import add_halves
from fewbit.schemes.plain import Plain as Plain
from fewbit.schemes.plain import Uneven as Uneven
from fewbit.schemes.plain import Uniform as Uniform
from fewbit.system import threads

Columns: TypeAlias = "slice | Tensor | int"
ALL = slice(None)
FP16_LARGEST, FP16_SMALLEST = 65504.0, 2.0**-24  # the range of positive fp16 numbers
Parts: TypeAlias = "dict[str, Tensor]"
_SOLUTIONS = 2  # how often `search_scales` applies its steps


@dataclass(frozen=True)
class PartSpec:
    """Shape and dtype of a tensor, which need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> PartSpec:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Grids(ABC):
    """The grids of a whole weight: the values its entries may take, exactly as a file stores them."""

    def plain(self) -> Plain | None:
        """These grids as plain tensors and numbers, for a kernel on a GPU. None if no kernel can use them."""
        return None

    def moved(self, floats: Mapping[str, Tensor]) -> Uniform | None:
        """`plain` with `floats` in place of the stored numbers (`Codec.floats`), and differentiable by them.

        Then codes can be trained too: a value is linear in its code. None if it is not; then codes stay.
        """
        return None

    @property
    def vector(self) -> int:
        """Adjacent columns whose codes must be chosen together, because only some combinations can be stored."""
        return 1

    @property
    def run(self) -> int:
        """Adjacent columns that a method takes in one step: a vector, or a group that has `nearby` scales."""
        return self.vector

    def nearby(self, group: int, most: int | None = None) -> Uniform:
        """Scales that one group of `run` columns can be given instead, scale and offset [choices, N].

        The first are its own, then the nearest; `most` of them or all. Only for grids with `run` > `vector`.
        """
        raise NotImplementedError

    def near(self, choice: Tensor) -> Self:
        """These grids with other scales: choice [groups, N] says which of `nearby` each group gets."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        """Codes (uint8) of the grid values nearest to `w`, which holds the given columns of the weight.

        `w` and the result are [N, columns], or [N] for one column given as an int. With a `vector` of more than one
        column they are whole vectors, and never an int.
        """

    def encode_under(self, w: Tensor, columns: Tensor, metric: Tensor) -> Tensor:
        """Codes [N, v] of one vector of columns, for a small (w - ŵ) M (w - ŵ)ᵀ in each row.

        w: [N, v]. metric: M [v, v], symmetric and positive. Only for schemes with a `vector` of more than one column.
        """
        raise NotImplementedError

    @abstractmethod
    def decode(self, codes: Tensor, columns: Columns = ALL) -> Tensor:
        """The values of `codes`, in the same shape. float32, or float64 if the grids were fitted to float64."""


class Codec(ABC):
    """A stored form of a weight that can be decoded. Some codecs only decode; a `Scheme` also encodes."""

    @property
    def payload(self) -> str:
        """Name of the part that holds the codes, "codes" by default."""
        return "codes"

    @abstractmethod
    def part_specs(self, shape: tuple[int, int]) -> Mapping[str, PartSpec]:
        """Name -> shape and dtype of each part of a weight of this shape. All reported sizes are computed from it."""

    @abstractmethod
    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        """The values of some rows of the weight, [rows, K] in `dtype`. Every kernel is checked against them."""

    @abstractmethod
    def why_not(self, shape: tuple[int, int]) -> str | None:
        """None if a weight of this shape can be stored, else the reason why not."""

    def by_rows(self, shape: tuple[int, int]) -> bool:
        """Whether every part consists of one piece per row, in the order of the rows.

        Then the concatenated parts of weights with K columns are the parts of these weights, one above the other.
        """
        return all(spec.shape[:1] == shape[:1] for spec in self.part_specs(shape).values())

    def single(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Codec, Mapping[str, Tensor]]:
        """The same values in a codec that stores no numbers of the whole weight; by default this codec."""
        return self, parts

    def streams(self, k: int) -> Mapping[str, tuple[int, int]]:
        """The parts whose rows are bit streams (`bits.pack`): bits of a number, and numbers in a row of K columns."""
        return {}

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, int], name: str = "weight") -> None:
        """Raise FormatError unless the parts have the names, shapes and dtypes of `part_specs`. It names the tensor."""
        specs = self.part_specs(shape)
        if set(specs) != set(parts):
            raise FormatError(f"{name}: parts {sorted(parts)} found, {sorted(specs)} expected for {self}")
        for part, spec in specs.items():
            tensor = parts[part]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise FormatError(
                    f"{name}: part {part!r} is {tensor.dtype} {list(tensor.shape)}, "
                    f"{spec.dtype} {list(spec.shape)} expected for {self} of shape {list(shape)}"
                )

    def flaw(self, parts: Mapping[str, Tensor]) -> tuple[str, str] | None:
        """A part that holds numbers which no weight has, such as a scale of NaN, and what is wrong with it; else None.

        Formats call it for what they read from files. The second entry follows the tensor's name in a sentence.
        """
        return None

    # ---- Training with the codes fixed: the numbers of a weight that a file stores as floats.

    @property
    @abstractmethod
    def trainable(self) -> tuple[str, ...] | str:
        """The names of the numbers that can be trained while all codes stay, such as scales; or why there are none.

        A name is that of a part, unless the codec overrides `floats` and `with_floats`.
        """

    @property
    def shared(self) -> tuple[str, ...]:
        """The names in `trainable` of numbers that belong to a whole weight. Servers expect linears that they compute
        as one matrix to have the same one (`Scheme.for_all`)."""
        return ()

    def floats(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers `trainable` by name, in float32."""
        found = {name: parts[name].float() for name in self.trainable} if isinstance(self.trainable, tuple) else {}
        one = {name: found[name][:1] for name in self.shared if bool((found[name] == found[name][:1]).all())}
        return found | one

    def rounded(self, parts: Mapping[str, Tensor], floats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The nearest numbers that the parts can store, in float32. By default the dtype of a part decides."""
        return {name: value.to(parts[name].dtype).float() for name, value in floats.items()}

    def values(
        self,
        parts: Mapping[str, Tensor],
        shape: tuple[int, int],
        floats: Mapping[str, Tensor],
        rows: slice = ALL,
    ) -> Tensor:
        """`dequantize` in float32 with `floats` in place of the stored numbers. It is differentiable by them."""
        wide = {name: value.expand(parts[name].shape) for name, value in floats.items()}
        return self.dequantize({**parts, **wide}, shape, torch.float32, rows)

    def with_floats(self, parts: Mapping[str, Tensor], floats: Mapping[str, Tensor]) -> Parts:
        """The parts with `floats`, as `rounded` returns them, in place of the stored numbers."""
        made = {n: value.to(parts[n].dtype).expand(parts[n].shape).contiguous() for n, value in floats.items()}
        return {**parts, **made}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all parts of a weight of this shape."""
        return sum(spec.nbytes for spec in self.part_specs(shape).values())


@dataclass(frozen=True)
class Scheme(Codec):
    """A codec that can also encode. Schemes compare by value; `str(s)` is the spec, and `parse(str(s)) == s`."""

    family: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]  # specs that `fewbit list` shows and the contract tests run
    rounds_stored: ClassVar[bool] = False  # `nearest` and `lost` take a weight in bfloat16 and float16 too
    group: int  # columns that share one fit; 0: the whole row

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: str) -> Scheme | None:
        """The scheme that `spec` names, None if it is of another family; PlanError if it is malformed."""

    @abstractmethod
    def fit(self, w: Tensor, importance: Tensor | None = None) -> Grids:
        """The grids of the weight `w` [N, K], with scales rounded as a file stores them.

        With `importance` [K] the scales are searched: it weighs the squared error of each column. Without it the
        grids span the range of each group. NumericsError if `w` is empty or has NaN, Inf or a value out of range.
        """

    @property
    def vector(self) -> int:
        """`Grids.vector` of its grids."""
        return 1

    @property
    def run(self) -> int:
        """`Grids.run` of its grids."""
        return self.vector

    @property
    def rows(self) -> int:
        """Rows that share one fit; 0: all of them.

        A weight may be quantized in pieces whose rows are a multiple of this number. If all rows share one fit, each
        piece needs the scheme that `for_all` gives for all pieces.
        """
        return 1

    def for_all(self, weights: Iterable[Tensor]) -> Self:
        """The scheme with which to quantize weights that must agree in a number that belongs to a whole weight.

        Servers compute q, k and v (or gate and up) as one matrix, and then only have one place for such a number. A
        scheme without one returns itself. The result equals this scheme, and makes parts of the same layout.
        """
        return self

    def nearest(self, w: Tensor) -> tuple[Tensor, Grids]:
        """Codes and grids of `w` rounded to nearest, the baseline of all methods.

        A scheme overrides it to match another library byte for byte. That library may choose codes by scales that it
        rounds only afterwards, or cast the weight first; the stored grid alone does not reproduce this.
        """
        grids = self.fit(w)
        return grids.encode(w), grids

    def lost(self, w: Tensor, parts: Mapping[str, Tensor]) -> tuple[float, float, int]:
        """The squared error of `parts`, which store w [N, K]; the sum of the squares of w; the groups that became 0."""
        shape, error, whole, gone = (w.shape[0], w.shape[1]), 0.0, 0.0, 0
        # Decoded values stay in a core's cache until they are compared. A GPU needs few launches.
        for rows in chunk_rows(*shape, threads.entries() if w.device.type == "cpu" else 1 << 22):
            part, values = w[rows].float(), self.dequantize(parts, shape, torch.float32, rows)
            gone += vanished(self, part, values)
            error += float(values.sub_(part).square_().sum())
            whole += float(part.square().sum())
        return error, whole, gone

    @abstractmethod
    def pack(self, codes: Tensor, grids: Grids) -> Parts:
        """The parts that store `codes` [N, K] and `grids`, as `part_specs` describes them."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grids]:
        """The codes [N, K] and grids that `parts` store: the inverse of `pack`."""

    def refit(self, w: Tensor, codes: Tensor, grids: Grids, hessian: Tensor, ridge: float = 0.0) -> Grids:
        """Better grids for codes that are already chosen; by default the same grids.

        They lower tr(E (H + ridge I) Eᵀ), E = w - ŵ the error [N, K] and H the Hessian [K, K].
        """
        return grids

    def with_group(self, group: int) -> Self:
        """The same scheme with another group size."""
        return replace(self, group=group)

    def widths(self, shape: tuple[int, int]) -> list[Scheme]:
        """The schemes of this kind, of all widths, that a weight of this shape may have in its place; itself too."""
        return [self]

    def groups(self, k: int) -> int:
        """Groups in a row of `k` columns."""
        return k // self.group if self.group else 1


def check_values(w: Tensor, largest: float = inf, stored_as: str = "") -> None:
    """NumericsError if a weight is empty, or has NaN, Inf or a magnitude above `largest`, the range of `stored_as`.

    `w`: the weight, or the largest magnitudes of its groups.
    """
    if not w.numel():
        raise NumericsError("a weight has no elements")
    top = max(abs(float(end)) for end in w.aminmax())  # aminmax passes NaN on
    if not isfinite(top):
        raise NumericsError("a weight has NaN or Inf", "Check the checkpoint: it cannot be quantized as it is.")
    if top > largest:
        raise NumericsError(f"a weight is beyond the range of {stored_as} ({largest:g})")


@cache
def shares(least: float, count: int) -> list[float]:
    """`count` shares of the full range for a search, from 1 down to `least`."""
    found: list[float] = torch.linspace(1.0, least, count, dtype=torch.float32, device="cpu").tolist()
    return found


def search_scales(
    candidates: Iterable[Tensor], error: Callable[[Tensor], Tensor], *steps: Callable[[Tensor], Tensor]
) -> Tensor:
    """The scales with the smallest error in each group.

    Takes the best candidate of each group. Then, twice, it applies each of `steps`, and keeps the result in the groups
    where it lowers the error. candidates: scales as a file stores them, such as those of narrower ranges. error: the
    error of each group. steps: such as the best scales, as a file stores them, for the codes that the given scales
    choose. Tensors of scales may have a leading dimension to include zero points.
    """
    remaining = iter(candidates)
    best = next(remaining)
    least = error(best)

    def better(tried: Tensor) -> tuple[Tensor, Tensor]:
        found = error(tried)
        return torch.where(found < least, tried, best), torch.where(found < least, found, least)

    for tried in remaining:
        best, least = better(tried)
    for step in steps * _SOLUTIONS:
        best, least = better(step(best))
    return best


def usable(solved: Tensor, otherwise: Tensor) -> Tensor:
    """`solved`, replaced by `otherwise` where the equation has no solution (NaN, Inf or 0)."""
    solved = solved.nan_to_num(0.0, 0.0, 0.0)  # on a GPU this function runs once a group, so launches count
    return torch.where(solved != 0, solved, otherwise)


def refit_scales(
    error: Tensor,
    levels: Callable[[slice], Tensor],
    scale: Tensor,
    hessian: Tensor,
    ridge: float,
    stored: Callable[[Tensor, int], Tensor],
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Scales [N, G] re-solved for fixed codes, one group at a time: s += (E H l) / (l H_gg l), rounded as stored.

    error: E = w - ŵ, [N, K]. levels: gives l = ŵ / s for a slice of columns. stored: rounds scales [N] of one group to
    the nearest ones that a file can hold. block: the rows and columns that share a scale; by default those of a group
    in one row. tr(E (H + ridge I) Eᵀ) does not rise in any row, or in any block's rows together.
    """
    scale, (n, k) = scale.clone(), error.shape
    rows, group = block or (1, k // scale.shape[1])

    def summed(x: Tensor) -> Tensor:  # over the rows that share a scale
        return x if rows == 1 else torch.nn.functional.pad(x, (0, -n % rows)).view(-1, rows).sum(1)

    gradient = add_halves(error * ridge, error, hessian)
    del error
    for g in range(scale.shape[1]):
        columns = slice(g * group, (g + 1) * group)
        level = levels(columns)
        curvature = (level @ hessian[columns, columns]).add_(level, alpha=ridge).mul_(level).sum(1)
        step = summed((gradient[:, columns] * level).sum(1)) / summed(curvature)
        solved = scale[:, g] + step
        solved = stored(usable(solved, scale[:, g]), g)
        # Rounding to the stored scale can cost more than the step gains. Keep the old scale there.
        moved = solved - scale[:, g]
        moved = torch.where(2 * step * moved > moved * moved, moved, 0.0)
        scale[:, g].add_(moved)
        moved = moved if rows == 1 else moved.repeat_interleave(rows)[:n]
        level *= moved.unsqueeze(1)
        # The gradient of earlier groups is no longer needed.
        add_halves(gradient[:, columns.stop :], level, hessian[columns, columns.stop :], alpha=-1)
    return scale


def vanished(scheme: Scheme, w: Tensor, values: Tensor) -> int:
    """Number of groups of `w` [rows, K] that became 0: too small for any scale, so all of their `values` are 0."""
    k = w.shape[1]
    group = scheme.group if scheme.group and k % scheme.group == 0 else k
    parts = values.unflatten(1, (-1, group))
    zero = (parts.amax(-1) == 0) & (parts.amin(-1) == 0)  # `any` takes three times as long
    return int((zero & w.unflatten(1, (-1, group)).any(-1)).sum()) if bool(zero.any()) else 0


def too_small(vanished: Sequence[tuple[str, str, int]], of: int) -> list[str]:
    """One sentence on groups of weights that became 0, if there are any.

    vanished: name, scheme and number of such groups of the tensors that have them. of: number of quantized tensors.
    """
    if not vanished:
        return []
    schemes = ", ".join(sorted({scheme for _, scheme, _ in vanished}))
    most, _, highest = max(vanished, key=lambda each: each[2])
    return [
        f"{sum(count for *_, count in vanished)} groups of weights became 0, in {len(vanished)} of {of} tensors: they "
        f"are too small for the scales of {schemes}. {most} has most of them ({highest})"
    ]


def chunk_rows(n: int, k: int, budget: int = 1 << 22, multiple: int = 1) -> list[slice]:
    """Slices of the rows of an [n, k] matrix, to keep temporaries small.

    Each starts at a multiple of `multiple` and has at most `budget` elements, but at least `multiple` rows.
    """
    step = max(1, budget // (max(k, 1) * multiple)) * multiple
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


@dataclass
class QTensor:
    """A quantized weight: its codec, its shape [N, K] and the parts that store it.

    `permutation` [K] is for GPTQ files with act-order (`g_idx`): stored column j is column `permutation[j]` of the
    weight. None: columns are stored in their own order.
    """

    codec: Codec
    shape: tuple[int, int]
    parts: Parts
    permutation: Tensor | None = None

    def dequantize(self, dtype: torch.dtype | None = None, rows: slice = ALL) -> Tensor:
        """The weight [N, K] in `dtype`, float32 by default, or some of its rows, decoded a chunk of rows at a time."""
        device, dtype = self.parts[self.codec.payload].device, dtype or torch.float32
        start, stop, _ = rows.indices(self.shape[0])
        out = torch.empty((max(stop - start, 0), self.shape[1]), dtype=dtype, device=device)
        for chunk in chunk_rows(*out.shape):
            those = slice(start + chunk.start, start + chunk.stop)
            values = self.codec.dequantize(self.parts, self.shape, dtype, those)
            if self.permutation is None:
                out[chunk] = values
            else:
                out[chunk, self.permutation] = values
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the parts, and of the permutation if there is one."""
        order = 0 if self.permutation is None else self.permutation.nbytes
        return order + sum(part.nbytes for part in self.parts.values())

    def map(self, fn: Callable[[Tensor], Tensor]) -> QTensor:
        """The same weight with `fn` applied to each tensor, such as a copy to another device."""
        order = None if self.permutation is None else fn(self.permutation)
        return QTensor(self.codec, self.shape, {name: fn(part) for name, part in self.parts.items()}, order)


def parse(spec: str) -> Scheme:
    """The scheme that `spec` names in any case, such as `int4-g128-sym`. PlanError with the closest ones."""
    families, refusal = registry.entries("schemes"), None
    for family in families.values():
        try:
            scheme = family.from_spec(spec.lower())
        except PlanError as error:  # another family may have a scheme of this name: GGUF files have an `mxfp4` too
            refusal = error
            continue
        if scheme is not None:
            assert isinstance(scheme, Scheme)
            return scheme
    if refusal is not None:
        raise refusal
    examples = [example for family in families.values() for example in family.examples]
    raise registry.unknown("scheme", spec, examples, _spellings(examples))


def _spellings(examples: Iterable[str]) -> Iterator[str]:
    """The schemes that differ from the examples in their width or in the size of their groups."""
    for scheme in (other for example in examples for other in parse(example).widths((256, 256))):
        for name in {str(scheme.with_group(group)) for group in (16, 32, 64, 128, 256)}:
            with suppress(PlanError):
                yield str(parse(name))
