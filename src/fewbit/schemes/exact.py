"""The same values in another scheme, without computing a code or a scale anew.

A *form* of a quantized weight is a scheme that holds exactly its values, and the function that moves codes and scales
into the parts of that scheme. A rule lists the forms of one type of codec. `forms` applies all rules that fit, so a new
pair of schemes needs one more rule here and nothing elsewhere.

    integers          symmetric          asymmetric with the zero point 2^(b-1) everywhere, and back
                      one group a row    a group as long as the row, and back
                      scales in bf16     the same in fp16; the reverse if they are bfloat16 numbers
                      groups of 32 n     q4_0, q5_0, q8_0: n blocks with the scale of the group, and levels c - z, if
                                         the type has them; q5_0 has those of any 4-bit weight
                                         q4_1, q5_1 if asymmetric, with the minimum -s z, where fp16 holds every s z
    mxfp4 of GGUF     the scheme mxfp4: the same exponents, and the same codes in another order
    nvfp4             nvfp4-mul, and back, if float32 holds a reciprocal of the global scale that gives the same scales

Where the values decide whether a form exists (`checked`), its function returns the reason why it does not.

>>> codec = Affine(group=32, bits=4, symmetric=True)
>>> [str(form.scheme) for form in forms(codec, (64, 64))]
['int4-g32-sym', 'int4-g32', 'int4-g32-sym-bf16', 'int4-g32-bf16', 'q4_0']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from fewbit.lazy import Tensor, torch
from fewbit.schemes import bits, floats, mxfp4
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import Codec, QTensor, Scheme, chunk_rows
from fewbit.schemes.ggml import GGML
from fewbit.schemes.ggml import grids as blockwise
from fewbit.schemes.ggml.codec import ReadOnly
from fewbit.schemes.ggml.grids import BlockGrids
from fewbit.schemes.ggml.layout import LAYOUTS, Layout
from fewbit.schemes.int8 import Int8
from fewbit.schemes.mxfp4 import MXFP4
from fewbit.schemes.nf4 import FourBit
from fewbit.schemes.nvfp4 import NVFP4

Shape = tuple[int, int]
Parts = Mapping[str, Tensor]
# The parts of some rows -> the same rows in another scheme, or the reason why it cannot hold them.
Move = Callable[[Parts, Shape], "dict[str, Tensor] | str"]


@dataclass(frozen=True)
class Form:
    """`scheme` holds the values of a weight. checked: only the values themselves tell whether it does.

    why_not: for a scheme that is alike but does not hold the values: the reason, to tell the user.
    """

    scheme: Scheme
    move: Move
    checked: bool = False
    why_not: str | None = None

    def of(self, weight: QTensor) -> QTensor | str:
        """The weight in this form, or the reason why the form does not hold its values."""
        if self.move is _same:
            return QTensor(self.scheme, weight.shape, dict(weight.parts), weight.permutation)
        specs = [*weight.codec.part_specs(weight.shape).values(), *self.scheme.part_specs(weight.shape).values()]
        if any(spec.shape[:1] != weight.shape[:1] for spec in specs):
            parts = self.move(weight.parts, weight.shape)
            return parts if isinstance(parts, str) else QTensor(self.scheme, weight.shape, parts, weight.permutation)
        made: dict[str, Tensor] = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
            for name, spec in self.scheme.part_specs(weight.shape).items()
        }
        for rows in chunk_rows(*weight.shape, 1 << 20):  # temporaries stay small
            moved = self.move(
                {k: part[rows] for k, part in weight.parts.items()}, (rows.stop - rows.start, weight.shape[1])
            )
            if isinstance(moved, str):
                return moved
            for name, part in moved.items():
                made[name][rows] = part
        return QTensor(self.scheme, weight.shape, made, weight.permutation)


_UNEVEN = "its levels are not evenly spaced"
_PRODUCTS = "its scales and minima are products of two numbers, which one fp16 scale and a whole zero point do not hold"
_NOT_BF16 = "not all of its scales are bfloat16 numbers"
Rule = Callable[[Any, Shape], Iterator[Form]]
_RULES: list[tuple[type[Codec], Rule]] = []


def rule(kind: type[Codec]) -> Callable[[Rule], Rule]:
    """Function decorator: the function lists forms of weights whose codec is a `kind`, the nearest one first."""

    def add(found: Rule) -> Rule:
        _RULES.append((kind, found))
        return found

    return add


def forms(codec: Codec, shape: Shape) -> list[Form]:
    """All forms of a weight, the nearest first: its own scheme, unless it is a codec that only decodes."""
    return [form for form in _all(codec, shape) if form.why_not is None]


def misses(codec: Codec, shape: Shape) -> list[Form]:
    """Schemes that are alike but do not hold the values of a weight, with the reasons."""
    return [form for form in _all(codec, shape) if form.why_not is not None]


def _all(codec: Codec, shape: Shape) -> list[Form]:
    found = [Form(codec, _same)] if isinstance(codec, Scheme) else []
    for kind, each in _RULES:
        if isinstance(codec, kind):
            found += each(codec, shape)
    return found


def _same(parts: Parts, shape: Shape) -> dict[str, Tensor]:
    return dict(parts)


@rule(Affine)
def _affine_as_affine(codec: Affine, shape: Shape) -> Iterator[Form]:
    same = [group for group in (codec.group, 0, shape[1]) if (group or shape[1]) == (codec.group or shape[1])]
    every = product((codec.bf16, not codec.bf16), (codec.symmetric, not codec.symmetric), dict.fromkeys(same))
    for bf16, symmetric, group in every:
        scheme = replace(codec, group=group, symmetric=symmetric, bf16=bf16)
        narrower = (bf16 and not codec.bf16) or (symmetric and not codec.symmetric)
        if scheme != codec:
            move = partial(_as_affine, codec, scheme) if narrower or symmetric != codec.symmetric else _same
            yield Form(scheme, move, checked=narrower)


def _as_affine(codec: Affine, wanted: Affine, parts: Parts, shape: Shape) -> dict[str, Tensor] | str:
    scale = parts["scale"]
    if wanted.bf16 and not codec.bf16 and not torch.equal(scale.bfloat16().to(scale.dtype), scale):
        return _NOT_BF16
    if codec.symmetric == wanted.symmetric:
        return dict(parts)
    return _with_zero(codec, parts, shape) if codec.symmetric else _without_zero(codec, parts, shape)


def _with_zero(codec: Affine, parts: Parts, shape: Shape) -> dict[str, Tensor]:
    zero = torch.full(parts["scale"].shape, 2 ** (codec.bits - 1), dtype=torch.uint8, device="cpu")
    return {**parts, "zero": bits.pack(zero, codec.bits)}


def _without_zero(codec: Affine, parts: Parts, shape: Shape) -> dict[str, Tensor] | str:
    middle, zero = 2 ** (codec.bits - 1), bits.unpack(parts["zero"], codec.bits, codec.groups(shape[1]))
    if not (zero == middle).all():
        return f"not all of its zero points are {middle}"
    return {name: part for name, part in parts.items() if name != "zero"}


@rule(Affine)
def _affine_as_blocks(codec: Affine, shape: Shape) -> Iterator[Form]:
    group, top = codec.group or shape[1], 2**codec.bits - 1
    lowest, highest = (-top // 2, top // 2) if codec.symmetric else (-top, top)
    for name, kind in LAYOUTS.items():  # those of few bits first
        if kind.super or kind.nonlinear or kind.bits < codec.bits or (kind.affine and kind.bits != codec.bits):
            continue
        least, most = _reach(kind)
        if codec.symmetric and (kind.affine or least > lowest):
            continue  # the type without minimum holds symmetric weights in fewer bytes
        scheme = GGML(kind.columns, name)
        if group % kind.sub:
            yield Form(scheme, _same, why_not=f"its groups have {group} columns, and a block of {name} has {kind.sub}")
            continue
        always = not kind.affine and least <= lowest and highest <= most
        yield Form(scheme, partial(_to_blocks, codec, name), checked=not always)
        if always:
            return


def _reach(kind: Layout) -> tuple[int, int]:
    """The lowest and the highest level of a type of blocks without minimum."""
    return -kind.zero, 2**kind.bits - 1 - kind.zero


def _to_blocks(codec: Affine, name: str, parts: Parts, shape: Shape) -> dict[str, Tensor] | str:
    """Blocks with the scale of their group. Those without minimum have levels, code - zero point."""
    kind, group = LAYOUTS[name], codec.group or shape[1]
    codes, scale = bits.unpack(parts["codes"], codec.bits, shape[1]), parts["scale"].float()
    zero = torch.full(scale.shape, 2 ** (codec.bits - 1), dtype=torch.uint8, device="cpu")
    if not codec.symmetric:
        zero = bits.unpack(parts["zero"], codec.bits, codec.groups(shape[1]))
    d, dmin = scale.repeat_interleave(group // kind.sub, 1), None
    if kind.affine:
        minima = scale * zero  # exact: 11 and 8 bits
        if not torch.equal(minima.half().float(), minima):
            return "fp16 cannot hold the product of scale and zero point of every group"
        dmin = minima.repeat_interleave(group // kind.sub, 1)
    else:
        levels = codes.unflatten(1, (-1, group)).to(torch.int16) - zero.unsqueeze(-1)
        low, high, (least, most) = int(levels.amin()), int(levels.amax()), _reach(kind)
        if low < least or high > most:
            return f"its levels reach from {low} to {high}, and those of {name} from {least} to {most}"
        codes = (levels + kind.zero).to(torch.uint8).flatten(1)
    return {"blocks": blockwise.pack(codes, BlockGrids(name, d, dmin, None, None))}


@rule(GGML)
def _blocks_as_affine(codec: GGML, shape: Shape) -> Iterator[Form]:
    kind = LAYOUTS[codec.name]
    if kind.super or kind.nonlinear:
        like = Affine(group=kind.sub, bits=kind.bits, symmetric=not kind.affine)
        yield Form(like, _same, why_not=_UNEVEN if kind.nonlinear else _PRODUCTS)
        return
    groups = (kind.sub, 0) if shape[1] == kind.sub else (kind.sub,)
    for bf16, symmetric, group in product((False, True), (True, False), groups):
        if not (symmetric and kind.affine):
            plain = Affine(group=group, bits=kind.bits, symmetric=symmetric, bf16=bf16)
            yield Form(plain, partial(_from_blocks, plain, codec.name), checked=kind.affine or bf16)


def _from_blocks(wanted: Affine, name: str, parts: Parts, shape: Shape) -> dict[str, Tensor] | str:
    codes, grids = blockwise.unpack(name, parts["blocks"])
    if not torch.isfinite(grids.d).all() or (grids.dmin is not None and not torch.isfinite(grids.dmin).all()):
        return "it has a scale that is NaN or Inf"
    if wanted.bf16 and not torch.equal(grids.d.bfloat16().float(), grids.d):
        return _NOT_BF16
    made = {"codes": bits.pack(codes, wanted.bits), "scale": grids.d.half()}
    if grids.dmin is None:
        return made if wanted.symmetric else _with_zero(wanted, made, shape)
    zero = torch.where(grids.d == 0, 0, grids.dmin / grids.d).round_().clamp_(0, 2**wanted.bits - 1)
    if not torch.equal(zero * grids.d, grids.dmin):
        return "not every minimum is a whole multiple of its scale"
    return {**made, "zero": bits.pack(zero.to(torch.uint8), wanted.bits)}


@rule(FourBit)
def _four_bit_as_affine(codec: FourBit, shape: Shape) -> Iterator[Form]:
    yield Form(Affine(group=codec.group, bits=4, symmetric=True), _same, why_not=_UNEVEN)


@rule(Int8)
def _int8_as_affine(codec: Int8, shape: Shape) -> Iterator[Form]:
    yield Form(
        Affine(group=0, bits=8, symmetric=True),
        _same,
        why_not="its scales are float32 numbers over 127, which fp16 does not hold",
    )


@rule(ReadOnly)
def _blocks_as_mxfp4(codec: ReadOnly, shape: Shape) -> Iterator[Form]:
    if codec.name == "mxfp4":
        yield Form(MXFP4(), _from_mxfp4_blocks)


def _from_mxfp4_blocks(parts: Parts, shape: Shape) -> dict[str, Tensor] | str:
    found = mxfp4.from_blocks(parts["blocks"])
    return "it has a scale that is NaN" if (found["scale"] == 255).any() else found


@rule(NVFP4)
def _nvfp4_as_nvfp4(codec: NVFP4, shape: Shape) -> Iterator[Form]:
    yield Form(replace(codec, divides=not codec.divides), partial(_with_reciprocal, codec), checked=True)


def _with_reciprocal(codec: NVFP4, parts: Parts, shape: Shape) -> dict[str, Tensor] | str:
    wholes, inverse = parts["global"].unique(return_inverse=True)
    found = []
    for whole in wholes:
        other = _reciprocal(whole, divides=codec.divides)
        if other is None:
            kinds = ("divides", "multiplies") if codec.divides else ("multiplies", "divides")
            return (
                f"its global scale {whole:.9g} {kinds[0]} the scales of the groups, and no float32 number gives the "
                f"same scales if it {kinds[1]}; a power of two has an exact reciprocal"
            )
        found.append(other)
    return {**parts, "global": torch.stack(found)[inverse]}


def _reciprocal(whole: Tensor, *, divides: bool) -> Tensor | None:
    """The number that multiplies as `whole` divides, or the reverse. None if the products differ for one scale."""
    numbers = floats.e4m3(torch.arange(1, 0x7F, dtype=torch.uint8, device="cpu"))  # all numbers above 0
    nearest, ends = 1 / whole, whole.new_tensor([float("inf"), 0.0])
    candidates: list[Tensor] = [nearest, *torch.nextafter(nearest, ends)]
    for other in candidates:
        of_both = (numbers / whole, numbers * other) if divides else (numbers * whole, numbers / other)
        if torch.equal(*of_both):
            return other
    return None
