"""Small floats and the schemes made of them, against their definitions."""

from __future__ import annotations

from dataclasses import replace
from math import frexp

import pytest
import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.schemes import floats
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.fp8 import FP8
from fewbit.schemes.nvfp4 import NVFP4, NVFP4Grids
from fewbit.schemes.scaled import ScaledGrids
from fewbit.schemes.stacked import stack, unstack
from tests.contract.cases import inputs, ordinary, quantized, same_bytes, stats_of

SCALED = ("fp8-row", "fp8-tensor", "fp8-b128", "mxfp4", "nvfp4", "nvfp4-mul")
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def e4m3_numbers() -> list[float]:
    """The positive numbers by code, from the formula."""
    return [m * 2.0**-9 if e == 0 else 2.0 ** (e - 7) * (1 + m / 8) for e in range(16) for m in range(8)][:-1]


def by_definition(x: Tensor, numbers: tuple[float, ...] | list[float]) -> Tensor:
    """Codes of the nearest numbers, ties to the even code, sign in the bit above."""
    table, a = torch.tensor(numbers, dtype=torch.float64), x.double().abs().clamp(max=numbers[-1])
    distance = (a[:, None] - table).abs()
    least = distance.amin(1, keepdim=True)
    tied = distance == least
    code = torch.arange(len(numbers))
    even = torch.where(tied & (code % 2 == 0), code, -1).amax(1)
    chosen = torch.where(even >= 0, even, torch.where(tied, code, -1).amax(1))
    return chosen + x.signbit() * (1 << (len(numbers)).bit_length() - (len(numbers) == 8))


def around(numbers: tuple[float, ...] | list[float]) -> Tensor:
    """The numbers, the midpoints between them, their neighbours in float32, and what lies beyond; with both signs."""
    table = torch.tensor(numbers, dtype=torch.float32)
    middle = (table[1:] + table[:-1]) / 2
    points = torch.cat([table, middle, torch.tensor([numbers[-1] * 1.01, 1e30, 1e-30])])
    near = [points, torch.nextafter(points, torch.tensor(torch.inf)), torch.nextafter(points, torch.tensor(0.0))]
    return torch.cat([*near, *(-each for each in near)])


def test_fp4_takes_the_nearest_and_even_codes_on_ties() -> None:
    x = around(E2M1)
    assert torch.equal(floats.to_e2m1(x).long(), by_definition(x, E2M1))
    assert torch.equal(floats.to_e2m1(x.double()).long(), by_definition(x, E2M1))


def test_fp8_takes_the_nearest_and_even_codes_on_ties() -> None:
    x = around(e4m3_numbers())
    assert torch.equal(floats.to_e4m3(x).long(), by_definition(x, e4m3_numbers()))


def test_fp8_codes_mean_the_numbers_of_the_formula() -> None:
    codes = torch.arange(256).to(torch.uint8)
    positive = torch.tensor(e4m3_numbers())
    assert torch.equal(floats.e4m3(codes[:127]), positive)
    assert torch.equal(floats.e4m3(codes[128:255]), -positive)
    assert torch.equal(floats.e4m3(codes[:127]), codes[:127].view(torch.float8_e4m3fn).float())
    assert floats.e4m3_has_nan(codes[120:])
    assert floats.e4m3_has_nan(codes[255:])
    assert not floats.e4m3_has_nan(torch.cat([codes[:127], codes[128:255]]))


def test_pairs_and_powers_of_two_come_back() -> None:
    packed = torch.arange(256).to(torch.uint8).view(16, 16)
    assert torch.equal(floats.pack_pairs(floats.unpack_pairs(packed)), packed)
    assert floats.unpack_pairs(packed)[1, :4].tolist() == [0, 1, 1, 1]  # bytes 0x10 and 0x11
    exponents = torch.arange(255).to(torch.uint8)
    assert torch.equal(floats.to_e8m0(floats.e8m0(exponents)), exponents)


