"""GPTQ is its definition: quantize a column, solve the least-squares problem for those that remain, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.methods import gptq
from fewbit.methods.base import Method, make
from fewbit.methods.gptq import GPTQ, inverse_factor, remaining_importance
from fewbit.schemes.base import ALL, Columns, Grids, QTensor, parse
from fewbit.stats import Need, Stats
from tests.contract.cases import inputs, ordinary, stats_of

PLAIN = GPTQ(clip_search=False, refine=0)


@dataclass
class Watched(Grids):
    """Grids that remember what they were asked to encode, column by column."""

    grids: Grids
    seen: dict[int, Tensor] = field(default_factory=dict)

    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        assert isinstance(columns, int)
        self.seen[columns] = w.clone()
        return self.grids.encode(w, columns)

    def decode(self, codes: Tensor, columns: Columns = ALL) -> Tensor:
        return self.grids.decode(codes, columns)


class Told(Stats):
    """Stats that claim any Hessian."""

    def __init__(self, hessian: Tensor) -> None:
        super().__init__(len(hessian), Need.HESSIAN)
        self._hessian, self.rows = hessian, 1


def by_definition(w: Tensor, grids: Grids, damped: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K], and what each column had become when it was rounded, with nothing but solved linear systems.

    With the columns S done, those that remain, F, take the values that minimize tr(E H Eᵀ) given E_S:
    ŵ_F = w_F + E_S H_SF (H_FF)⁻¹.
    """
    codes, asked, error = torch.zeros_like(w, dtype=torch.uint8), w.clone(), torch.zeros_like(w)
    for done in range(w.shape[1]):
        column, remaining, before = int(order[done]), order[done:], order[:done]
        shift = torch.linalg.solve(damped[remaining][:, remaining], damped[remaining][:, before] @ error[:, before].T)
        asked[:, column] = w[:, column] + shift[0]
        codes[:, column] = grids.encode(asked)[:, column]
        error[:, column] = (w - grids.decode(codes))[:, column]
    return codes, asked


def symmetric(hessian: Tensor) -> Tensor:
    """To the last bit, so that an oracle that reads all of it and a factorization that reads half see the same."""
    return hessian.tril() + hessian.tril(-1).T


def damped(hessian: Tensor, share: float) -> Tensor:
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def check_definition(spec: str, k: int, act_order: bool, n: int = 6) -> None:
    """Same codes as the definition, and the same values on the way there."""
    w = ordinary(n, k, seed=k, dtype=torch.float64)
    stats = Told(symmetric(stats_of(inputs(4 * k, k)).hessian))
    hessian = stats.hessian.double()
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(k)
    grids = parse(spec).fit(w)
    codes, asked = by_definition(w, grids, damped(hessian, 0.01), order)
    inverse, _ = gptq.inverse_factor(hessian, order, 0.01)
    assert inverse is not None
    watched = Watched(grids)
    assert torch.equal(gptq.feed_back(w, watched, inverse, order)[0], codes)
    assert list(watched.seen) == order.tolist()
    for column, seen in watched.seen.items():
        assert torch.allclose(seen, asked[:, column], rtol=0, atol=1e-9 * float(w.abs().max()))
    weight = GPTQ(act_order=act_order, clip_search=False, refine=0).quantize(w, parse(spec), stats).weight
    assert torch.equal(weight.dequantize(torch.float64), grids.decode(codes).float().double())


def check_factor(k: int, act_order: bool) -> None:
    """Turned by half a turn it is U, upper triangular, with UᵀU the inverse of the damped and permuted Hessian."""
    hessian = symmetric(stats_of(inputs(4 * k, k)).hessian).double()
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(k)
    inverse, damp = gptq.inverse_factor(hessian, order, 0.01)
    assert inverse is not None
    assert damp == 0.01
    factor = inverse.flip(0, 1)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    one = factor.T @ factor @ damped(hessian, 0.01)[order][:, order]
    assert (one - torch.eye(k)).abs().max() < 1e-9


