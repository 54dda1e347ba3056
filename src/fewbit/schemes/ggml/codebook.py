"""The values of blocks with a codebook of 1 to 3 bits (IQ), of types with few levels, and of MXFP4.

- IQ types store an index into a fixed codebook, whose entries are 8 (or 4) magnitudes for that many columns. They add
  signs, a scale s of 3 or 4 bits for each sub-block of 16 or 32 columns, and one fp16 scale d for the block.
- Types with few levels (q1_0, q2_0, tq1_0, tq2_0) are those of `digits`.
- MXFP4 stores 4-bit floats (E2M1) and one power of two for 32 columns.

Bytes of a block, each field with its first byte. Words are little-endian; of fields in a byte or word, the first is in
the lowest bits. "s": the scales of all sub-blocks, 4 bits each, one after the other.

    iq2_xxs   0 d   2 for each 32 columns: 4 indices of 8 bits, then 32 bits: 4 x 7 signs, s
    iq2_xs    0 d   2 for each 8 columns 16 bits: 9 of the index, 7 signs                        66 s
    iq2_s     0 d   2 index, low 8 bits    34 signs, 1 bit     66 index, top 2 bits              74 s
    iq3_xxs   0 d   2 index, 8 bits        66 for each 32 columns 32 bits: 4 x 7 signs, s
    iq3_s     0 d   2 index, low 8 bits    66 index, top bit   74 signs, 1 bit                  106 s
    iq1_s     0 d   2 index, low 8 bits    34 for each 32 columns 16 bits: 4 x top 3 bits of the index, 3 of s, ±
    iq1_m           0 index, low 8 bits    32 for each 8 columns 4 bits: top 3 bits of the index, ±
                   48 for each 64 columns 16 bits: 4 x 3 bits of s, 4 bits of d
    mxfp4     0 e   1 codes: column j in the low half of byte 1 + j, column j + 16 in its high half

± is the bit of the shift by 1/8: set for minus. With `grid` the entry of the codebook:

    iq2_xxs, iq2_xs, iq2_s    w = ± d (s + 1/2) / 4 * grid
    iq3_xxs                   w = ± d (s + 1/2) / 2 * grid
    iq3_s                     w = ± d (2 s + 1) * grid
    iq1_s, iq1_m              w = d (2 s + 1) (grid ± 1/8)
    mxfp4                     w = ± 2^(e - 128) * {0, 1, 2, 3, 4, 6, 8, 12}

All products are exact in float32. Where seven bits store eight signs, the number of minus signs is even.

`grids.bin` holds the codebooks in the order of `GRIDS`. It stores the rank of each magnitude in two bits (iq3: four),
lowest bits first. Source: ggml-common.h of llama.cpp (https://github.com/ggml-org/llama.cpp, MIT licence), which
defines these codebooks.

>>> blocks = torch.zeros(1, 66, dtype=torch.uint8)               # tq2_0: 64 bytes of codes, d
>>> blocks[0, 0], blocks[0, 64:] = 2, torch.tensor([0, 0x3C], dtype=torch.uint8)
>>> decode("tq2_0", blocks)[0, [0, 32]].tolist()                 # d = 1
[1.0, -1.0]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from fewbit.lazy import Tensor, torch
from fewbit.schemes.ggml import digits
from fewbit.schemes.ggml.digits import DIGITS
from fewbit.system import ambient

# Name -> entries, columns of an entry, bits in which a rank is stored, magnitudes by rank.
GRIDS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "iq2_xxs": (256, 8, 2, (8, 25, 43)),
    "iq2_xs": (512, 8, 2, (8, 25, 43)),
    "iq2_s": (1024, 8, 2, (8, 25, 43)),
    "iq3_xxs": (256, 4, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    "iq3_s": (512, 4, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
    "iq1": (2048, 8, 2, (-1, 0, 1)),
}
_E2M1 = tuple(float(sign * x) for sign in (1, -1) for x in (0, 1, 2, 3, 4, 6, 8, 12))  # both zeros are +0


@cache
@ambient.defaults()
def grid(name: str, device: torch.device) -> Tensor:
    """A codebook, float32 [entries, columns]."""
    data, start = (Path(__file__).parent / "grids.bin").read_bytes(), 0
    for each, (entries, columns, bits, magnitudes) in GRIDS.items():
        size = entries * columns * bits // 8
        if each == name:
            packed = torch.tensor(list(data[start : start + size]), dtype=torch.uint8, device="cpu")
            rank = _lanes(packed, bits).long()
            return torch.tensor(magnitudes, dtype=torch.float32, device="cpu")[rank].view(entries, columns).to(device)
        start += size
    raise KeyError(name)


@cache
@ambient.defaults()
def _even_signs(device: torch.device) -> Tensor:
    """float32 [128, 8] of ±1: minus where the bit of the index is set, the eighth so that minus signs are even."""
    index, bit = (torch.arange(count, device="cpu", dtype=torch.int64) for count in (128, 7))
    bits = index[:, None] >> bit & 1
    return (1.0 - 2.0 * torch.cat([bits, bits.sum(1, keepdim=True) % 2], 1).float()).to(device)


def _lanes(x: Tensor, bits: int, total: int = 8) -> Tensor:
    """Split the low `total` bits of each number into fields of `bits`, lowest first: [..., n * total / bits]."""
    shifts = torch.arange(0, total, bits, device=x.device, dtype=x.dtype)
    return (x.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)


def _aligned(x: Tensor) -> Tensor:
    """A copy in aligned memory. Bytes inside a file may be unaligned, and then cannot be viewed as words."""
    return x.clone(memory_format=torch.contiguous_format)


def _words(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [B, n] as unsigned little-endian words, int64."""
    return _aligned(x).view(dtype).long() & (1 << 8 * dtype.itemsize) - 1


