"""Where codes and scales lie for the Triton kernels, and how every codec is told to them.

Each codec that they serve stands for w = s level[c] + b, s and b shared by a group of columns, a multiple of 16 of
them. What differs is told by a `Recipe` of whole numbers, which the kernels are specialized for.

Codes are cut in a low plane of 2, 4 or 8 bits and, of 3, 5 and 6 bits, a high plane of 1 or 2. A *tile* is the columns
that sixteen 32-bit words of the low plane hold. Two columns that lie side by side share a word, half a word apart (or
share a byte, where levels are looked up in pairs): one shift and one logical instruction then make two numbers of them.
Thread t of the four that share a row in a tensor core's step holds words 4t ... 4t + 3, sixteen bytes, and with them
columns 8t ... 8t + 7 of every 32 (`Recipe.places`), so that it reads x sixteen bytes at a time too. Where groups are of
16 columns a step must not straddle them, and it is 4t ... 4t + 3 of every 16. The high plane has the same order.

Rows are stored sixteen at a time, [N / 16, tiles, 16, words of a tile], so that a warp reads a kilobyte in one piece,
and so is what belongs to groups, [N / 16, groups / G, 16, G]: the G groups of a tile lie side by side, and a thread has
them all by one load. Where rows do not fill the last sixteen there are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import NamedTuple

from fewbit.lazy import Tensor, torch
from fewbit.schemes import bits as streams
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import Codec, Parts, chunk_rows
from fewbit.schemes.ggml.layout import LAYOUTS, NONLINEAR, Fields
from fewbit.schemes.ggml.layout import pack as pack_blocks
from fewbit.schemes.ggml.layout import unpack as unpack_blocks
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.int8 import Int8
from fewbit.schemes.nf4 import NESTED, FourBit, levels

WORDS = 16  # of a tile
# How s is stored: as it is; d of a block times a whole number of a group; an 8-bit code of a map, scaled and shifted.
PLAIN, SUPER, MAPPED = 0, 1, 2
# How b is: -s times a constant; -s times a stored zero point; as it is; -dmin of a block times a whole number.
CONSTANT, ZERO, MINIMUM, SUPER_MINIMUM = 0, 1, 2, 3


class Recipe(NamedTuple):
    """What the kernels must know of a codec."""

    bits: int
    low: int  # bits of a code in the low plane; the rest is in the high one
    group: int  # columns that share s and b
    block: int  # columns that share d and dmin
    scale: int
    offset: int
    zero: int  # the constant of CONSTANT
    table: int  # whether levels are looked up
    divisor: int = 1  # s is what is stored over this

    @property
    def lanes(self) -> int:
        """Columns in a word."""
        return 32 // self.low

    @property
    def tile(self) -> int:
        """Columns in a tile."""
        return WORDS * self.lanes

    @property
    def places(self) -> tuple[int, int, int, int, int]:
        """The columns of a tile, as axes: 32 at a time, then step, thread, pair and which of two."""
        return (self.lanes // 2, 2, 4, 2, 2) if self.sub == 16 else (self.lanes // 2, 4, 2, 2, 2)

    @property
    def order(self) -> tuple[int, int, int, int, int]:
        """Those axes, counted from 2, in the order thread, step, pair (the words), then the lanes of a word."""
        words = (4, 3, 5) if self.sub == 16 else (3, 4, 5)
        return (*words, 2, 6) if self.table else (*words, 6, 2)

    @property
    def sub(self) -> int:
        """Columns of a tile that are sure to share a group."""
        return gcd(self.group, self.tile)

    @property
    def beside(self) -> int:
        """Groups that lie side by side: those of a tile, where they fill it."""
        return self.tile // self.group if self.tile % self.group == 0 else 1


_LOW = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}


def recipe(codec: Codec, k: int) -> Recipe | str:
    """How to multiply by a weight of `k` columns, or a sentence that says why not."""
    if k % 16:
        return f"columns in multiples of 16 only, not {k}"
    if isinstance(codec, Affine):
        if codec.bits not in _LOW:
            return f"integers of 2, 3, 4, 5, 6 or 8 bits only, not {codec.bits}"
        if (group := codec.group or k) % 16:
            return f"groups in multiples of 16 columns only, not {group}"
        offset, zero = (CONSTANT, 1 << codec.bits - 1) if codec.symmetric else (ZERO, 0)
        return Recipe(codec.bits, _LOW[codec.bits], group, group, PLAIN, offset, zero, 0)
    if isinstance(codec, Int8):
        return Recipe(8, 8, k, k, PLAIN, CONSTANT, 128, 0, 127)
    if isinstance(codec, FourBit):
        if k % codec.group:
            return f"blocks of {codec.group} that end with rows only, not in rows of {k}"
        return Recipe(4, 4, codec.group, codec.group, MAPPED if codec.double else PLAIN, CONSTANT, 0, 1)
    if isinstance(codec, GGML):
        kind = LAYOUTS[codec.name]
        scale = SUPER if kind.super else PLAIN
        offset = (SUPER_MINIMUM if kind.super else MINIMUM) if kind.affine else CONSTANT
        zero = 0 if kind.nonlinear else kind.zero
        return Recipe(kind.bits, _LOW[kind.bits], kind.sub, kind.columns, scale, offset, zero, int(kind.nonlinear))
    return f"integers, NF4, FP4, LLM.int8() and blocks of ggml's that can be written only, not {codec}"


def prepared(codec: Codec, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Words, high plane where there is one, then scales, offsets and levels in the order of `operands`."""
    n, k = shape
    how = recipe(codec, k)
    assert isinstance(how, Recipe)
    device = parts[codec.payload].device
    words = torch.empty(n, -(-k // how.tile) * WORDS, dtype=torch.int32, device=device)
    high = torch.empty(words.shape, dtype=_high_dtype(how), device=device) if how.bits > how.low else None
    for rows in chunk_rows(n, k, 1 << 26 if device.type == "cuda" else 1 << 22):
        codes = _codes(codec, parts, shape, rows)
        words[rows] = _gathered(codes & (1 << how.low) - 1, how, how.low, torch.int32)
        if high is not None:
            high[rows] = _gathered(codes >> how.low, how, how.bits - how.low, high.dtype)
    kept = (_blocked(words, WORDS), *_scales(codec, parts, shape, how.beside))
    return kept if high is None else (kept[0], _blocked(high, WORDS), *kept[1:])


def restored(codec: Codec, tensors: tuple[Tensor, ...], shape: tuple[int, int]) -> Parts:
    """The canonical parts, byte for byte."""
    n, k = shape
    how = recipe(codec, k)
    assert isinstance(how, Recipe)
    high = how.bits > how.low
    words, *top = (_by_row(held, n, -(-k // how.tile) * WORDS) for held in tensors[: 2 if high else 1])
    rest = tensors[2 if high else 1 :]
    codes = torch.empty(n, k, dtype=torch.uint8, device=words.device)
    for rows in chunk_rows(n, k, 1 << 26 if words.is_cuda else 1 << 22):
        codes[rows] = _scattered(words[rows], how, how.low, k)
        if high:
            codes[rows] |= _scattered(top[0][rows], how, how.bits - how.low, k) << how.low
    if isinstance(codec, Affine):
        scale, *zero = (_by_row(held, n, k // how.group) for held in rest)
        parts = {"codes": streams.pack(codes, codec.bits), "scale": scale}
        return {**parts, "zero": streams.pack(zero[0], codec.bits)} if zero else parts
    if isinstance(codec, Int8):
        return {"codes": codes.bitwise_xor_(128).view(torch.int8), "scb": rest[0]}
    if isinstance(codec, FourBit):
        pairs = codes.view(-1, 2)
        packed = {"codes": pairs[:, 0] << 4 | pairs[:, 1], "absmax": _by_row(rest[0], n, k // how.group).view(-1)}
        if codec.double:
            packed |= {"nested": rest[1], "offset": rest[2], "map": rest[3]}
        return packed
    assert isinstance(codec, GGML)
    return {"blocks": _blocks(codec, codes, rest, how)}


def _codes(codec: Codec, parts: Mapping[str, Tensor], shape: tuple[int, int], rows: slice) -> Tensor:
    """Codes of some rows, uint8."""
    k = shape[1]
    if isinstance(codec, Affine):
        return streams.unpack(parts["codes"][rows], codec.bits, k)
    if isinstance(codec, Int8):
        return parts["codes"][rows].view(torch.uint8) ^ 128
    if isinstance(codec, FourBit):
        packed = parts["codes"].view(shape[0], k // 2)[rows]
        return torch.stack([packed >> 4, packed & 15], 2).flatten(1)
    assert isinstance(codec, GGML)
    held = parts["blocks"][rows]
    return unpack_blocks(codec.name, held.reshape(-1, codec.type.nbytes)).codes.view(len(held), k)


def _scales(codec: Codec, parts: Mapping[str, Tensor], shape: tuple[int, int], beside: int) -> tuple[Tensor, ...]:
    n, k = shape
    if isinstance(codec, Affine):
        held = [parts["scale"]]
        if not codec.symmetric:
            held.append(streams.unpack(parts["zero"], codec.bits, codec.groups(k)))
        return tuple(_blocked(each, beside) for each in held)
    if isinstance(codec, Int8):
        return (parts["scb"],)
    if isinstance(codec, FourBit):
        device = parts["codes"].device
        kept = tuple(parts[name] for name in ("nested", "offset", "map") if name in parts)
        return (_blocked(parts["absmax"].view(n, -1), beside), *kept, levels(codec.kind, device).clone())
    assert isinstance(codec, GGML)
    kind = LAYOUTS[codec.name]
    fields = unpack_blocks(codec.name, parts["blocks"].reshape(-1, kind.nbytes))
    signed = torch.int8 if kind.sc[0] < 0 else torch.uint8
    over = 1 if kind.super else beside
    found = [_blocked(fields.d.half().view(n, -1), over)]
    if fields.sc is not None:
        found.append(_blocked(fields.sc.to(signed).view(n, -1), beside))
    if fields.dmin is not None:  # what is added, or in units of it
        found.append(_blocked((fields.dmin if kind.super else -fields.dmin).half().view(n, -1), over))
    if fields.m is not None:
        found.append(_blocked(fields.m.to(torch.uint8).view(n, -1), beside))
    if kind.nonlinear:
        found.append(torch.tensor(NONLINEAR, dtype=torch.float32, device=fields.d.device))
    return tuple(found)


def _blocked(held: Tensor, width: int) -> Tensor:
    """[N, C] as [N / 16, C / width, 16, width]."""
    rows, columns = held.shape
    whole = torch.nn.functional.pad(held, (0, -columns % width, 0, -rows % 16))
    return whole.view(-1, 16, whole.shape[1] // width, width).transpose(1, 2).contiguous()


def _by_row(held: Tensor, n: int, columns: int) -> Tensor:
    """The inverse of `_blocked`: [n, columns]."""
    return held.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :columns].contiguous()


def _blocks(codec: GGML, codes: Tensor, kept: tuple[Tensor, ...], how: Recipe) -> Tensor:
    kind, (n, k), left = LAYOUTS[codec.name], codes.shape, list(kept)

    def block() -> Tensor:
        return _by_row(left.pop(0), n, k // how.block).float().view(-1, 1)

    def group() -> Tensor:
        return _by_row(left.pop(0), n, k // how.group).to(torch.int16).view(-1, kind.subs)

    d = block()
    sc = group() if kind.super else None
    dmin = block() if kind.affine else None
    m = group() if kind.super and kind.affine else None
    if dmin is not None and not kind.super:
        dmin = -dmin
    blocks = pack_blocks(codec.name, Fields(codes.view(-1, kind.columns), d, dmin, sc, m))
    return blocks.view(len(codes), -1)


def operands(how: Recipe, tensors: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    """The tensors by their places in a kernel's call: words, high, four of s, two of b, levels; words for any other."""
    words, rest = tensors[0], list(tensors[1:])
    places = [words] * 9
    if how.bits > how.low:
        places[1] = rest.pop(0)
    for i in range({PLAIN: 1, SUPER: 2, MAPPED: 4}[how.scale]):
        places[2 + i] = rest.pop(0)
    for i in range({CONSTANT: 0, ZERO: 1, MINIMUM: 1, SUPER_MINIMUM: 2}[how.offset]):
        places[6 + i] = rest.pop(0)
    if how.table:
        places[8] = rest.pop(0)
    return tuple(places)


def _high_dtype(how: Recipe) -> torch.dtype:
    return torch.uint8 if (how.bits - how.low) * how.lanes == 8 else torch.int16


def _gathered(codes: Tensor, how: Recipe, width: int, dtype: torch.dtype) -> Tensor:
    """Fields of `width` bits of codes [N, K] as words [N, tiles * WORDS]."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % how.tile))
    tiles = padded.unflatten(1, (-1, *how.places)).permute(0, 1, *how.order)  # rows, tiles, words, lanes
    lanes = tiles.reshape(len(codes), -1, WORDS, how.lanes)
    out = lanes[..., 0].to(torch.int32)
    for lane in range(1, how.lanes):
        out |= lanes[..., lane].to(torch.int32) << lane * width
    held: Tensor = out.flatten(1).to(dtype)
    return held


def _scattered(words: Tensor, how: Recipe, width: int, k: int) -> Tensor:
    """The inverse of `_gathered`: uint8 [N, K]."""
    tiles = words.unflatten(1, (-1, WORDS)).to(torch.int32)
    lanes = [(tiles >> lane * width & (1 << width) - 1).to(torch.uint8) for lane in range(how.lanes)]
    sizes = [how.places[axis - 2] for axis in how.order]
    back = [2 + how.order.index(axis) for axis in range(2, 7)]
    whole = torch.stack(lanes, -1).reshape(len(words), -1, *sizes).permute(0, 1, *back)
    found: Tensor = whole.reshape(len(words), -1)[:, :k]
    return found


assert NESTED == 256  # what the kernels divide by
