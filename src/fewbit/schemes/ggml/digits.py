"""Types whose codes are one to two bits and have one scale d for a block: w = d level[c].

    type    levels         columns  bytes
    q1_0    -1, 1          128      0 d, 2 codes      one bit each, eight neighbours in a byte
    q2_0    -1, 0, 1, 2     64      0 d, 2 codes      two bits each, four neighbours in a byte
    tq2_0   -1, 0, 1       256      0 codes, 64 d     two bits each, columns 32 apart in a byte
    tq1_0   -1, 0, 1       256      0 codes, 52 d     digits of base 3, five in a byte: columns 32 apart in bytes 0-31,
                                                      16 apart in 32-47; four in a byte, 4 apart, in 48-51

d is in fp16. The first column of a byte is in the lowest bits; of tq1_0, it is the highest digit.
A byte of tq1_0 is its number of five digits as a fraction of 243, rounded up: 256 / 243 times the number. So
multiplying by a power of 3 brings a digit to the top. Where there are four digits, the last is 0.

Source: ggml-common.h and ggml-quants.c of llama.cpp.

>>> codes = torch.arange(256)[None] % 3
>>> torch.equal(unpack("tq1_0", pack("tq1_0", codes.to(torch.uint8))), codes.to(torch.uint8))
True
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.lazy import Tensor, torch
from fewbit.schemes.ggml.layout import Layout

_RUNS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))  # of tq1_0: first byte, bytes, digits of a byte


@dataclass(frozen=True)
class Digits(Layout):
    """levels: the level of each code. top: the highest code that is written; of tq2_0, two bits hold one more."""

    levels: tuple[float, ...] = ()
    top: int = 2

    @property
    def table(self) -> tuple[float, ...]:
        return self.levels


DIGITS: dict[str, Digits] = {
    "q1_0": Digits(128, 18, 128, (), bits=1, levels=(-1.0, 1.0), top=1),
    "q2_0": Digits(64, 18, 64, (), bits=2, zero=1, levels=(-1.0, 0.0, 1.0, 2.0), top=3),
    "tq1_0": Digits(256, 54, 256, (), d=52, bits=2, zero=1, levels=(-1.0, 0.0, 1.0)),
    "tq2_0": Digits(256, 66, 256, (), d=64, bits=2, zero=1, levels=(-1.0, 0.0, 1.0, 2.0)),
}


def place(name: str) -> slice:
    """The bytes of a block that hold the codes."""
    kind = DIGITS[name]
    return slice(0, kind.d) if kind.d else slice(2, kind.nbytes)


def pack(name: str, codes: Tensor) -> Tensor:
    """The bytes uint8 [B, bytes] of codes uint8 [B, columns]."""
    if name != "tq1_0":
        lanes = _lanes(name, codes)
        shifts = _shifts(name, codes.device)
        packed: Tensor = (lanes << shifts).sum(2, dtype=torch.uint8).flatten(1)
        return packed
    found, first = [], 0
    for _, width, digits in _RUNS:
        lanes = codes[:, first : first + width * digits].unflatten(1, (digits, width)).int()
        powers = torch.tensor([3 ** (4 - i) for i in range(digits)], dtype=torch.int32, device=codes.device)
        found.append((lanes * powers[:, None]).sum(1))
        first += width * digits
    numbers = torch.cat(found, 1)
    return ((numbers * 256 + 242) // 243).to(torch.uint8)


def unpack(name: str, held: Tensor) -> Tensor:
    """The codes uint8 [B, columns] of the bytes that hold them."""
    if name != "tq1_0":
        kind = DIGITS[name]
        lanes: Tensor = _places(name, held) >> _shifts(name, held.device) & 2**kind.bits - 1
        return (lanes if name == "tq2_0" else lanes.transpose(2, 3)).flatten(1)
    found = []
    for start, width, digits in _RUNS:
        powers = torch.tensor([3**i for i in range(digits)], dtype=torch.uint8, device=held.device)
        found.append((held[:, start : start + width].unsqueeze(1) * powers[:, None]).flatten(1))  # uint8 wraps
    return (torch.cat(found, 1).int() * 3 >> 8).to(torch.uint8)


def _lanes(name: str, codes: Tensor) -> Tensor:
    """Codes as [B, runs, codes of a byte, bytes of a run]."""
    many = 8 // DIGITS[name].bits
    if name == "tq2_0":
        return codes.view(len(codes), codes.shape[1] // (32 * many), many, 32)
    return codes.view(len(codes), 1, codes.shape[1] // many, many).transpose(2, 3)


def _places(name: str, held: Tensor) -> Tensor:
    runs = held.shape[1] // 32 if name == "tq2_0" else 1
    return held.reshape(len(held), runs, 1, held.shape[1] // runs)


def _shifts(name: str, device: torch.device) -> Tensor:
    shifts: Tensor = torch.arange(0, 8, DIGITS[name].bits, dtype=torch.uint8, device=device)
    return shifts[:, None]
