"""GPTQ chooses the sub-scales of k-quants together with the codes: the definition, in float64, a group at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from fewbit.methods import gptq
from fewbit.methods.gptq import GPTQ, in_order
from fewbit.schemes.base import parse
from fewbit.schemes.ggml.grids import BlockGrids
from fewbit.schemes.ggml.layout import LAYOUTS, Layout
from tests.contract.cases import inputs, ordinary, stats_of

SEARCHED = [name for name, kind in LAYOUTS.items() if kind.super and not kind.nonlinear]
names = pytest.mark.parametrize("name", SEARCHED)
Found = tuple[Tensor, int, int]  # values of a group, its sub-scale and its m


def nearest(layout: Layout, x: float, scale: float, offset: float) -> float:
    level = round((x + offset) / scale) if scale else 0
    found: float = scale * max(-layout.zero, min(2**layout.bits - 1 - layout.zero, level)) - offset
    return found


def best(grids: BlockGrids, group: int, w: Tensor, metric: Tensor, reach: int = 6) -> Found:
    """The values of row 0 for w [columns] with the least (w - q) M (w - q)ᵀ, of all sub-scales within reach.

    reach: how many steps sc and m may change together.

    For each of them the columns are rounded one by one, each where those before it have moved the best value to.
    """
    kind = LAYOUTS[grids.name]
    block, least, found = group * kind.sub // kind.columns, torch.inf, None
    assert grids.sc is not None
    sc, m = int(grids.sc[0, group]), 0 if grids.m is None else int(grids.m[0, group])
    near = product(range(-2, 3), range(-4, 5)) if kind.m else product(range(-4, 5), [0])
    for by in near:
        if abs(by[0]) + abs(by[1]) > reach:
            continue
        here = max(kind.sc[0], min(kind.sc[1], sc + by[0])), max(0, min(kind.m, m + by[1]))
        scale = float(grids.d[0, block]) * here[0]
        offset = 0.0 if grids.dmin is None else float(grids.dmin[0, block]) * here[1]
        missed = torch.zeros_like(w)
        for i in range(len(w)):
            rest = metric[i:, i:]
            shift = torch.linalg.solve(rest, metric[i:, :i] @ missed[:i])[0]
            missed[i] = w[i] - nearest(kind, float(w[i] + shift), scale, offset)
        cost = float(missed @ metric @ missed)
        if found is None or cost < least * (1 - 1e-12):
            least, found = cost, (w - missed, *here)
    assert found is not None
    return found


def problem(name: str, n: int, small: float = 1.0) -> tuple[Tensor, Tensor, BlockGrids, Tensor]:
    """small: a factor of the weights of every other group, in which half of the weights are 0."""
    k = 2 * LAYOUTS[name].columns if name == "q3_k" else LAYOUTS[name].columns
    w = ordinary(n, k, seed=5, dtype=torch.float64)
    if small != 1:
        groups = w.view(n, -1, LAYOUTS[name].run)
        groups[:, ::2] *= small
        groups[:, ::2, ::2] = 0
    hessian = stats_of(inputs(3 * k, k)).hessian.double()
    hessian = hessian.tril() + hessian.tril(-1).T
    grids = parse(name).fit(w)
    assert isinstance(grids, BlockGrids)
    return w, hessian, grids, in_order(hessian.diagonal(), grids.run)


def check_pass(name: str) -> None:
    """Each group under the cost of its error after the groups that remain have adapted."""
    w, hessian, grids, order = problem(name, 1)
    inverse, damp = gptq.inverse_factor(hessian, order, 0.01)
    assert inverse is not None
    codes, chosen = gptq.feed_back(w, grids, inverse, order)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    values, run = torch.zeros_like(w[0]), grids.run
    for done in range(0, len(order), run):
        before, left, columns = order[:done], order[done:], order[done : done + run]
        group, error = int(columns[0]) // run, (w[0] - values)[before]
        shift = torch.linalg.solve(damped[left][:, left], damped[left][:, before] @ error)[:run]
        metric = torch.linalg.inv(torch.linalg.inv(damped[left][:, left])[:run, :run])
        values[columns], sc, m = best(grids, group, w[0, columns] + shift, metric)
        check_group(chosen, group, sc, m)
    torch.testing.assert_close(chosen.decode(codes)[0], values, rtol=0, atol=1e-9 * float(w.abs().max()))


def check_group(chosen: object, group: int, sc: int, m: int) -> None:
    assert isinstance(chosen, BlockGrids)
    assert chosen.sc is not None
    assert int(chosen.sc[0, group]) == sc
    assert chosen.m is None or int(chosen.m[0, group]) == m


def check_descent(name: str) -> None:
    """Each group under the cost while all others stay; the last codes and scales stay where that is not better."""
    w, hessian, grids, order = problem(name, 1)
    start = grids.encode(w)
    codes, chosen = gptq.descend(w, start, grids, hessian, order, 0.1, run=grids.run)
    damped = hessian + 0.1 * torch.eye(len(hessian), dtype=torch.float64)
    values, run, moved = grids.decode(start)[0], grids.run, 0
    for done in range(0, len(order), run):
        columns = order[done : done + run]
        group, metric = int(columns[0]) // run, damped[columns][:, columns]
        error = w[0] - values
        target = values[columns] + torch.linalg.solve(metric, damped[columns] @ error)
        found, sc, m = best(grids, group, target, metric, 2 if LAYOUTS[name].m else 6)
        was, now = target - values[columns], target - found
        if now @ metric @ now < was @ metric @ was:
            values[columns], moved = found, moved + 1
            check_group(chosen, group, sc, m)
    assert moved > 4
    torch.testing.assert_close(chosen.decode(codes)[0], values, rtol=0, atol=1e-5 * float(w.abs().max()))


@names
def test_the_pass_is_its_definition(name: str) -> None:
    check_pass(name)


@names
def test_scales_of_zero_are_among_the_choices(name: str) -> None:
    """Small groups have zeros, and no error before the first: 0 / 0 must not be taken for the best."""
    w, hessian, grids, order = problem(name, 1, 1e-3)
    order = torch.arange(len(order), dtype=torch.int64)
    inverse, _ = gptq.inverse_factor(hessian, order, 0.01)
    assert inverse is not None
    codes, chosen = gptq.feed_back(w, grids, inverse, order)
    assert (chosen.decode(codes) - w).norm() <= 0.5 * w.norm()


@names
def test_the_descent_is_its_definition(name: str) -> None:
    check_descent(name)


def test_types_in_other_groups_have_an_order_of_their_own() -> None:
    w, stats = ordinary(8, 256), stats_of(inputs(400, 256))
    schemes = [parse(name) for name in ("q4_k", "q6_k", "iq4_xs")]
    for choice, scheme in zip(GPTQ().quantize_alike([w, w, w], schemes, stats), schemes, strict=True):
        assert torch.equal(choice.weight.parts["blocks"], GPTQ().quantize(w, scheme, stats).weight.parts["blocks"])


@names
def test_the_choice_of_sub_scales_lowers_the_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside columns one by one, on sub-scales that only a refit changes."""
    w, x = ordinary(64, 256), inputs(600, 256)
    stats, errors = stats_of(x := x / x.std(0)), []
    for run in (LAYOUTS[name].run, 1):
        monkeypatch.setattr(type(parse(name)), "run", run)
        monkeypatch.setattr(BlockGrids, "run", run)
        weight = GPTQ().quantize(w, parse(name), stats).weight
        errors.append(float(((weight.dequantize() - w) @ x.T).square().mean()))
    assert errors[0] < 0.97 * errors[1], errors