def _half(x: Tensor) -> Tensor:
    """The fp16 number in two bytes [B, 2], as float32 [B, 1]."""
    return _aligned(x).view(torch.float16).float()


def _signs(x: Tensor) -> Tensor:
    """-1 for each bit that is set and 1 for the others, of bytes [B, n]: float32 [B, 8 n]."""
    return 1.0 - 2.0 * _lanes(x, 1).float()


def _entries(name: str, index: Tensor) -> Tensor:
    """The entries of a codebook by index [B, n], float32 [B, n * columns]."""
    entries = grid(name, index.device)[index]
    return entries.flatten(1)


def _scaled(scale: Tensor, values: Tensor) -> Tensor:
    """values [B, K] times scale [B, G], each scale for K / G columns."""
    out: Tensor = values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)
    return out.flatten(1)


class Fields(NamedTuple):
    """The contents of B blocks whose values are w = ± d unit (2 s + 1) grid, `unit` as in `UNITS`.

    d float32 [B, 1]. s int [B, subs], 0 ... 15. entry int [B, 256 / columns of an entry]. signs: float32 [B, 256], ±1.
    """

    d: Tensor
    s: Tensor
    entry: Tensor
    signs: Tensor


def _iq2_xxs(b: Tensor) -> Fields:
    word = _words(b[:, 2:], torch.int32).unflatten(1, (8, 2))[..., 1]  # four indices; four times seven signs, then s
    index = b[:, 2:].unflatten(1, (8, 8))[..., :4].flatten(1).int()
    return Fields(_half(b[:, :2]), word >> 28, index, _even_signs(b.device)[_lanes(word, 7, 28)].flatten(1))


def _iq2_xs(b: Tensor) -> Fields:
    word = _words(b[:, 2:66], torch.int16)  # nine bits of index, seven of signs
    return Fields(_half(b[:, :2]), _lanes(b[:, 66:], 4), word & 511, _even_signs(b.device)[word >> 9].flatten(1))


def _iq2_s(b: Tensor) -> Fields:
    index = b[:, 2:34].int() | _lanes(b[:, 66:74], 2).int() << 8
    return Fields(_half(b[:, :2]), _lanes(b[:, 74:], 4), index, _signs(b[:, 34:66]))


def _iq3_xxs(b: Tensor) -> Fields:
    word = _words(b[:, 66:], torch.int32)
    signs = _even_signs(b.device)[_lanes(word, 7, 28)].flatten(1)
    return Fields(_half(b[:, :2]), word >> 28, b[:, 2:66].int(), signs)


def _iq3_s(b: Tensor) -> Fields:
    index = b[:, 2:66].int() | _lanes(b[:, 66:74], 1).int() << 8
    return Fields(_half(b[:, :2]), _lanes(b[:, 106:], 4), index, _signs(b[:, 74:106]))


_FIELDS = {"iq2_xxs": _iq2_xxs, "iq2_xs": _iq2_xs, "iq2_s": _iq2_s, "iq3_xxs": _iq3_xxs, "iq3_s": _iq3_s}
UNITS = {"iq2_xxs": 1 / 8, "iq2_xs": 1 / 8, "iq2_s": 1 / 8, "iq3_xxs": 1 / 4, "iq3_s": 1.0}


