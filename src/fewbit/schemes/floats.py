"""Small floating-point numbers: FP8 (E4M3) and FP4 (E2M1) values, E8M0 scales, and scales that blocks share.

    E4M3   sign, 4 bits of exponent, 3 of mantissa    2^(e-7) (1 + m/8); e = 0: 2^-6 m/8; at most 448; 0x7F is NaN
    E2M1   sign, 2 bits of exponent, 1 of mantissa    0, 0.5, 1, 1.5, 2, 3, 4, 6
    E8M0   8 bits of exponent                         2^(e-127); 255 is NaN

E4M3 has no infinity (the variant `e4m3fn`). Two E2M1 codes share a byte, the even column in its low half. A value is
rounded to the nearest number, ties to the one with an even mantissa; what is larger than the largest number becomes
that number. The sign of zero is kept. Sources: OCP Microscaling Formats 1.0, and OCP 8-bit Floating Point 1.0.

>>> e2m1(torch.tensor([[0x21, 0xF7]], dtype=torch.uint8)).tolist()
[[0.5, 1.0, 6.0, -6.0]]
>>> to_e2m1(torch.tensor([0.25, 0.3, -0.75, 2.5, -100.0])).tolist()       # 0, 0.5, -1, 2 and -6
[0, 1, 10, 4, 15]
>>> e8m0(torch.tensor([127, 129, 0], dtype=torch.uint8)).tolist()
[1.0, 4.0, 5.877471754111438e-39]
>>> e4m3(to_e4m3(torch.tensor([1.0, 17.0, 19.0, -1000.0, 0.001]))).tolist()
[1.0, 16.0, 20.0, -448.0, 0.001953125]
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from math import isnan

from fewbit.lazy import Tensor, torch
from fewbit.system import ambient

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LARGEST, E4M3_LARGEST = 6.0, 448.0
E4M3_SMALLEST, E8M0_SMALLEST = 2.0**-9, 2.0**-126  # E8M0's 2^-127 is no normal float32, and may count as 0
FLOAT32_LARGEST = float.fromhex("0x1.fffffep127")


# ---- FP4 -----------------------------------------------------------------------------------------------------------


@cache
@ambient.defaults()
def e2m1_levels(device: torch.device) -> Tensor:
    """The sixteen values by code, float32 [16]. Code 8 is negative zero."""
    return torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32, device=device)


@cache
@ambient.defaults()
def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte, viewed as one 8-byte number so that one lookup fetches both. float64 [256]."""
    byte = torch.arange(256, device=device, dtype=torch.int64)
    levels = e2m1_levels(device)
    return torch.stack([levels[byte & 15], levels[byte >> 4]], 1).view(torch.float64)[:, 0]


def e2m1(packed: Tensor) -> Tensor:
    """The values, float32 [..., 2 n], of pairs of FP4 codes, 8-bit integers [..., n]."""
    pairs = packed.contiguous().view(torch.uint8)
    values = _pairs(packed.device).index_select(0, pairs.reshape(-1).int()).view(torch.float32)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


def to_e2m1(x: Tensor) -> Tensor:
    """Codes (uint8) of the FP4 values nearest to x, float32 or float64.

    The magnitudes of the codes lie on three lines: code = 2 a up to 2, a + 2 up to 4, and a / 2 + 4 up to 6, and the
    lowest line holds. Each is rounded before anything is added, so the sums are exact, and even codes get the ties.
    """
    a = x.abs().clamp_(max=E2M1_LARGEST)
    code = (a + a).round_()
    code = torch.minimum(code, a.round().add_(2), out=code)
    code = torch.minimum(code, a.mul_(0.5).round_().add_(4), out=code)
    # The sign bit, moved to bit 3; `signbit`, or a conversion from float to uint8, takes three times as long.
    sign = x.view(torch.int32) >> 28 if x.dtype == torch.float32 else (x.view(torch.int64) >> 60).to(torch.int32)
    return code.to(torch.int32).bitwise_or_(sign.bitwise_and_(8)).to(torch.uint8)


@cache
@ambient.defaults()
def e2m1_edges() -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """The FP4 values in rising order; the edges between them; and their codes. The nearest value of a float32 x is the
    one whose index is the number of edges below x.

    An edge is the middle of two values, or the number below it where the upper value gets the tie.
    """
    codes = [*range(15, 7, -1), *range(8)]  # from -6 to -0, from 0 to 6
    values = [_E2M1[code & 7] * (-1.0 if code & 8 else 1.0) for code in codes]
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(values)], dtype=torch.float32, device="cpu")
    below = torch.nextafter(middles, torch.full_like(middles, -6.0))
    below[7] = -(2.0**-126)  # between -0 and 0: a GPU may take smaller numbers for 0
    even = torch.tensor([code % 2 == 0 for code in codes[1:]], dtype=torch.bool, device="cpu")
    edges = torch.where(even, below, middles)
    return tuple(values), tuple(edges.tolist()), tuple(codes)


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes uint8 [..., 2 n] of 4 bits as uint8 [..., n], the even column in the low half of each byte."""
    pairs = codes.contiguous().view(torch.int16)  # the even column is its low byte
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def unpack_pairs(packed: Tensor) -> Tensor:
    """The inverse of `pack_pairs`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def to_halves(packed: Tensor) -> Tensor:
    """Pairs of codes in the order of GGUF: byte j of a block of 32 columns holds columns j and j + 16.

    packed: as `pack_pairs` gives them, uint8 [..., 16 n].
    """
    halves = unpack_pairs(packed).unflatten(-1, (-1, 2, 16))
    mixed: Tensor = halves[..., 0, :] | halves[..., 1, :] << 4
    return mixed.flatten(-2)


