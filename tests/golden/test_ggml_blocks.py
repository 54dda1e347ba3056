"""Every block type against the package gguf: the table, and each value of any bytes, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

from fewbit.schemes.base import parse
from fewbit.schemes.ggml import codec
from fewbit.schemes.ggml.iq import IQ
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.ggml.table import BLOCK_TYPES
from tests.contract.cases import hard, ordinary, quantized

# The package gguf does not decode the newest two; tests/interop compares those with llama.cpp's library.
KNOWN = [name for name in BLOCK_TYPES if name not in ("q1_0", "q2_0")]
names = pytest.mark.parametrize("name", KNOWN)


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def any_bytes(name: str, n: int, blocks: int, seed: int = 0) -> Tensor:
    """Rows of blocks of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, blocks * BLOCK_TYPES[name].nbytes), generator=generator).to(torch.uint8)


def theirs(name: str, blocks: Tensor) -> Tensor:
    with np.errstate(all="ignore"):  # random bytes are infinite scales, too
        return torch.from_numpy(gguf.dequantize(blocks.numpy(), kind(name)))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the sign of a zero; where a scale is NaN both are."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(torch.int32)[~nan], b.view(torch.int32)[~nan])


@names
def test_the_table(name: str) -> None:
    assert BLOCK_TYPES[name] == (kind(name).value, *GGML_QUANT_SIZES[kind(name)])


def check_values(name: str) -> None:
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


@names
def test_values_of_any_bytes(name: str) -> None:
    check_values(name)


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_ternary_weights_give_the_bytes_of_gguf(name: str) -> None:
    """And any others too, but for the last digit of a scale that rounds otherwise."""
    digits = torch.randint(-1, 2, (6, 512), generator=torch.Generator().manual_seed(3)).float()
    for w in (digits / 64, digits * torch.tensor([[0.3], [1.5], [2e-4], [7.0], [0.01], [100.0]]).half().float()):
        packed = torch.from_numpy(gguf.quantize(w.numpy(), kind(name)))
        for codes, grids in ((parse(name).fit(w).encode(w), parse(name).fit(w)), parse(name).nearest(w)):
            assert torch.equal(parse(name).pack(codes, grids)["blocks"], packed)
        assert torch.equal(parse(name).dequantize({"blocks": packed}, (6, 512), torch.float32), w)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_what_gguf_encodes(name: str) -> None:
    """Is read and written back byte for byte, and loses more than what is encoded here."""
    scheme, w = parse(name), ordinary(12, 256)
    packed = torch.from_numpy(gguf.quantize(w.numpy(), kind(name)))
    scheme.check({"blocks": packed}, (12, 256))
    codes, grids = scheme.unpack({"blocks": packed}, (12, 256))
    assert torch.equal(scheme.pack(codes, grids)["blocks"], packed)
    ours = quantized(scheme, w)["blocks"]
    assert float((theirs(name, ours) - w).square().sum()) < 0.95 * float((theirs(name, packed) - w).square().sum())


def check_written(name: str) -> None:
    """What is packed here means there what was meant."""
    scheme = parse(name)
    for w in (ordinary(6, 512), hard(6, 512)):
        codes, grids = scheme.nearest(w)
        assert torch.equal(theirs(name, scheme.pack(codes, grids)["blocks"]), grids.decode(codes))


@pytest.mark.parametrize("name", [*GGML.examples, *IQ.examples, "tq1_0", "tq2_0"])
def test_what_is_written(name: str) -> None:
    check_written(name)
