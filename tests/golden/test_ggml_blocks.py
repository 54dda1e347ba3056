"""Every block type against the package gguf: the table, and each value of any bytes, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

from fewbit.schemes.ggml import BLOCK_TYPES, codec

names = pytest.mark.parametrize("name", BLOCK_TYPES)


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def any_bytes(name: str, n: int, blocks: int, seed: int = 0) -> Tensor:
    """Rows of blocks of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, blocks * BLOCK_TYPES[name].nbytes), generator=generator).to(torch.uint8)


def theirs(name: str, blocks: Tensor) -> Tensor:
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), kind(name)))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the sign of a zero; where a scale is NaN both are."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(torch.int32)[~nan], b.view(torch.int32)[~nan])


@names
def test_the_table(name: str) -> None:
    assert BLOCK_TYPES[name] == (kind(name).value, *GGML_QUANT_SIZES[kind(name)])


@names
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_of_any_bytes(name: str) -> None:
    """In float32, of all rows and of some."""
    blocks = any_bytes(name, 64, 9)
    wanted, shape = theirs(name, blocks), (64, 9 * BLOCK_TYPES[name].columns)
    found = codec(name).dequantize({"blocks": blocks}, shape, torch.float32)
    assert tuple(found.shape) == shape
    assert found.dtype == torch.float32
    assert same_bits(found, wanted)
    for rows in (slice(0, 1), slice(5, 9), slice(63, None), slice(0, 0)):
        assert same_bits(codec(name).dequantize({"blocks": blocks}, shape, torch.float32, rows), wanted[rows])
    assert np.isfinite(wanted.numpy()).any()
