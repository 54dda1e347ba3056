"""Parts of a quantized weight have the values of the whole, for every scheme."""

from __future__ import annotations

import pytest
import torch

from fewbit import PlanError, registry
from fewbit.methods.base import Method
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.parted import part

EXAMPLES = [spec for family in registry.entries("schemes").values() for spec in family.examples]


def packed(spec: str, shape: tuple[int, int]) -> QTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[0] + 1)[:, None]
    return Method().quantize(weight, parse(spec), None).weight


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("spec", EXAMPLES)
def test_parts_have_the_values_of_the_whole(spec: str, axis: int, count: int) -> None:
    whole = packed(spec, (512, 1024))
    parts = [part(whole, axis, index, count) for index in range(count)]
    assert torch.equal(torch.cat([each.dequantize() for each in parts], axis), whole.dequantize())
    for each in parts:
        each.codec.check(each.parts, each.shape)


@pytest.mark.parametrize("spec", ["nf4-b64-dq", "int3-g64", "int4-g64", "int2-g64", "llm.int8"])
def test_odd_numbers_of_groups_and_of_nested_blocks(spec: str) -> None:
    """Three groups in each half of a row; 192 blocks in each half of the rows, of 256 that share a nested scale."""
    whole = packed(spec, (64, 384))
    for axis in (0, 1):
        halves = [part(whole, axis, index, 2).dequantize() for index in range(2)]
        assert torch.equal(torch.cat(halves, axis), whole.dequantize())


@pytest.mark.parametrize(
    ("spec", "axis", "count", "why"),
    [
        ("int4-g128", 1, 2, "groups would cross a border"),
        ("q4_k", 1, 2, "groups would cross a border"),
        ("int4-g64", 0, 3, "cannot be cut into 3 equal parts"),
    ],
)
def test_what_cannot_be_cut_says_why(spec: str, axis: int, count: int, why: str) -> None:
    whole = packed(spec, (64, 256 if spec == "q4_k" else 384))
    with pytest.raises(PlanError, match=why):
        part(whole, axis, 0, count)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [192, 384, 640])
def test_no_part_is_cut_if_one_border_is_in_a_block(size: int, axis: int) -> None:
    """Ranks whose linear is cut wait for the others in each step."""
    whole = packed("fp8-b128", (size, size))
    for index in range(2):
        with pytest.raises(PlanError, match="groups would cross a border"):
            part(whole, axis, index, 2)


def test_rows_keep_the_order_of_columns() -> None:
    whole = packed("int4-g32", (8, 64))
    whole.permutation = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    lower = part(whole, 0, 1, 2)
    assert torch.equal(lower.dequantize(), whole.dequantize()[4:])
    assert part(whole, 1, 1, 2).permutation is None
