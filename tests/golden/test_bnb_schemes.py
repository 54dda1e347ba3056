"""NF4, FP4 and LLM.int8() against bitsandbytes itself, on a CPU: every byte that it stores and every value it reads."""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from fewbit.schemes.base import parse
from fewbit.schemes.nf4 import _BINS, FourBit, dynamic_map, levels, nearest_level
from tests.contract.cases import hard, ordinary, quantized

logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # bitsandbytes compiles again for each shape, and says so

# Many rows, a short last block, less than a block, an odd number of entries, one entry.
SHAPES = [(48, 128), (37, 100), (3, 5), (7, 37), (1, 1), (5, 4097)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def weights(shape: tuple[int, int]) -> list[Tensor]:
    """Ordinary ones, some with whole blocks of nothing, some with blocks of very unlike size, nothing at all."""
    w, gone = ordinary(*shape), ordinary(*shape, seed=1)
    gone[shape[0] // 3 : 2 * shape[0] // 3 + 1] = 0
    return [w, gone, hard(*shape), torch.zeros(shape)]


def theirs(w: Tensor, scheme: FourBit) -> tuple[dict[str, Tensor], Any, Tensor]:
    """bitsandbytes' parts by our names, its state, and its packed codes."""
    packed, state = bnb.quantize_4bit(
        w, blocksize=scheme.group, compress_statistics=scheme.double, quant_type=scheme.kind
    )
    parts = {"codes": packed.flatten(), "absmax": state.absmax}
    if scheme.double:
        parts |= {"nested": state.state2.absmax, "offset": state.offset.view(1), "map": state.state2.code}
    return parts, state, packed


def check_bytes(spec: str, w: Tensor) -> None:
    scheme = parse(spec)
    assert isinstance(scheme, FourBit)
    wanted, _, _ = theirs(w, scheme)
    found = quantized(scheme, w)
    assert {name: part.dtype for name, part in found.items()} == {name: part.dtype for name, part in wanted.items()}
    for name, part in wanted.items():
        assert torch.equal(found[name], part), f"{name} of {spec} for {w.dtype} {list(w.shape)}"


@dtypes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", ["", "-dq"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
def test_4_bit_bytes(kind: str, block: int, double: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for w in weights(shape):
            check_bytes(f"{kind}-b{block}{double}", w.to(dtype))


def test_4_bit_bytes_of_many_blocks() -> None:
    """More scales than share a maximum, more entries than are worked on at a time."""
    for w in (ordinary(300, 1024), ordinary(301, 1025)):
        for spec in ("nf4-b32-dq", "nf4-b64", "fp4-b64-dq"):
            check_bytes(spec, w)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_ties_and_their_neighbours(kind: str) -> None:
    """The midpoints of levels, the next numbers on either side, and both zeros."""
    rising = levels(kind, torch.device("cpu")).sort().values
    middle = (rising[1:] + rising[:-1]) / 2
    up, down = torch.full_like(middle, 2), torch.full_like(middle, -2)
    x = torch.cat([middle, middle.nextafter(up), middle.nextafter(down), torch.tensor([0.0, -0.0, 1.0, -1.0])])
    w = torch.nn.functional.pad(x, (0, 64 - len(x) % 64), value=1.0).view(1, -1)
    check_bytes(f"{kind}-b64", w)
    for top in torch.rand(200, generator=torch.Generator().manual_seed(0)):  # in a short block, and in a whole one
        for width in (16, 64):
            check_bytes(f"{kind}-b64", torch.nn.functional.pad(top * middle, (0, width - 15), value=float(top))[None])
    edges = (middle.double() * (_BINS // 2 - 1) + _BINS / 2).frac()
    assert ((edges > 0.001) & (edges < 0.999)).logical_or(middle == 0).all()  # or a last bit would tell the bin
    codes = nearest_level(torch.linspace(-1, 1, 100_001), kind)
    assert torch.equal(codes, nearest_level(torch.linspace(-1, 1, 100_001).double(), kind))


def test_the_8_bit_map() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())  # type: ignore[no-untyped-call]


@dtypes
@pytest.mark.parametrize("spec", ["nf4-b64", "nf4-b64-dq", "fp4-b32", "nf4-b4096-dq"])
def test_4_bit_values(spec: str, dtype: torch.dtype) -> None:
    """Equal to `dequantize_4bit`, as a whole and for any rows.

    Where rows of a multiple of 16 entries are no whole number of blocks, bitsandbytes 0.50's code for AVX512 reads the
    scales of other blocks, so there the sum is done by hand.
    """
    scheme = parse(spec)
    assert isinstance(scheme, FourBit)
    for shape in [*SHAPES, (30, 96)]:
        parts, state, packed = theirs(ordinary(*shape), scheme)
        state.dtype = dtype
        wanted = bnb.dequantize_4bit(packed, state).reshape(shape)
        if shape[1] % scheme.group and shape[1] % 16 == 0:
            absmax = (
                bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
            )
            both = torch.stack([parts["codes"] >> 4, parts["codes"] & 15], 1).view(-1).long()[: wanted.numel()]
            values = state.code[both] * absmax.repeat_interleave(scheme.group)[: wanted.numel()]
            wanted = values.view(shape).to(dtype)
        assert torch.equal(scheme.dequantize(parts, shape, dtype), wanted)
        n = shape[0]
        for rows in (slice(0, 1), slice(n // 3, n // 2 + 1), slice(n - 1, n), slice(1, None), slice(0, 0)):
            assert torch.equal(scheme.dequantize(parts, shape, dtype, rows), wanted[rows])


@dtypes
def test_8_bit_bytes_and_values(dtype: torch.dtype) -> None:
    scheme = parse("llm.int8")
    for shape in SHAPES:
        for w in weights(shape):
            codes, scb, _ = bnb.int8_vectorwise_quant(w.to(dtype).half())
            parts = quantized(scheme, w.to(dtype))
            assert torch.equal(parts["codes"], codes)
            assert torch.equal(parts["scb"], scb)
            assert torch.equal(scheme.dequantize(parts, shape, torch.float32), bnb.int8_vectorwise_dequant(codes, scb))


def test_sizes_are_as_the_formula_says() -> None:
    """4 + 8/64 + 32/16384 bits a weight, 1028 bytes a tensor (map and offset), to the byte."""
    for n, k in ((512, 512), (1536, 576), (64, 64), (7, 37)):
        blocks = -(-n * k // 64)
        whole = -(-n * k // 2) + blocks + 4 * -(-blocks // 256)
        assert parse("nf4-b64-dq").nbytes((n, k)) == whole + 1028
        assert sum(part.nbytes for part in quantized(parse("nf4-b64-dq"), ordinary(n, k)).values()) == whole + 1028
    assert 8 * (parse("nf4-b64-dq").nbytes((4096, 4096)) - 1028) / 4096**2 == 4 + 8 / 64 + 32 / 16384
    assert parse("nf4-b64").nbytes((4096, 4096)) == 4096**2 // 2 + 4 * 4096**2 // 64
    assert parse("llm.int8").nbytes((4096, 4096)) == 4096**2 + 4 * 4096