def from_halves(packed: Tensor) -> Tensor:
    """The inverse of `to_halves`."""
    pairs = packed.unflatten(-1, (-1, 16))
    return pack_pairs(torch.cat([pairs & 15, pairs >> 4], -1).flatten(-2))


# ---- FP8 -----------------------------------------------------------------------------------------------------------


def e4m3(codes: Tensor) -> Tensor:
    """The values, float32, of E4M3 codes (uint8 or float8_e4m3fn). Codes of NaN give 480, or -480.

    An E4M3 number is a float16 with a smaller exponent: its bits, moved, are the number times 2^-8. This takes a tenth
    of the time of PyTorch's own conversion.
    """
    wide = codes.contiguous().view(torch.int8).to(torch.int16).bitwise_left_shift_(7)  # copies the sign to bit 14 too
    return wide.bitwise_and_(~(1 << 14)).view(torch.float16).float().mul_(256)


def to_e4m3(x: Tensor) -> Tensor:
    """Codes (uint8) of the E4M3 numbers nearest to x. Numbers beyond 448 become 448."""
    # Older versions of PyTorch convert what is beyond 464 to NaN.
    return x.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_has_nan(codes: Tensor) -> bool:
    """Whether E4M3 codes (uint8 or float8_e4m3fn) contain NaN."""
    return any(bool((piece & 0x7F == 0x7F).any()) for piece in codes.view(torch.uint8).reshape(-1).split(1 << 20))


# ---- scales --------------------------------------------------------------------------------------------------------


def largest_magnitude(weights: Iterable[Tensor]) -> float:
    """The largest magnitude in several weights; Inf or NaN if there is one of these, 0 if there is no element."""
    tops = [float(end) for w in weights if w.numel() for end in w.aminmax()]
    return next((top for top in tops if isnan(top)), max(map(abs, tops), default=0.0))


def flaw_of_scales(name: str, scales: Tensor) -> tuple[str, str] | None:
    """`Codec.flaw` of scales, which must be finite and above 0. None if they are."""
    if not bool(torch.isfinite(scales).all()):
        return name, "has NaN or Inf"
    if not bool((scales > 0).all()):
        return name, "has numbers that are not above 0"
    return None


def e8m0(exponents: Tensor) -> Tensor:
    """The scales, float32, of E8M0 bytes (uint8 or float8_e8m0fnu)."""
    return exponents.view(torch.uint8).view(torch.float8_e8m0fnu).float()


def to_e8m0(scales: Tensor) -> Tensor:
    """The E8M0 bytes (uint8) of positive powers of two."""
    return scales.float().view(torch.int32).bitwise_right_shift(23).to(torch.uint8)


def scaled(values: Tensor, scales: Tensor, block: tuple[int, int], first: int = 0) -> Tensor:
    """`values` [..., R, K], multiplied in place by the scales [..., A, B] of blocks of rows and columns.

    values: the rows from `first` on of a matrix. scales: those of the whole matrix, or of its blocks from the one that
    contains `first`. The last block of a row or column may be smaller than the others.
    """
    return _with_scales(torch.Tensor.mul_, values, scales, block, first)


def unscaled(values: Tensor, scales: Tensor, block: tuple[int, int], first: int = 0) -> Tensor:
    """`values` divided in place by the scales that `scaled` multiplies by."""
    return _with_scales(torch.Tensor.div_, values, scales, block, first)


def _with_scales(operate: object, values: Tensor, scales: Tensor, block: tuple[int, int], first: int) -> Tensor:
    assert callable(operate)
    rows, columns = values.shape[-2:]
    taller = scales.to(values.dtype)
    if block[0] > 1:
        skip = first % block[0]
        taller = taller.repeat_interleave(block[0], -2)[..., skip : skip + rows, :]
    if columns % block[1] == 0:  # without a tensor of the size of `values`: 5 times faster
        operate(values.unflatten(-1, (-1, block[1])), taller.unsqueeze(-1))
    else:
        operate(values, taller.repeat_interleave(block[1], -1)[..., :columns])
    return values
