"""The device layout of codes and scales for the CUDA and Triton kernels, and how a codec is described to them.

Every supported codec has the form w = s level[c] + b. s and b are shared by a group of columns, a multiple of 16. A
`Recipe` of integers describes the rest, and the kernels are specialized for it.

Codes are split into a low plane of 2, 4 or 8 bits and, for codes of 3, 5 or 6 bits, a high plane of 1 or 2 bits. A
*tile* is the columns whose low plane fills sixteen 32-bit words. Two adjacent columns share a word, half a word apart,
so that one shift and one logical instruction convert both to numbers. (If levels are looked up in pairs, the two
columns share a byte.) In a tensor core step, four threads share a row. Thread t of the four has words 4t ... 4t + 3,
which are sixteen bytes. They hold columns 8t ... 8t + 7 of every 32 (`Recipe.places`), so the thread also reads x
sixteen bytes at a time. If groups have 16 columns, a step must stay inside a group; then the thread's columns are
4t ... 4t + 3 of every 16. NVFP4 is the exception: the kernels multiply each level by the scale of its group before the
step, because this product is exact in 16 bits. So a step may contain two groups. The high plane has the same order.

Rows are stored in lots of sixteen, [N / 16, tiles, 16, words of a tile], so a warp reads a contiguous kilobyte.
Scales and offsets are stored alike, [N / 16, groups / G, 16, G]: the G groups of a tile are adjacent, and a thread
loads them all at once. NVFP4's eight scales of a tile have the order 0 2 4 6 1 3 5 7, because a thread needs either the
even or the odd ones. If N is not a multiple of 16, the last rows are padded with zeros. FP8's scales of blocks are
stored once for a lot, [N / 16, groups].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import NamedTuple

from fewbit.kernels.base import cut
from fewbit.lazy import Tensor, torch
from fewbit.schemes import bits as streams
from fewbit.schemes import floats
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import Codec, Parts, chunk_rows
from fewbit.schemes.fp8 import FP8
from fewbit.schemes.ggml.layout import LAYOUTS, NONLINEAR, Fields
from fewbit.schemes.ggml.layout import pack as pack_blocks
from fewbit.schemes.ggml.layout import unpack as unpack_blocks
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.int8 import Int8
from fewbit.schemes.mxfp4 import MXFP4
from fewbit.schemes.nf4 import NESTED, FourBit, levels
from fewbit.schemes.nvfp4 import NVFP4

WORDS = 16  # words per tile
# How s is stored: directly; as d of the block times an integer of the group; as an 8-bit index into a map, whose value
# is then scaled and shifted; as the exponent of a power of two (E8M0); as a small float (E4M3) times a factor of the
# row. (3 is a kind of `in_cuda`.)
PLAIN, SUPER, MAPPED, POWER, FACTORED = 0, 1, 2, 4, 5
# How b is computed: -s times a constant; -s times a stored zero point; stored directly; -dmin of the block times an
# integer of the group.
CONSTANT, ZERO, MINIMUM, SUPER_MINIMUM = 0, 1, 2, 3
# What a code is: an integer; an index into a table of levels; an FP4 or an FP8 number.
INTEGER, TABLE, E2M1, E4M3 = 0, 1, 2, 3


class Recipe(NamedTuple):
    """The description of a codec for the kernels."""

    bits: int
    low: int  # bits of a code in the low plane; the rest are in the high plane
    group: int  # columns that share s and b
    block: int  # columns that share d and dmin
    scale: int  # PLAIN, SUPER, MAPPED, POWER or FACTORED
    offset: int  # CONSTANT, ZERO, MINIMUM or SUPER_MINIMUM
    zero: int  # the constant of CONSTANT
    level: int  # INTEGER, TABLE, E2M1 or E4M3
    factor: int = 1  # s is the stored value times factor / divisor, and levels in a table are divided by that
    divisor: int = 1
    shared: int = 0  # 1 if s is stored once for sixteen rows

    def groups(self, k: int) -> int:
        """Groups in a row of k columns. The last one may be smaller."""
        return -(-k // self.group)

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
        """The columns of a tile as axes: blocks of 32 columns, step, thread, pair, and column within the pair."""
        return (self.lanes // 2, 2, 4, 2, 2) if self.sub == 16 else (self.lanes // 2, 4, 2, 2, 2)

    @property
    def order(self) -> tuple[int, int, int, int, int]:
        """The axes of `places`, numbered from 2, in storage order: thread, step, pair (the words), then the lanes."""
        words = (4, 3, 5) if self.sub == 16 else (3, 4, 5)
        return (*words, 2, 6) if self.level == TABLE else (*words, 6, 2)

    @property
    def sub(self) -> int:
        """Columns of a tile for which a thread needs one s. They share a group, except for FACTORED scales."""
        return 32 if self.scale == FACTORED else gcd(self.group, self.tile)

    @property
    def beside(self) -> int:
        """Groups that are stored side by side: all groups of a tile if they fill it exactly, else 1."""
        return self.tile // self.group if self.tile % self.group == 0 else 1

    @property
    def constants(self) -> dict[str, int]:
        """What the kernels in Triton and CUDA are compiled for, by the names that they have there."""
        return {
            "BITS": self.bits,
            "LOW": self.low,
            "GROUP": self.group,
            "BLOCK": self.block,
            "SCALE": self.scale,
            "OFFSET": self.offset,
            "ZERO_POINT": self.zero,
            "LEVEL": self.level,
            "FACTOR": self.factor,
            "DIVISOR": self.divisor,
            "SHARED": self.shared,
            "SUB": self.sub,
        }


_LOW = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}
# Factor and divisor. The kernels round levels to 16 bits. All weights of a code get the same error, so errors add up
# over columns where inputs have a mean. NF4's levels rounded to bfloat16 are too large by 0.05 % of their magnitude on
# average: with 7168 columns and inputs of mean 0.5, products are 1.7 % off. If they are multiplied by 747/512 first,
# the average is below 0.01 %, for weights of normal and of other distributions. FP4's levels times 3/2 are exact.
_LEVELS = {"nf4": (512, 747), "fp4": (2, 3)}


def recipe(codec: Codec, k: int) -> Recipe | str:
    """The recipe for a weight with `k` columns, or a sentence that says why the kernels do not support it."""
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
        return Recipe(8, 8, k, k, PLAIN, CONSTANT, 128, 0, 1, 127)
    if isinstance(codec, FourBit):
        if k % codec.group:
            return f"rows must be whole blocks: {codec.group} does not divide {k} columns"
        scale = MAPPED if codec.double else PLAIN
        return Recipe(4, 4, codec.group, codec.group, scale, CONSTANT, 0, TABLE, *_LEVELS[codec.kind])
    if isinstance(codec, GGML):
        kind = LAYOUTS[codec.name]
        scale = SUPER if kind.super else PLAIN
        offset = (SUPER_MINIMUM if kind.super else MINIMUM) if kind.affine else CONSTANT
        zero = 0 if kind.nonlinear else kind.zero
        level = TABLE if kind.nonlinear else INTEGER
        return Recipe(kind.bits, _LOW[kind.bits], kind.sub, kind.columns, scale, offset, zero, level)
    if isinstance(codec, FP8):
        group = codec.group or k
        return Recipe(8, 8, group, group, PLAIN, CONSTANT, 0, E4M3, shared=int(codec.group > 0))
    if isinstance(codec, MXFP4):
        return Recipe(4, 4, codec.group, codec.group, POWER, CONSTANT, 0, E2M1)
    if isinstance(codec, NVFP4):
        return Recipe(4, 4, codec.group, k, FACTORED, CONSTANT, 0, E2M1)
    known = "integers, NF4, FP4, LLM.int8(), FP8, MXFP4, NVFP4 and the ggml blocks that fewbit can write"
    return f"it supports {known} only, not {codec}"


def prepared(codec: Codec, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """The device layout: words, the high plane if any, then scales, offsets and levels in the order of `operands`."""
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
    """The inverse of `prepared`: the canonical parts, byte for byte."""
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
        scale, *zero = (_by_row(held, n, how.groups(k)) for held in rest)
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
    if isinstance(codec, FP8):
        held = rest[0][:: codec.rows // 16] if how.shared else _by_row(rest[0], n, 1)
        return {"codes": codes, "scale": held.contiguous()}
    if isinstance(codec, MXFP4):
        return {"codes": floats.pack_pairs(codes), "scale": _by_row(rest[0], n, how.groups(k))}
    if isinstance(codec, NVFP4):
        scale = _by_row(rest[0].unflatten(3, (2, 4)).transpose(3, 4).flatten(3), n, how.groups(k))
        return {"codes": floats.pack_pairs(codes), "scale": scale, "global": _by_row(rest[-1], n, 1)}
    assert isinstance(codec, GGML)
    return {"blocks": _blocks(codec, codes, rest, how)}


def _codes(codec: Codec, parts: Mapping[str, Tensor], shape: tuple[int, int], rows: slice) -> Tensor:
    """The codes of some rows, uint8 [rows, K]."""
    k = shape[1]
    if isinstance(codec, Affine):
        return streams.unpack(parts["codes"][rows], codec.bits, k)
    if isinstance(codec, Int8):
        return parts["codes"][rows].view(torch.uint8) ^ 128
    if isinstance(codec, FourBit):
        packed = parts["codes"].view(shape[0], k // 2)[rows]
        return torch.stack([packed >> 4, packed & 15], 2).flatten(1)
    if isinstance(codec, FP8):
        return parts["codes"][rows]
    if isinstance(codec, MXFP4 | NVFP4):
        return floats.unpack_pairs(parts["codes"][rows])
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
        factor, divisor = _LEVELS[codec.kind]
        return (_blocked(parts["absmax"].view(n, -1), beside), *kept, levels(codec.kind, device) * (divisor / factor))
    if isinstance(codec, FP8):
        scale = parts["scale"]
        return (scale.repeat_interleave(codec.rows // 16, 0)[: -(-n // 16)],) if codec.group else (_blocked(scale, 1),)
    if isinstance(codec, MXFP4):
        return (_blocked(parts["scale"], beside),)
    if isinstance(codec, NVFP4):
        halves = _blocked(parts["scale"], beside).unflatten(3, (4, 2)).transpose(3, 4).flatten(3)
        whole = parts["global"]
        factors = (1 / whole, whole) if codec.divides else (whole,)  # the kernels use only the first
        return (halves, *(_blocked(each, 1) for each in factors))
    assert isinstance(codec, GGML)
    kind = LAYOUTS[codec.name]
    fields = unpack_blocks(codec.name, parts["blocks"].reshape(-1, kind.nbytes))
    signed = torch.int8 if kind.sc[0] < 0 else torch.uint8
    over = 1 if kind.super else beside
    found = [_blocked(fields.d.half().view(n, -1), over)]
    if fields.sc is not None:
        found.append(_blocked(fields.sc.to(signed).view(n, -1), beside))
    if fields.dmin is not None:  # the offset itself or, for super blocks, its unit
        found.append(_blocked((fields.dmin if kind.super else -fields.dmin).half().view(n, -1), over))
    if fields.m is not None:
        found.append(_blocked(fields.m.to(torch.uint8).view(n, -1), beside))
    if kind.nonlinear:
        found.append(torch.tensor(NONLINEAR, dtype=torch.float32, device=fields.d.device))
    return tuple(found)


def _blocked(held: Tensor, width: int) -> Tensor:
    """[N, C], padded with zeros, as [N / 16, C / width, 16, width]."""
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


def of_expert(how: Recipe, tensors: Sequence[Tensor], experts: int, expert: int) -> tuple[Tensor, ...]:
    """The tensors of one expert's weight [N, K], as views of those of [experts · N, K]. N is a multiple of 16."""
    common = tensors[-1:] if how.level == TABLE else ()
    return (*(cut(tensor, experts, expert) for tensor in tensors[: len(tensors) - len(common)]), *common)


def operands(how: Recipe, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The nine tensor arguments of a kernel: words, high plane, four for s, two for b, levels.

    Unused arguments are filled with the words.
    """
    words, rest = tensors[0], list(tensors[1:])
    places = [words] * 9
    if how.bits > how.low:
        places[1] = rest.pop(0)
    for i in range({PLAIN: 1, SUPER: 2, MAPPED: 4, POWER: 1, FACTORED: 2}[how.scale]):
        places[2 + i] = rest.pop(0)
    for i in range({CONSTANT: 0, ZERO: 1, MINIMUM: 1, SUPER_MINIMUM: 2}[how.offset]):
        places[6 + i] = rest.pop(0)
    if how.level == TABLE:
        places[8] = rest.pop(0)
    return tuple(places)


def _high_dtype(how: Recipe) -> torch.dtype:
    return torch.uint8 if (how.bits - how.low) * how.lanes == 8 else torch.int16


def _gathered(codes: Tensor, how: Recipe, width: int, dtype: torch.dtype) -> Tensor:
    """Pack codes [N, K] of `width` bits into words [N, tiles * WORDS]."""
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


assert NESTED == 256  # the kernels assume this block size of nested scales