def check_refinement(spec: str, k: int, act_order: bool) -> None:
    """Neither half of a sweep, nor a sweep, raises tr(E H Eᵀ)."""
    w, hessian = ordinary(12, k), stats_of(inputs(2 * k, k)).hessian
    scheme = parse(spec)
    order = gptq.in_order(hessian.diagonal(), scheme.run) if act_order else torch.arange(k)
    grids = scheme.fit(w, hessian.diagonal())

    def rows(codes: Tensor, grids: Grids) -> Tensor:
        error = (grids.decode(codes) - w).double()
        return ((error @ hessian.double()) * error).sum(1)

    codes = grids.encode(w)
    before = rows(codes, grids)
    for _ in range(3):
        grids = scheme.refit(w, codes, grids, hessian)
        refitted = rows(codes, grids)
        assert (refitted <= before * (1 + 1e-5)).all()
        codes, grids = gptq.descend(w, codes, grids, hessian, order, run=scheme.run)
        before, after = refitted, rows(codes, grids)
        assert (after <= before * (1 + 1e-5)).all()
        before = after


def check_gain(spec: str, k: int, act_order: bool) -> None:
    """Well under the error of rounding to nearest on correlated inputs: a mis-indexed GPTQ reaches 0.75."""
    w, x = ordinary(32, k), inputs(4 * k, k)
    nearest = Method().quantize(w, parse(spec), None).weight
    method = GPTQ(act_order=act_order, clip_search=False, refine=0)
    assert error(method.quantize(w, parse(spec), stats_of(x)).weight, w, x) < 0.6 * error(nearest, w, x)


def error(weight: QTensor, w: Tensor, x: Tensor) -> float:
    return float(((weight.dequantize() - w).double() @ x.double().T).square().mean())


def output(method: GPTQ, spec: str, k: int = 64) -> float:
    w, x = ordinary(32, k), inputs(4 * k, k)
    return error(method.quantize(w, parse(spec), stats_of(x)).weight, w, x)


schemes = pytest.mark.parametrize("spec", ["int4-g16", "int4-g16-sym", "int3-g16-sym", "int2-g16", "int8-row"])
orders = pytest.mark.parametrize("act_order", [True, False])


@schemes
@orders
@pytest.mark.parametrize("k", [32, 48])
def test_it_is_its_definition(spec: str, act_order: bool, k: int) -> None:
    check_definition(spec, k, act_order)


@orders
@pytest.mark.parametrize(("spec", "k"), [("int3-g16", 160), ("int4-g32-sym", 160), ("int4-row", 131)])
def test_it_is_its_definition_across_blocks(spec: str, k: int, act_order: bool) -> None:
    check_definition(spec, k, act_order, n=3)


@orders
@pytest.mark.parametrize("k", [40, 600])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(k: int, act_order: bool) -> None:
    check_factor(k, act_order)


@schemes
@orders
def test_no_refinement_raises_the_error(spec: str, act_order: bool) -> None:
    check_refinement(spec, 48, act_order)
    check_refinement("int3-g16", 160, act_order)


@pytest.mark.parametrize("spec", ["int4-g16-sym", "int3-g32", "int2-g16"])
def test_each_option_lowers_the_error(spec: str) -> None:
    plain, more = output(PLAIN, spec), output(GPTQ(clip_search=False, refine=1), spec)
    assert more < 0.97 * plain
    assert output(GPTQ(clip_search=False, refine=3), spec) <= more
    assert output(GPTQ(), spec) < 0.97 * plain


@orders
@pytest.mark.parametrize("spec", ["int4-g16-sym", "int4-g32", "int3-g16-sym", "int8-g16"])
def test_it_is_far_better_than_rounding_to_nearest(spec: str, act_order: bool) -> None:
    check_gain(spec, 64, act_order)
    check_gain(spec, 192, act_order)


def test_the_damping_climbs_and_says_so() -> None:
    x = inputs(10, 64)
    choice = GPTQ(damp=1e-12, refine=0).quantize(ordinary(8, 64), parse("int4-g16"), stats_of(x))
    assert any("raised from 1e-12 to 0.01" in note for note in choice.notes)
    nearest = Method().quantize(ordinary(8, 64), parse("int4-g16"), None).weight
    assert error(choice.weight, ordinary(8, 64), x) < error(nearest, ordinary(8, 64), x)