def test_scales_of_ragged_blocks() -> None:
    x, scales = torch.randn(5, 7), torch.rand(3, 2) + 1
    whole = torch.stack([torch.stack([scales[i // 2, j // 4] for j in range(7)]) for i in range(5)])
    assert torch.equal(floats.scaled(x.clone(), scales, (2, 4)), x * whole)
    assert torch.equal(floats.unscaled(x.clone(), scales, (2, 4)), x / whole)
    assert torch.equal(floats.scaled(x[3:].clone(), scales[1:], (2, 4), first=3), (x * whole)[3:])


@pytest.mark.parametrize("spec", ["fp8-b64", "fp8-g128", "fp8", "mxfp4-g16", "nvfp4-g16", "nvfp4-div"])
def test_other_blocks_are_refused(spec: str) -> None:
    with pytest.raises(PlanError, match=spec):
        parse(spec)


# ---- FP8 -----------------------------------------------------------------------------------------------------------


def test_one_scale_for_each_block_of_128() -> None:
    w = ordinary(300, 200)
    parts = quantized(parse("fp8-b128"), w)
    assert parts["scale"].shape == (3, 2)
    for i in range(3):
        for j in range(2):
            block = w[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert parts["scale"][i, j] == block.abs().max() / 448
            own = parts["codes"][128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert torch.equal(own, floats.to_e4m3(block / parts["scale"][i, j]))


def test_one_scale_for_a_row_and_for_a_tensor() -> None:
    w = ordinary(5, 40)
    assert torch.equal(quantized(parse("fp8-row"), w)["scale"], w.abs().amax(1, keepdim=True) / 448)
    whole = quantized(parse("fp8-tensor"), w)["scale"]
    assert torch.equal(whole, (w.abs().max() / 448).expand(5, 1))


def test_the_search_of_one_scale_keeps_it_one() -> None:
    w, importance = ordinary(6, 64), torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 4
    grids = parse("fp8-tensor").fit(w, importance)
    assert isinstance(grids, ScaledGrids)
    assert len(grids.scale.unique()) == 1
    again = parse("fp8-tensor").refit(w, grids.encode(w), grids, stats_of(inputs(99, 64)).hessian)
    assert isinstance(again, ScaledGrids)
    assert len(again.scale.unique()) == 1
    assert not torch.equal(again.scale, grids.scale)


def test_blocks_stack_by_rows_only_where_they_end_together() -> None:
    assert parse("fp8-b128").by_rows((256, 300))
    assert not parse("fp8-b128").by_rows((200, 256))
    for rows in ((128, 256), (128, 100), (60, 70)):
        weights = [
            QTensor(parse("fp8-b128"), (n, 130), quantized(parse("fp8-b128"), ordinary(n, 130, seed=n))) for n in rows
        ]
        whole = stack(weights)
        assert torch.equal(whole.dequantize(), torch.cat([w.dequantize() for w in weights]))
        assert (whole.codec == parse("fp8-b128")) == (rows == (128, 256))
        for before, after in zip(weights, unstack(whole, rows), strict=True):
            assert same_bytes(after.parts, before.parts)


# ---- FP4 -----------------------------------------------------------------------------------------------------------


def test_the_exponent_rounds_up_from_7_quarters() -> None:
    """compressed-tensors' rule: 127 + floor(log2 of the largest magnitude) - 2, and 1 more from 7 / 4 of a power."""
    tops = torch.tensor([1.0, 1.74, 1.75, 1.99, 2.0, 6.0, 7.0, 0.011, 3e-38, 3e38])
    parts = quantized(parse("mxfp4"), tops[:, None] * torch.linspace(-1, 1, 32))
    expected = [127 + frexp(top)[1] - 3 + (2 * frexp(top)[0] >= 1.75) for top in tops.tolist()]
    assert parts["scale"][:, 0].tolist() == [max(1, min(e, 254)) for e in expected]


@pytest.mark.parametrize("top", [1.0, 6.0, 2688.0, 2689.0, 0.0173, 1e-30, 1e30, 448 * 6 / 1024])
@pytest.mark.parametrize("spec", ["nvfp4", "nvfp4-mul"])
def test_the_global_scale_is_the_power_of_two_that_fits(spec: str, top: float) -> None:
    parts = quantized(parse(spec), top * torch.linspace(-1, 0.9, 64).repeat(3, 1))
    whole = float(parts["global"][0, 0])
    assert frexp(whole)[0] == 0.5
    assert parts["global"].tolist() == [[whole]] * 3
    factor = 1 / whole if spec == "nvfp4" else whole
    assert 224 < top / 6 / factor <= 448 * (1 + 1e-6)
    groups = (top * torch.linspace(-1, 0.9, 64)).view(4, 16).abs().amax(1)
    assert torch.equal(parts["scale"], floats.to_e4m3(groups / 6 / factor).expand(3, 4))


def test_both_kinds_of_nvfp4_have_the_same_values() -> None:
    w = ordinary(6, 96)
    divided, multiplied = (quantized(parse(spec), w) for spec in ("nvfp4", "nvfp4-mul"))
    assert torch.equal(divided["codes"], multiplied["codes"])
    assert torch.equal(divided["scale"], multiplied["scale"])
    assert torch.equal(divided["global"], 1 / multiplied["global"])
    values = parse("nvfp4").dequantize(divided, (6, 96), torch.float32)
    assert torch.equal(values, parse("nvfp4-mul").dequantize(multiplied, (6, 96), torch.float32))


@pytest.mark.parametrize("spec", SCALED)
def test_the_default_dtype_changes_no_part(spec: str) -> None:
    w = ordinary(4, 64) * 1e-4  # the divisor of NVFP4 is beyond the range of float16
    before = quantized(parse(spec), w)
    torch.set_default_dtype(torch.float16)
    try:
        assert same_bytes(quantized(parse(spec), w), before)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("spec", ["nvfp4", "nvfp4-mul"])
def test_any_global_scale_is_applied_as_its_maker_does(spec: str) -> None:
    """One rounding for scale and global, one for the product with the number."""
    parts = quantized(parse(spec), ordinary(4, 64)) | {"global": torch.tensor([[0.0123], [1e-4], [3.3], [700.7]])}
    scale = parts["scale"].view(torch.float8_e4m3fn).float()
    scale = scale / parts["global"] if spec == "nvfp4" else scale * parts["global"]
    table = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.float32)
    codes = torch.stack([parts["codes"] & 15, parts["codes"] >> 4], -1).flatten(1).long()
    expected = table[codes] * scale.repeat_interleave(16, 1)
    assert torch.equal(parse(spec).dequantize(parts, (4, 64), torch.float32), expected)
    codes_again, grids = parse(spec).unpack(parts, (4, 64))
    assert torch.equal(grids.decode(codes_again), expected)
    assert same_bytes(parse(spec).pack(codes_again, grids), parts)


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4"])
def test_large_and_small_values_are_stored(spec: str) -> None:
    for top in (1e30, 1e-30):
        w = torch.linspace(-1, 1, 64).repeat(2, 1) * top
        grids = parse(spec).fit(w)
        assert ((grids.decode(grids.encode(w)) - w).abs() <= 0.25 * top).all()
        assert parse(spec).flaw(quantized(parse(spec), w)) is None


# ---- weights that agree --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["nvfp4", "nvfp4-mul", "fp8-tensor"])
@pytest.mark.parametrize("weighed", [False, True])
def test_weights_of_one_matrix_share_the_number(spec: str, weighed: bool) -> None:
    part = "scale" if spec == "fp8-tensor" else "global"
    weights = [ordinary(4, 64), ordinary(3, 64, seed=1) * 8, ordinary(2, 64, seed=2) / 30]
    scheme = parse(spec).for_all(iter(weights))
    assert scheme == parse(spec)
    assert hash(scheme) == hash(parse(spec))
    assert str(scheme) == spec
    hessian, importance = stats_of(inputs(99, 64)).hessian, torch.linspace(0, 1, 64)
    shared = set()
    for w in weights:
        grids = scheme.fit(w, importance if weighed else None)
        codes = grids.encode(w)
        parts = scheme.pack(codes, scheme.refit(w, codes, grids, hessian) if weighed else grids)
        shared |= set(parts[part].flatten().tolist())
    assert shared == {float(quantized(parse(spec), weights[1])[part][0, 0])}


@pytest.mark.parametrize("spec", ["int4-g32", "nf4-b64", "q4_0", "llm.int8", "fp8-row", "fp8-b128", "mxfp4"])
def test_schemes_without_such_a_number_return_themselves(spec: str) -> None:
    assert parse(spec).for_all([ordinary(4, 64)]) is parse(spec).for_all([]) or parse(spec).for_all([]) == parse(spec)
    assert vars(parse(spec).for_all([ordinary(4, 64)])) == vars(parse(spec))


def test_weights_without_a_largest_value_choose_alone() -> None:
    for bad in (torch.tensor([[torch.nan]]), torch.tensor([[torch.inf]])):
        for scheme in (NVFP4(), FP8(0, "tensor")):
            assert scheme.for_all([torch.ones(1, 1), bad]).span is None
    assert NVFP4().for_all([torch.zeros(1, 16)]).span == 0
    assert quantized(replace(NVFP4(), span=0.0), torch.zeros(1, 16))["global"].item() == 1


# ---- refit, and what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SCALED)
def test_refit_never_raises_the_error(spec: str) -> None:
    n, k = 140, 256
    w, hessian = ordinary(n, k), stats_of(inputs(400, k)).hessian
    scheme = parse(spec)
    grids = scheme.fit(w)
    codes = grids.encode(w)
    again = scheme.refit(w, codes, grids, hessian, 0.01)

    def error(values: Tensor) -> Tensor:
        e = (w - values).double()
        damped = hessian.double() + 0.01 * torch.eye(k, dtype=torch.float64)
        lost = (e @ damped * e).sum(1)
        return torch.stack([rows.sum() for rows in lost.split(scheme.rows or n)])

    before, after = error(grids.decode(codes)), error(again.decode(codes))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum() * (0.9999 if spec != "mxfp4" else 1.00001)  # its scales are already the nearest
    parts = scheme.pack(codes, again)
    assert torch.equal(scheme.dequantize(parts, (n, k), torch.float32), again.decode(codes))  # rounded as stored


def test_refit_finds_the_powers_of_two_again() -> None:
    w, hessian = ordinary(8, 64), torch.eye(64)
    grids = parse("mxfp4").fit(w)
    assert isinstance(grids, ScaledGrids)
    codes = grids.encode(w)
    for wrong in (0.25, 2.0):
        again = parse("mxfp4").refit(w, codes, replace(grids, scale=grids.scale * wrong), hessian)
        assert isinstance(again, ScaledGrids)
        assert torch.equal(again.scale, grids.scale)


def test_refit_solves_the_last_block() -> None:
    """The step that is left for the scale of the last block of columns is 0, summed over the rows that share it."""
    w, hessian = ordinary(130, 200), stats_of(inputs(300, 200)).hessian
    scheme = parse("fp8-b128")
    grids = scheme.fit(w)
    codes = grids.encode(w)
    again = scheme.refit(w, codes, grids, hessian)
    assert isinstance(again, ScaledGrids)
    level = torch.zeros_like(w).double()
    level[:, 128:] = floats.e4m3(codes[:, 128:]).double()
    pull = ((w - again.decode(codes)).double() @ hessian.double() * level).sum(1)
    curvature = (level @ hessian.double() * level).sum(1)
    for rows, scale in ((slice(128), again.scale[0, 1]), (slice(128, None), again.scale[1, 1])):
        assert (pull[rows].sum() / curvature[rows].sum()).abs() <= 1e-5 * scale


FLAWS: dict[str, list[tuple[str, float]]] = {
    "fp8-row": [("codes", 0x7F), ("codes", 0xFF), ("scale", 0.0), ("scale", -1.0), ("scale", torch.nan)],
    "fp8-b128": [("codes", 0x7F), ("scale", torch.inf)],
    "mxfp4": [("scale", 255)],
    "nvfp4": [("scale", 0x7F), ("scale", 0xFF), ("scale", 0x81), ("global", 0.0), ("global", -2.0)],
    "nvfp4-mul": [("global", torch.nan)],
}


@pytest.mark.parametrize(("spec", "part", "bad"), [(s, *flaw) for s, flaws in FLAWS.items() for flaw in flaws])
def test_numbers_that_no_weight_has_are_named(spec: str, part: str, bad: float) -> None:
    parts = quantized(parse(spec), ordinary(4, 64))
    assert parse(spec).flaw(parts) is None
    parts[part] = parts[part].clone()
    parts[part][-1, -1] = bad
    found = parse(spec).flaw(parts)
    assert found is not None
    assert found[0] == part
    assert found[1].startswith("has ")


def test_a_group_scale_of_zero_is_read() -> None:
    """Other makers store 0 for a group whose weights are all 0."""
    parts = quantized(parse("nvfp4"), ordinary(4, 64))
    parts["scale"] = parts["scale"].clone()
    parts["scale"][0, 0] = 0
    assert parse("nvfp4").flaw(parts) is None
    codes, grids = parse("nvfp4").unpack(parts, (4, 64))
    assert isinstance(grids, NVFP4Grids)
    assert (grids.decode(codes)[0, :16] == 0).all()
