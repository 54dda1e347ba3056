"""The same values in another scheme: equal in float64, and back to the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit import registry
from fewbit.methods.base import Method
from fewbit.schemes import bits, exact, mxfp4
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.exact import Form
from fewbit.schemes.ggml import codec

SHAPE = (64, 128)
EXAMPLES = [spec for family in registry.entries("schemes").values() for spec in family.examples]
PAIRS = [
    ("int4-g32-sym", "int4-g32"),
    ("int8-row-sym", "int8-row"),
    ("int4-row", "int4-g128"),
    ("int4-g128-sym", "int4-row-sym"),
    ("int4-g128-sym", "int4-row"),
    ("int4-g32-sym", "q4_0"),
    ("int5-g32-sym", "q5_0"),
    ("int8-g32-sym", "q8_0"),
    ("q4_0", "int4-g32-sym"),
    ("q8_0", "int8-g32"),
    ("q5_0", "int5-g32-sym"),
    ("nvfp4", "nvfp4-mul"),
    ("nvfp4-mul", "nvfp4"),
]


def packed(spec: str, seed: int = 0) -> QTensor:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return Method().quantize(weight, parse(spec), None).weight


def form_of(weight: QTensor, spec: str) -> Form:
    return next(form for form in exact.forms(weight.codec, weight.shape) if str(form.scheme) == spec)


def moved(weight: QTensor, spec: str) -> QTensor:
    found = form_of(weight, spec).of(weight)
    assert isinstance(found, QTensor), found
    found.codec.check(found.parts, found.shape)
    return found


def values(weight: QTensor) -> Tensor:
    return weight.codec.dequantize(weight.parts, weight.shape, torch.float64)


@pytest.mark.parametrize(("spec", "to"), PAIRS)
def test_values_are_equal_and_the_way_back_gives_the_bytes(spec: str, to: str) -> None:
    weight = packed(spec)
    there = moved(weight, to)
    assert torch.equal(values(there), values(weight))
    back = moved(there, spec)
    assert all(torch.equal(back.parts[name], part) for name, part in weight.parts.items())


@pytest.mark.parametrize("spec", EXAMPLES)
def test_every_form_of_every_scheme_has_the_values(spec: str) -> None:
    shape = (32, 512)
    scheme = parse(spec)
    if scheme.why_not(shape):
        pytest.skip("the shape does not fit")
    weight = Method().quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)), scheme, None).weight
    found = exact.forms(scheme, shape)
    assert found[0].scheme == scheme
    for form in found:
        there = form.of(weight)
        if form.checked and isinstance(there, str):
            continue
        assert isinstance(there, QTensor), (form.scheme, there)
        assert torch.equal(values(there), values(weight)), form.scheme


@pytest.mark.parametrize(
    ("spec", "to"),
    [
        ("int4-g128-sym", "q4_0"),
        ("int4-g64-sym", "q4_0"),
        ("int4-row-sym", "q4_0"),
        ("int3-g128-sym", "q4_0"),
        ("int3-g64", "q4_0"),
        ("int2-g32", "q4_0"),
        ("int4-g128", "q5_0"),
        ("int5-g64-sym", "q5_0"),
        ("int6-g128", "q8_0"),
        ("int8-g128-sym", "q8_0"),
    ],
)
def test_blocks_repeat_the_scale_of_a_larger_group(spec: str, to: str) -> None:
    """In every value of a level, whether the group has it or not."""
    weight, wide = packed(spec), int(spec[3])
    codes = torch.arange(SHAPE[0] * SHAPE[1]).view(SHAPE) % 2**wide
    weight.parts["codes"].copy_(bits.pack(codes.to(torch.uint8), wide))
    if "zero" in weight.parts:
        zeros = torch.arange(weight.parts["scale"].numel()).view(weight.parts["scale"].shape) % 2**wide
        weight.parts["zero"].copy_(bits.pack(zeros.to(torch.uint8), wide))
    first = next(form for form in exact.forms(weight.codec, SHAPE) if not form.checked and str(form.scheme)[0] == "q")
    assert str(first.scheme) == to
    there = moved(weight, to)
    assert torch.equal(values(there), values(weight))
    assert torch.equal(there.codec.dequantize(there.parts, SHAPE, torch.float32), weight.dequantize(torch.float32))


def affine(zero: int, scale: float) -> QTensor:
    """A 4-bit weight in groups of 32 with one scale and one zero point."""
    codes = torch.randint(0, 16, SHAPE, generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    groups = SHAPE[0], SHAPE[1] // 32
    parts = {
        "codes": bits.pack(codes, 4),
        "scale": torch.full(groups, scale, dtype=torch.float16),
        "zero": bits.pack(torch.full(groups, zero, dtype=torch.uint8), 4),
    }
    return QTensor(Affine(group=32, bits=4, symmetric=False), SHAPE, parts)


def test_zero_points_in_the_middle_become_symmetric() -> None:
    weight = affine(8, 0.3)
    assert moved(moved(weight, "int4-g32-sym"), "int4-g32").parts["zero"].equal(weight.parts["zero"])
    assert torch.equal(values(moved(weight, "q4_0")), values(weight))
    reason = form_of(affine(7, 0.3), "q4_0").of(affine(7, 0.3))
    assert reason == "its levels reach from -7 to 8, and those of q4_0 from -8 to 7"


def test_minima_are_stored_only_if_fp16_holds_them() -> None:
    weight = affine(5, 0.25)
    there = moved(weight, "q4_1")
    assert torch.equal(values(there), values(weight))
    assert all(torch.equal(part, weight.parts[name]) for name, part in moved(there, "int4-g32").parts.items())
    odd = affine(5, 0.3)
    assert "fp16 cannot hold" in str(form_of(odd, "q4_1").of(odd))


def test_a_minimum_between_two_levels_is_no_zero_point() -> None:
    weight = packed("q4_1")
    assert form_of(weight, "int4-g32").of(weight) == "not every minimum is a whole multiple of its scale"


def test_scales_that_are_not_finite_are_refused() -> None:
    weight = packed("q4_0")
    weight.parts["blocks"][3, :2] = torch.tensor([float("inf")], dtype=torch.float16).view(torch.uint8)
    assert form_of(weight, "int4-g32-sym").of(weight) == "it has a scale that is NaN or Inf"


@pytest.mark.parametrize(
    ("spec", "near", "reason"),
    [
        ("int4-g16-sym", "q4_0", "groups have 16 columns, and a block of q4_0 has 32"),
        ("int4-g48", "q4_1", "groups have 48 columns"),
        ("q4_k", "int4-g32", "products"),
        ("iq4_nl", "int4-g32-sym", "not evenly spaced"),
        ("nf4-b64", "int4-g64-sym", "not evenly spaced"),
        ("llm.int8", "int8-row-sym", "fp16 does not hold"),
    ],
)
def test_a_near_miss_says_what_differs(spec: str, near: str, reason: str) -> None:
    found = {str(form.scheme): form.why_not for form in exact.misses(parse(spec), (64, 512))}
    assert reason in str(found[near])


def test_mxfp4_blocks_have_the_values_of_the_scheme() -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (64, 4, 17), generator=generator).to(torch.uint8)
    blocks[..., 0] = torch.randint(0, 140, (64, 4), generator=generator).to(torch.uint8)
    weight = QTensor(codec("mxfp4"), SHAPE, {"blocks": blocks.flatten(1)})
    there = moved(weight, "mxfp4")
    assert torch.equal(values(there), values(weight))
    assert values(there).abs().max() > 0
    weight.parts["blocks"][5, 17] = 255
    assert form_of(weight, "mxfp4").of(weight) == "it has a scale that is NaN"


def test_the_order_of_mxfp4_blocks_is_undone() -> None:
    parts = dict(packed("mxfp4").parts)
    blocks = mxfp4.to_blocks(parts)
    assert torch.equal(codec("mxfp4").dequantize({"blocks": blocks}, SHAPE, torch.float64), values(packed("mxfp4")))
    assert all(torch.equal(part, parts[name]) for name, part in mxfp4.from_blocks(blocks).items())


@pytest.mark.parametrize("spec", ["nvfp4", "nvfp4-mul"])
def test_global_scales_need_a_reciprocal_with_the_same_scales(spec: str) -> None:
    """It exists for powers of two, and for about a fifth of other numbers; then the way back gives the bytes."""
    other, weight, found = {"nvfp4": "nvfp4-mul", "nvfp4-mul": "nvfp4"}[spec], packed(spec), 0
    for whole in torch.rand(200, generator=torch.Generator().manual_seed(4)).add(0.01).tolist():
        weight.parts["global"].fill_(whole)
        there = form_of(weight, other).of(weight)
        if isinstance(there, str):
            assert "has an exact reciprocal" in there
            continue
        found += 1
        assert torch.equal(values(there), values(weight))
        assert torch.equal(moved(there, spec).parts["global"], weight.parts["global"])
    assert 10 < found < 100


def test_a_type_that_is_only_decoded_has_no_form() -> None:
    assert exact.forms(codec("iq1_s"), (32, 256)) == []
    assert [str(form.scheme) for form in exact.forms(codec("iq2_xs"), (32, 256))] == ["iq2_xs"]
