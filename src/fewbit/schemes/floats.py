"""Small floating-point numbers: FP4 (E2M1) values and E8M0 scales, and scales that blocks of a matrix share.

E2M1 has a sign bit, two bits of exponent and one of mantissa. Two codes share a byte, the even column in its low half.
E8M0 is a power of two: byte e means 2**(e - 127), and 255 is NaN. Source: OCP Microscaling Formats, version 1.0.

>>> e2m1(torch.tensor([[0x21, 0xF7]], dtype=torch.uint8)).tolist()
[[0.5, 1.0, 6.0, -6.0]]
>>> e8m0(torch.tensor([127, 129, 0], dtype=torch.uint8)).tolist()
[1.0, 4.0, 5.877471754111438e-39]
"""

from __future__ import annotations

from fewbit.lazy import Tensor, torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1(packed: Tensor) -> Tensor:
    """The values, float32 [..., 2 n], of pairs of FP4 codes, 8-bit integers [..., n]."""
    pairs = packed.contiguous().view(torch.uint8)
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32, device=packed.device)
    return table[torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2).int()]


def e8m0(exponents: Tensor) -> Tensor:
    """The scales, float32, of E8M0 bytes (uint8 or float8_e8m0fnu)."""
    return exponents.view(torch.uint8).view(torch.float8_e8m0fnu).float()


def scaled(values: Tensor, scales: Tensor, block: tuple[int, int], first: int = 0) -> Tensor:
    """`values` float32 [..., R, K], multiplied in place by the scales [..., A, B] of blocks of rows and columns.

    values: the rows from `first` on of a matrix. scales: those of the whole matrix, or of its blocks from the one that
    contains `first`. The last block of a row or column may be smaller than the others.
    """
    rows, columns = values.shape[-2:]
    skip = first % block[0]
    taller = scales.float().repeat_interleave(block[0], -2)[..., skip : skip + rows, :]
    if columns % block[1] == 0:  # without a tensor of the size of `values`: 5 times faster
        values.unflatten(-1, (-1, block[1])).mul_(taller.unsqueeze(-1))
        return values
    return values.mul_(taller.repeat_interleave(block[1], -1)[..., :columns])
