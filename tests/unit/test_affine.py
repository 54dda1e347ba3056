"""The affine scheme's plain fit is round-to-nearest as defined, and its scales are what a file will hold."""

from __future__ import annotations

import pytest
import torch

from fewbit.schemes import affine
from fewbit.schemes.affine import AffineGrids
from fewbit.schemes.base import parse
from tests.contract.cases import hard, inputs, ordinary, stats_of

widths = pytest.mark.parametrize("bits", range(2, 9))


@widths
@pytest.mark.parametrize("group", [16, 64, 0])
def test_a_symmetric_fit_is_absmax_over_half_the_steps(bits: int, group: int) -> None:
    w = ordinary(5, 128)
    grids = parse(f"int{bits}-{f'g{group}' if group else 'row'}-sym").fit(w)
    assert isinstance(grids, AffineGrids)
    top = w.unflatten(1, (-1, group or 128)).abs().amax(-1)
    assert torch.equal(grids.scale, (2 * top / (2**bits - 1)).half().float())
    torch.testing.assert_close(grids.scale, top / (2 ** (bits - 1) - 0.5), rtol=2**-10, atol=2**-24)
    assert (grids.zero == 2 ** (bits - 1)).all()


@widths
@pytest.mark.parametrize("group", [16, 64, 0])
@pytest.mark.parametrize("offset", [-1.0, 0.0, 0.05, 1.0])
def test_an_asymmetric_fit_spans_min_to_max_and_holds_zero(bits: int, group: int, offset: float) -> None:
    w = ordinary(5, 128) + offset
    grids = parse(f"int{bits}-{f'g{group}' if group else 'row'}").fit(w)
    assert isinstance(grids, AffineGrids)
    by_group = w.unflatten(1, (-1, group or 128))
    low, high = by_group.amin(-1).clamp(max=0), by_group.amax(-1).clamp(min=0)
    assert torch.equal(grids.scale, ((high - low) / (2**bits - 1)).half().float())
    assert torch.equal(grids.zero, (-low / grids.scale).round())
    zero = grids.decode(grids.encode(torch.zeros_like(w)))
    assert (zero == 0).all()


@widths
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_scales_are_stored_before_a_code_is_chosen(bits: int, symmetric: bool, weighted: bool) -> None:
    w = hard(12, 64)
    grids = parse(f"int{bits}-g16{'-sym' if symmetric else ''}").fit(w, torch.linspace(0, 1, 64) if weighted else None)
    assert isinstance(grids, AffineGrids)
    assert torch.equal(grids.scale.half().float(), grids.scale)
    assert torch.isfinite(grids.scale).all()
    assert (grids.scale != 0).all()
    assert torch.equal(grids.zero.round().clamp(0, 2**bits - 1), grids.zero)


@widths
def test_the_error_is_at_most_half_a_step_inside_the_range(bits: int) -> None:
    w = ordinary(8, 128)
    grids = parse(f"int{bits}-g32").fit(w)
    assert isinstance(grids, AffineGrids)
    steps = (grids.decode(grids.encode(w)) - w).abs() / grids.scale.repeat_interleave(32, 1)
    # At the ends, the scale's rounding to fp16 (2^-11) and the zero point's to an integer add to it.
    assert float(steps.max()) <= 1.0 + 2**bits * 2**-11
    assert float(steps.mean()) < 0.3


def check_range(bits: int) -> None:
    """A plain fit uses every code, from the first to the last."""
    w = ordinary(64, 256)
    for scheme in (parse(f"int{bits}-g16"), parse(f"int{bits}-g16-sym")):
        codes = scheme.fit(w).encode(w)
        assert codes.unique().tolist() == list(range(2**bits))


@widths
def test_range(bits: int) -> None:
    check_range(bits)


def test_a_longer_tail_gets_the_side_with_one_code_more() -> None:
    w = torch.tensor([[1.0, -4.0, 3.0, 2.0] * 4])
    for sign in (1, -1):
        grids = parse("int3-g16-sym").fit(sign * w, torch.ones(16))
        assert torch.equal(grids.decode(grids.encode(sign * w)), sign * w)


def test_ties_go_to_even() -> None:
    grids = AffineGrids(4, 4, torch.ones(1, 1), torch.full((1, 1), 8.0))
    assert grids.encode(torch.tensor([[0.5, 1.5, -0.5, -2.5]])).tolist() == [[8, 10, 8, 6]]