def fields(name: str, blocks: Tensor) -> Fields:
    """The contents of blocks uint8 [B, bytes] of a type in `UNITS`."""
    return _FIELDS[name](blocks)


def _with_signs(name: str, b: Tensor) -> Tensor:
    d, s, entry, signs = fields(name, b)
    return _scaled(d * (2 * s.int() + 1) * UNITS[name], _entries(name, entry)) * signs


def _iq1_s(b: Tensor) -> Tensor:
    word = _words(b[:, 34:], torch.int16)  # three high bits of each of four indices, then scale and sign of the shift
    index = b[:, 2:34].int() | _lanes(word, 3, 12).int() << 8
    shift = 0.125 - 0.25 * (word >> 15)
    values = (_entries("iq1", index).unflatten(1, (8, -1)) + shift.unsqueeze(-1)).flatten(1)
    return _scaled(_half(b[:, :2]) * (2 * (word >> 12 & 7) + 1), values)


def _scattered(word: Tensor) -> Tensor:
    """d of iq1_m, float32 [B, 1]: the top nibbles of the four scale words [B, 4] are its 16 bits."""
    bits = (word >> 12) << torch.arange(0, 16, 4, device=word.device, dtype=torch.int64)
    return bits.sum(1, keepdim=True).to(torch.int32).to(torch.int16).view(torch.float16).float()


def _iq1_m(b: Tensor) -> Tensor:
    high, word = _lanes(b[:, 32:48], 4).int(), _words(b[:, 48:], torch.int16)
    d = _scattered(word)
    index = b[:, :32].int() | (high & 7) << 8
    shift = 0.125 - 0.25 * (high >> 3)
    values = (_entries("iq1", index).unflatten(1, (32, -1)) + shift.unsqueeze(-1)).flatten(1)
    return _scaled(d * (2 * _lanes(word, 3, 12) + 1), values)


def _digits(name: str, b: Tensor) -> Tensor:
    kind, d = DIGITS[name], _half(b[:, (at := DIGITS[name].d) : at + 2])
    table = torch.tensor(kind.levels, dtype=torch.float32, device=b.device)
    out: Tensor = d * table[digits.unpack(name, b[:, digits.place(name)]).int()]
    return out


def _mxfp4(b: Tensor) -> Tensor:
    exponent = b[:, :1].int()
    scale = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23).view(torch.float32)
    codes = torch.cat([b[:, 1:] & 15, b[:, 1:] >> 4], 1)
    out: Tensor = scale * torch.tensor(_E2M1, device=b.device, dtype=torch.float32)[codes.int()]
    return out


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: partial(_with_signs, name) for name in UNITS},
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
    **{name: partial(_digits, name) for name in DIGITS},
    "mxfp4": _mxfp4,
}


# The first byte of d in a block. iq1_m keeps it in the top nibbles of four words; a block of mxfp4 has none.
_SCALE_AT = dict.fromkeys(("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), 0)
_SCALE_AT |= {name: kind.d for name, kind in DIGITS.items()}


def has_scale(name: str) -> bool:
    """Whether blocks of this type have an fp16 scale d, of which their values are multiples."""
    return name in _SCALE_AT or name == "iq1_m"


def scale_of(name: str, blocks: Tensor) -> Tensor:
    """d of blocks uint8 [B, bytes], float32 [B, 1]."""
    if name == "iq1_m":
        return _scattered(_words(blocks[:, 48:], torch.int16))
    return _half(blocks[:, (at := _SCALE_AT[name]) : at + 2])


def with_scale(name: str, blocks: Tensor, d: Tensor) -> Tensor:
    """A copy of the blocks with other scales d [B, 1]."""
    made, half = blocks.clone(memory_format=torch.contiguous_format), d.to(torch.float16).contiguous()
    if name == "iq1_m":
        shifts = torch.arange(0, 16, 4, device=d.device, dtype=torch.int64)
        nibbles = _words(half.view(torch.uint8), torch.int16) >> shifts & 15  # one for each of the four words
        made[:, 49::2] = made[:, 49::2] & 15 | (nibbles << 4).to(torch.uint8)
    else:
        made[:, (at := _SCALE_AT[name]) : at + 2] = half.view(torch.uint8)
    return made


def decode(name: str, blocks: Tensor) -> Tensor:
    """Values float32 [B, columns] of blocks uint8 [B, bytes]."""
    return _DECODERS[name](blocks)