def test_the_damping_that_was_asked_for_is_used_in_silence() -> None:
    stats = stats_of(inputs(300, 64))
    assert GPTQ(damp=0.05).quantize(ordinary(8, 64), parse("int4-g16"), stats).notes == []
    assert gptq.inverse_factor(stats.hessian, torch.arange(64), 0.05)[1] == 0.05


@pytest.mark.parametrize("kind", ["negative", "indefinite", "infinite"])
def test_a_hopeless_hessian_means_rounding_to_nearest_and_a_note(kind: str) -> None:
    hessian = torch.eye(32)
    if kind == "negative":
        hessian *= -1
    elif kind == "indefinite":
        hessian += 100 * (1 - torch.eye(32))
    else:
        hessian[3, 3] = torch.inf
    w = ordinary(8, 32)
    choice = PLAIN.quantize(w, parse("int4-g16"), Told(hessian))
    assert any("rounded to nearest" in note for note in choice.notes)
    assert torch.equal(choice.weight.dequantize(), Method().quantize(w, parse("int4-g16"), None).weight.dequantize())


@orders
@pytest.mark.parametrize("refine", [0, 2])
def test_columns_without_input_are_rounded_and_counted(act_order: bool, refine: int) -> None:
    x, w = inputs(200, 64), ordinary(8, 64)
    dead = torch.arange(0, 64, 5)
    x[:, dead] = 0
    method = GPTQ(act_order=act_order, clip_search=False, refine=refine)
    choice = method.quantize(w, parse("int4-g16"), stats_of(x))
    assert choice.notes == [f"{len(dead)} input columns were always 0 during calibration"]
    scheme = parse("int4-g16")
    codes, grids = scheme.unpack(choice.weight.parts, (8, 64))
    assert torch.equal(codes[:, dead], grids.encode(w)[:, dead])


def test_no_input_at_all_is_rounding_to_nearest() -> None:
    w = ordinary(8, 32)
    choice = GPTQ(clip_search=False).quantize(w, parse("int4-g16"), stats_of(torch.zeros(4, 32)))
    assert choice.notes == ["32 input columns were always 0 during calibration"]
    assert torch.equal(choice.weight.dequantize(), Method().quantize(w, parse("int4-g16"), None).weight.dequantize())


def test_options_are_read_from_text() -> None:
    method = make("gptq", {"damp": "0.05", "act_order": "no", "clip_search": "TRUE", "refine": "0"})
    assert method == GPTQ(damp=0.05, act_order=False, clip_search=True, refine=0)
    assert make("gptq") == GPTQ()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"damp": "much"}, "`damp`: 'much'"),
        ({"damp": ""}, "`damp`: ''"),
        ({"refine": "2.5"}, "`refine`: '2.5'"),
        ({"act_order": "maybe"}, "`act_order`: 'maybe'"),
        ({"act-order": "true"}, "act_order"),
        ({"dmp": "0.1"}, "Did you mean damp"),
        # A share of the diagonal and a number of sweeps are neither negative nor endless.
        ({"damp": "-0.1"}, "`damp`: '-0.1'"),
        ({"damp": "nan"}, "`damp`: 'nan'"),
        ({"damp": "inf"}, "`damp`: 'inf'"),
        ({"refine": "-1"}, "`refine`: '-1'"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, str], told: str) -> None:
    with pytest.raises(PlanError) as raised:
        make("gptq", options)
    assert told in str(raised.value)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(PlanError, match="gptq"):
        make("gptg")
    with pytest.raises(PlanError, match="it has none"):
        make("rtn", {"damp": "0.1"})


def test_importance_is_the_cost_of_an_error_after_feedback() -> None:
    measured = stats_of(inputs(300, 40)).hessian.double()
    hessian = (measured + measured.T) / 2  # sums in float32 are symmetric on some processors only
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    inverse, damp = inverse_factor(hessian, order, 0.01)
    assert inverse is not None
    ridge = damp * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    direct = 1 / torch.linalg.inv(hessian + ridge).diagonal()
    torch.testing.assert_close(remaining_importance(inverse, order), direct)