def check_refit(spec: str) -> None:
    """The scale of the last group is the best one for all the others as they now are, to half a unit of fp16."""
    w, hessian = ordinary(16, 64), stats_of(inputs(200, 64)).hessian
    scheme = parse(spec)
    grids = scheme.fit(w)
    codes = grids.encode(w)
    again = scheme.refit(w, codes, grids, hessian)
    assert isinstance(again, AffineGrids)
    offsets = torch.zeros_like(w).double()
    offsets[:, -16:] = codes[:, -16:].double() - again.zero[:, -1:]
    pull = (w - again.decode(codes)).double() @ hessian.double()
    step = (pull * offsets).sum(1) / ((offsets @ hessian.double()) * offsets).sum(1)
    assert (step.abs() <= 1.01 * 2.0**-11 * again.scale[:, -1].abs()).all()


@pytest.mark.parametrize("spec", ["int4-g16", "int3-g16-sym"])
def test_refit(spec: str) -> None:
    check_refit(spec)


@pytest.mark.parametrize("spec", ["int4-g32-sym-bf16", "int4-g32-bf16", "int8-row-sym-bf16"])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 6e4])
def test_bf16_scales_are_exact_in_both_16_bit_types(spec: str, size: float) -> None:
    w, importance = ordinary(16, 64), torch.linspace(0.1, 1, 64)
    w *= size / w.abs().max()
    scheme, hessian = parse(spec), stats_of(inputs(200, 64)).hessian
    grids = scheme.fit(w, importance)
    for fitted in (scheme.fit(w), grids, scheme.refit(w, grids.encode(w), grids, hessian)):
        scale = scheme.pack(fitted.encode(w), fitted)["scale"]
        assert scale.dtype == torch.float16
        assert torch.equal(scale.bfloat16().half(), scale)
        assert isinstance(fitted, AffineGrids)
        assert torch.equal(fitted.scale.bfloat16().float(), fitted.scale)
        assert float(scale.abs().min()) >= 2.0**-17


@pytest.mark.parametrize("symmetric", [True, False])
def test_refit_leaves_what_has_no_curvature(symmetric: bool) -> None:
    scheme = parse(f"int4-g16{'-sym' if symmetric else ''}")
    w = ordinary(4, 48)
    grids = scheme.fit(w)
    hessian = torch.zeros(48, 48)
    hessian[:16, :16] = torch.eye(16)
    again = scheme.refit(w, grids.encode(w), grids, hessian)
    assert isinstance(grids, AffineGrids)
    assert isinstance(again, AffineGrids)
    assert torch.equal(again.scale[:, 1:], grids.scale[:, 1:])
    assert not torch.equal(again.scale[:, :1], grids.scale[:, :1])
    assert torch.equal(again.scale.half().float(), again.scale)


@pytest.mark.parametrize("spec", ["int4-g32", "int4-g32-sym", "int3-row-sym"])
@pytest.mark.parametrize("at_once", [1 << 26, 3 * 48 * 64])
def test_candidates_tried_together_give_the_same_scales(
    spec: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    w, importance = torch.randn(48, 64, generator=generator), torch.rand(64, generator=generator)
    w[3, :32] = 0
    one_by_one = parse(spec).fit(w, importance)
    monkeypatch.setattr(affine, "_AT_ONCE", {"cpu": at_once})
    together = parse(spec).fit(w, importance)
    assert isinstance(one_by_one, AffineGrids)
    assert isinstance(together, AffineGrids)
    assert torch.equal(together.scale, one_by_one.scale)
    assert torch.equal(together.zero, one_by_one.zero)


def check_joint_search(bits: int) -> None:
    """Scale and zero point are together nearly the best of all zero points with 200 scales each."""
    w, h = ordinary(24, 128, seed=5) + 0.01, torch.rand(128, generator=torch.Generator().manual_seed(4)) + 0.1

    def error(grids: AffineGrids) -> torch.Tensor:
        missed: torch.Tensor = ((grids.decode(grids.encode(w)) - w).double().square() * h).unflatten(1, (-1, 32))
        return missed.sum(2)

    groups = w.unflatten(1, (-1, 32))
    span = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
    best = torch.full(span.shape, torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.25, 1.25, 200).tolist():
        scale = (span * share / (2**bits - 1)).half().float()
        for zero in range(2**bits):
            best = torch.minimum(best, error(AffineGrids(bits, 32, scale, torch.full_like(scale, zero))))
    found = parse(f"int{bits}-g32").fit(w, h)
    assert isinstance(found, AffineGrids)
    assert float(error(found).sum()) < 1.01 * float(best.sum())


@pytest.mark.parametrize("bits", [2, 3])
def test_scale_and_zero_point_are_searched_together(bits: int) -> None:
    check_joint_search(bits)
