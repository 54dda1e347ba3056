"""AWQ's search on folds made for the purpose, and how methods compose."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.methods.awq import AWQ
from fewbit.methods.base import Composed, Fold, make, name_of
from fewbit.methods.gptq import GPTQ
from fewbit.schemes.base import parse
from fewbit.stats import Need, Stats
from tests.contract.cases import inputs, ordinary, same_bytes, stats_of

SCHEME = parse("int3-g16")


class OneLinear(Fold):
    """A linear alone, whose input can be divided by anything."""

    readers = ("m",)

    def __init__(self, w: Tensor, x: Tensor) -> None:
        self.w, self.x, self.asked = w, x, 0

    def weights(self) -> dict[str, Tensor]:
        return {"m": self.w}

    def mean_abs(self) -> Tensor:
        return self.x.abs().mean(0)

    def error(self, weights: Mapping[str, Tensor]) -> float:
        self.asked += 1
        return float((self.x @ (weights["m"] - self.w).T).square().sum())

    def stats(self, scales: Tensor) -> Stats:
        return stats_of(self.x / scales)

    def stored(self, scales: Tensor) -> Tensor:
        return scales.half().float()


class Spoiled(OneLinear):
    """Any scaling ends in something that is no number."""

    def stored(self, scales: Tensor) -> Tensor:
        return scales * torch.nan


class Contrary(OneLinear):
    """Scaling helps what is rounded to nearest, and harms whatever is asked for after that search."""

    def error(self, weights: Mapping[str, Tensor]) -> float:
        found = super().error(weights)
        return found if self.asked <= 21 else -self.asked


def fold_with_outliers() -> OneLinear:
    x = inputs(200, 64)
    x[:, [3, 40]] *= 30
    return OneLinear(ordinary(16, 64), x)


def rounded(w: Tensor) -> Tensor:
    codes, grids = SCHEME.nearest(w)
    return grids.decode(codes)


def check_search() -> None:
    """The scales found are a stored power of the mean sizes, and the best of all powers of the grid."""
    fold = fold_with_outliers()
    scales = AWQ(grid=10).rewrite(fold, {"m": SCHEME})
    assert scales is not None
    errors = []
    for alpha in range(11):
        power = fold.mean_abs().double() ** (alpha / 10)
        tried = (power / (power.max() * power.min()).sqrt()).float().half().float()
        errors.append((float((fold.x @ (rounded(fold.w * tried) / tried - fold.w).T).square().sum()), tried))
    assert errors[0][0] > 1.5 * min(error for error, _ in errors)
    assert torch.equal(scales, min(errors, key=lambda pair: pair[0])[1])


def test_the_search_is_its_definition() -> None:
    check_search()


def test_no_scaling_is_always_a_candidate() -> None:
    fold = fold_with_outliers()
    assert AWQ().rewrite(Spoiled(fold.w, fold.x), {"m": SCHEME}) is None
    assert AWQ().rewrite(OneLinear(fold.w, fold.x.sign()), {"m": SCHEME}) is None  # all alike: nothing to gain
    assert AWQ().rewrite(OneLinear(fold.w, fold.x * 0), {"m": SCHEME}) is None
    assert AWQ(grid=0).rewrite(fold, {"m": SCHEME}) is None


def test_its_codes_are_the_nearest_on_grids_fitted_to_the_inputs() -> None:
    w, stats = ordinary(8, 64), stats_of(inputs(100, 64), Need.MEAN_SQUARE)
    grids = SCHEME.fit(w, stats.mean_square)
    assert same_bytes(AWQ().quantize(w, SCHEME, stats).weight.parts, SCHEME.pack(grids.encode(w), grids))
    codes, grids = SCHEME.nearest(w)
    assert same_bytes(AWQ(clip_search=False).quantize(w, SCHEME, stats).weight.parts, SCHEME.pack(codes, grids))


def test_methods_compose() -> None:
    both = make("awq+gptq", {"grid": "7", "damp": "0.05", "clip_search": "no"})
    assert both == Composed(AWQ(7, False), GPTQ(damp=0.05, clip_search=False))
    assert name_of(both) == "awq+gptq"
    assert (both.needs, both.rewrites) == (Need.HESSIAN, True)
    assert make("awq+rtn").needs > Need.NOTHING
    w, stats, fold = ordinary(8, 64), stats_of(inputs(100, 64)), fold_with_outliers()
    ours, theirs = both.rewrite(fold, {"m": SCHEME}), AWQ(7).rewrite(fold, {"m": SCHEME})
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)
    contrary = Contrary(fold.w, fold.x)
    assert AWQ().rewrite(contrary, {"m": SCHEME}) is not None
    assert make("awq+gptq").rewrite(Contrary(fold.w, fold.x), {"m": SCHEME}) is None
    alone = GPTQ(damp=0.05, clip_search=False).quantize(w, SCHEME, stats)
    assert same_bytes(both.quantize(w, SCHEME, stats).weight.parts, alone.weight.parts)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("gptq+awq", {}, "'gptq+awq' does not compose"),
        ("rtn+gptq", {}, "does not compose"),
        ("awq+awq", {}, "does not compose"),
        ("awq+awq+gptq", {}, "does not compose"),
        ("awq+gtpq", {}, "unknown method 'gtpq'"),
        ("awq+", {}, "unknown method ''"),
        ("awq+gptq", {"gird": "3"}, "unknown option of method awq+gptq 'gird'"),
        ("awq", {"damp": "0.1"}, "unknown option of method awq 'damp'"),
        ("awq", {"grid": "-1"}, "`grid`: '-1'"),
        ("awq", {"grid": "many"}, "`grid`: 'many'"),
    ],
)
def test_what_does_not_compose_is_refused(name: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(PlanError) as raised:
        make(name, options)
    assert told in str(raised.value)
