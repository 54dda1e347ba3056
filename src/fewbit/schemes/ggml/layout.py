"""The bytes of a block: where codes and scales lie, for the types that can be written.

Each of these types means

    w = (d sc_g) level[c] - (dmin m_g),        g the sub-block of 16 or 32 columns,

with d and dmin in fp16, sub-scales sc and m of 4 to 8 bits, and codes c of 2 to 8 bits. A type whose block is a single
group has no sub-scales; sc and m are then 1.

Codes are split into *planes* of bits. A plane with b bits of each code packs lanes = 8 / b codes into a byte, and these
codes are `width` columns apart. Byte j of run t, 0 <= j < width, holds the columns

    (t * lanes + lane) * width + j        for lane = 0, 1 ..., lowest bits first.

One or two planes describe the codes of each type (`LAYOUTS`). Each field of a block with its first byte, and the size:

    q4_0     0 d      2 codes                                                       18
    q4_1     0 d      2 dmin       4 codes                                          20
    q5_0     0 d      2 bit 4      6 bits 0-3                                       22
    q5_1     0 d      2 dmin       4 bit 4       8 bits 0-3                         24
    q8_0     0 d      2 codes - 128, signed bytes                                   34
    q2_k     0 sc, m  16 codes    80 d          82 dmin                             84
    q3_k     0 bit 2  32 bits 0-1 96 sc        108 d                               110
    q4_k     0 d      2 dmin       4 sc, m      16 codes                           144
    q5_k     0 d      2 dmin       4 sc, m      16 bit 4     48 bits 0-3           176
    q6_k     0 bits 0-3          128 bits 4-5  192 sc       208 d                  210
    iq4_nl   0 d      2 codes                                                       18
    iq4_xs   0 d      2 sc, top    4 sc, low     8 codes                           136

    byte            0   1     2      3            17
    block of q4_0 |   d   |16, 0 |17, 1 |  ... |31,15|       columns (high half, low half)

The sub-scales have no common rule:

    q4_k, q5_k   12 bytes. Bytes 0-3: low six bits of sc 0-3. Bytes 4-7: low six bits of m 0-3. Bytes 8-11: low four
                 bits of sc 4-7 (low nibble) and m 4-7 (high nibble). The top two bits of bytes 0-3 and 4-7 are the top
                 two bits of sc 4-7 and m 4-7.
    q3_k         12 bytes. Bytes 0-7: low four bits of sc 0-7 (low nibble) and sc 8-15 (high nibble). Bytes 8-11: top
                 two bits, byte 8 + i those of sc i, i + 4, i + 8 and i + 12, lowest bits first. Stored as sc + 32.
    q2_k         16 bytes, sc in the low nibble and m in the high one.
    q6_k         16 signed bytes.
    iq4_xs       A 16-bit word with the top two bits of sc 0-7, lowest first. Then 4 bytes of low four bits: sc 0, 2, 4,
                 6 in the low nibbles, sc 1, 3, 5, 7 in the high ones. Stored as sc + 32.

Source: ggml-common.h of llama.cpp.

>>> fields = unpack("q4_0", torch.tensor([[0, 0x3C, *range(16)]], dtype=torch.uint8))
>>> fields.codes[0, :4].tolist(), fields.d.tolist()          # columns 0 to 15 are the low nibbles
([0, 1, 2, 3], [[1.0]])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fewbit.lazy import Tensor, torch

# Levels of iq4_nl and iq4_xs by code.
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Plane(NamedTuple):
    """`bits` bits of each code, from bit `at` up, stored from byte `start` of the block. `width` as in the module."""

    start: int
    width: int
    bits: int
    at: int = 0


@dataclass(frozen=True)
class Layout:
    """The layout of one type. `d` and `dmin` are the byte offsets of these numbers; dmin = -1: the type has none."""

    columns: int
    nbytes: int
    sub: int  # columns that share sc and m
    planes: tuple[Plane, ...]
    d: int = 0
    dmin: int = -1
    plus: bool = False  # the number stored at `dmin` is added, not subtracted
    bits: int = 4  # bits of a code
    zero: int = 0  # level = code - zero, unless `nonlinear`
    nonlinear: bool = False  # the levels are NONLINEAR
    sc: tuple[int, int] = (1, 1)  # smallest and largest sub-scale; (1, 1): no sub-scales
    m: int = 0  # largest m

    @property
    def affine(self) -> bool:
        """Whether the type has an offset, dmin m."""
        return self.dmin >= 0

    @property
    def super(self) -> bool:
        """Whether a block has sub-blocks with quantized scales."""
        return self.sc != (1, 1)

    @property
    def run(self) -> int:
        """Columns that share scales which a method may change while it chooses their codes; 1: it may not."""
        return self.sub if self.super and not self.nonlinear else 1

    @property
    def table(self) -> tuple[float, ...] | None:
        """The level of each code, where the levels are uneven; else None."""
        return NONLINEAR if self.nonlinear else None

    def step(self, sc: Tensor) -> Tensor:
        """The nearest sub-scales that can be stored. Overwrites sc."""
        return sc.round_().clamp_(*self.sc)

    @property
    def subs(self) -> int:
        """The number of sub-blocks in a block."""
        return self.columns // self.sub


LAYOUTS: dict[str, Layout] = {
    "q4_0": Layout(32, 18, 32, (Plane(2, 16, 4),), zero=8),
    "q4_1": Layout(32, 20, 32, (Plane(4, 16, 4),), dmin=2, plus=True),
    "q5_0": Layout(32, 22, 32, (Plane(6, 16, 4), Plane(2, 1, 1, 4)), bits=5, zero=16),
    "q5_1": Layout(32, 24, 32, (Plane(8, 16, 4), Plane(4, 1, 1, 4)), dmin=2, plus=True, bits=5),
    "q8_0": Layout(32, 34, 32, (Plane(2, 1, 8),), bits=8, zero=128),
    "q2_k": Layout(256, 84, 16, (Plane(16, 32, 2),), d=80, dmin=82, bits=2, sc=(0, 15), m=15),
    "q3_k": Layout(256, 110, 16, (Plane(32, 32, 2), Plane(0, 32, 1, 2)), d=108, bits=3, zero=4, sc=(-32, 31)),
    "q4_k": Layout(256, 144, 32, (Plane(16, 32, 4),), dmin=2, sc=(0, 63), m=63),
    "q5_k": Layout(256, 176, 32, (Plane(48, 32, 4), Plane(16, 32, 1, 4)), dmin=2, bits=5, sc=(0, 63), m=63),
    "q6_k": Layout(256, 210, 16, (Plane(0, 64, 4), Plane(128, 32, 2, 4)), d=208, bits=6, zero=32, sc=(-128, 127)),
    "iq4_nl": Layout(32, 18, 32, (Plane(2, 16, 4),), nonlinear=True),
    "iq4_xs": Layout(256, 136, 32, (Plane(8, 16, 4),), nonlinear=True, sc=(-32, 31)),
}


@dataclass(frozen=True)
class Fields:
    """The contents of B blocks: codes uint8 [B, columns]; d and dmin float32 [B, 1]; sc and m int16 [B, subs].

    dmin and m are None for types without an offset; sc and m are None where a block is one group. dmin is that of the
    formula: types that add a minimum (`plus`) store it with the opposite sign.
    """

    codes: Tensor
    d: Tensor
    dmin: Tensor | None
    sc: Tensor | None
    m: Tensor | None


def unpack(name: str, blocks: Tensor) -> Fields:
    """The contents of blocks uint8 [B, bytes]."""
    layout = LAYOUTS[name]
    (sc, m), found = _unpack_scales(name, blocks), units(name, blocks)
    return Fields(unpack_codes(layout, blocks), found["d"], found.get("dmin"), sc, m)


def units(name: str, blocks: Tensor) -> dict[str, Tensor]:
    """d, and dmin if the type has it, of blocks uint8 [B, bytes]: float32 [B, 1] each."""
    layout = LAYOUTS[name]
    found = {"d": _half(blocks, layout.d)}
    if layout.affine:
        dmin = _half(blocks, layout.dmin)
        found["dmin"] = -dmin if layout.plus else dmin
    return found


def with_units(name: str, blocks: Tensor, units: Mapping[str, Tensor]) -> Tensor:
    """A copy of the blocks with other d and dmin."""
    layout, made = LAYOUTS[name], blocks.clone(memory_format=torch.contiguous_format)
    _pack_units(layout, units["d"], units.get("dmin"), made)
    return made


def _pack_units(layout: Layout, d: Tensor, dmin: Tensor | None, blocks: Tensor) -> None:
    _pack_half(d, blocks, layout.d)
    if dmin is not None:
        _pack_half(-dmin if layout.plus else dmin, blocks, layout.dmin)


def unpack_codes(layout: Layout, blocks: Tensor) -> Tensor:
    """The codes uint8 [B, columns] of blocks uint8 [B, bytes]."""
    out = None
    for plane in layout.planes:
        field = _unpack_plane(plane, layout.columns, blocks)
        out = field << plane.at if out is None else out | field << plane.at
    assert out is not None
    return out ^ 128 if layout.bits == 8 else out  # 8-bit codes are stored as signed bytes, code - 128


def pack(name: str, fields: Fields) -> Tensor:
    """The blocks, uint8 [B, bytes], with these contents."""
    layout, codes = LAYOUTS[name], fields.codes
    blocks = torch.zeros(len(codes), layout.nbytes, dtype=torch.uint8, device=codes.device)
    codes = codes ^ 128 if layout.bits == 8 else codes
    for plane in layout.planes:
        _pack_plane(plane, layout.columns, codes, blocks)
    _pack_units(layout, fields.d, fields.dmin, blocks)
    if fields.sc is not None:
        _pack_scales(name, fields.sc, fields.m, blocks)
    return blocks


def _unpack_plane(plane: Plane, columns: int, blocks: Tensor) -> Tensor:
    start, width, bits, _ = plane
    held = blocks[:, start : start + columns * bits // 8]
    if bits == 8:
        return held
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device)
    lanes: Tensor = held.unflatten(1, (-1, 1, width)) >> shifts[:, None]
    return lanes.bitwise_and_((1 << bits) - 1).flatten(1)


def _pack_plane(plane: Plane, columns: int, codes: Tensor, blocks: Tensor) -> None:
    start, width, bits, at = plane
    held = blocks[:, start : start + columns * bits // 8]
    if bits == 8:
        held.copy_(codes)
        return
    lanes = (codes >> at & (1 << bits) - 1).unflatten(1, (-1, 8 // bits, width))
    packed = lanes[:, :, 0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[:, :, lane] << lane * bits
    held.copy_(packed.flatten(1))


def _half(blocks: Tensor, start: int) -> Tensor:
    # A copy, because bytes inside a file may not be aligned to 2 bytes.
    return blocks[:, start : start + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _pack_half(x: Tensor, blocks: Tensor, start: int) -> None:
    blocks[:, start : start + 2] = x.to(torch.float16).view(torch.uint8)


def _unpack_scales(name: str, blocks: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """sc and m, int16 [B, subs] each, or None."""
    sc: Tensor
    m: Tensor | None = None
    if name in ("q4_k", "q5_k"):
        low, high, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
        sc = torch.cat([low & 63, both & 15 | low >> 6 << 4], 1)
        m = torch.cat([high & 63, both >> 4 | high >> 6 << 4], 1)
    elif name == "q2_k":
        sc, m = blocks[:, :16] & 15, blocks[:, :16] >> 4
    elif name == "q3_k":
        low, high = blocks[:, 96:104], blocks[:, 104:108]
        top = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 1)
        sc = torch.cat([low & 15, low >> 4], 1) | top << 4
    elif name == "q6_k":
        sc = blocks[:, 192:208].contiguous().view(torch.int8)
    elif name == "iq4_xs":
        low, high = blocks[:, 4:8], blocks[:, 2:4]
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
        sc = torch.stack([low & 15, low >> 4], 2).flatten(1) | (high.unsqueeze(2) >> shifts & 3).flatten(1) << 4
    else:
        return None, None
    sc = sc.to(torch.int16)
    return (sc - 32 if name in ("q3_k", "iq4_xs") else sc), None if m is None else m.to(torch.int16)


def _pack_scales(name: str, sc: Tensor, m: Tensor | None, blocks: Tensor) -> None:
    # A negative number becomes its two's complement.
    sc = (sc + 32 if name in ("q3_k", "iq4_xs") else sc).to(torch.uint8)
    if name in ("q4_k", "q5_k"):
        assert m is not None
        m = m.to(torch.uint8)
        blocks[:, 4:8] = sc[:, :4] | sc[:, 4:] >> 4 << 6
        blocks[:, 8:12] = m[:, :4] | m[:, 4:] >> 4 << 6
        blocks[:, 12:16] = sc[:, 4:] & 15 | m[:, 4:] << 4
    elif name == "q2_k":
        assert m is not None
        blocks[:, :16] = sc | m.to(torch.uint8) << 4
    elif name == "q3_k":
        blocks[:, 96:104] = sc[:, :8] & 15 | sc[:, 8:] << 4
        top = (sc >> 4).unflatten(1, (4, 4))
        blocks[:, 104:108] = top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4 | top[:, 3] << 6
    elif name == "q6_k":
        blocks[:, 192:208] = sc
    else:
        low, top = (sc & 15).unflatten(1, (4, 2)), (sc >> 4).unflatten(1, (2, 4))
        blocks[:, 4:8] = low[..., 0] | low[..., 1] << 4
        blocks[:, 2:4] = top[..., 0] | top[..., 1] << 2 | top[..., 2] << 4 | top[..., 3] << 6
