"""Codes are one little-endian bit stream per row, and come back."""

from __future__ import annotations

import pytest
import torch

from fewbit.schemes import bits

widths = pytest.mark.parametrize("width", range(1, 9))


def codes_of(width: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**width, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(width))


@widths
@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 9, 31, 32, 33, 100])
def test_code_j_lies_at_bits_j_times_width(width: int, n: int) -> None:
    codes = codes_of(width, 3, n)
    packed = bits.pack(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, bits.packed_bytes(n, width))
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (j * width) for j, code in enumerate(row))
        assert bytes(stream) == number.to_bytes(bits.packed_bytes(n, width), "little")
    assert torch.equal(bits.unpack(packed, width, n), codes)


@widths
def test_leading_dimensions_and_strides_do_not_matter(width: int) -> None:
    codes = codes_of(width, 19, 4, 2).permute(2, 1, 0)
    packed = bits.pack(codes, width)
    assert packed.shape == (2, 4, bits.packed_bytes(19, width))
    assert torch.equal(bits.unpack(packed, width, 19), codes)
    assert torch.equal(bits.pack(codes[1, 2], width), packed[1, 2])


@widths
def test_the_largest_codes_do_not_spill(width: int) -> None:
    codes = torch.zeros(1, 24, dtype=torch.uint8)
    codes[:, ::2] = 2**width - 1
    assert torch.equal(bits.unpack(bits.pack(codes, width), width, 24), codes)


@widths
def test_packed_bytes_are_no_more_than_needed(width: int) -> None:
    assert [bits.packed_bytes(n, width) for n in (0, 1, 8, 9)] == [0, 1, width, width + (width + 7) // 8]
