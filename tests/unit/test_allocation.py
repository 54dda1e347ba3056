"""The allocation stays within its budget, and is at most one unit's step from the least loss that brute force finds."""

from __future__ import annotations

import itertools
import random
from fnmatch import fnmatchcase

import pytest

from fewbit.plans.allocation import Option, Unit, allocate, largest, planned, smallest
from fewbit.plans.plan import Plan, Rule


def instance(seed: int) -> list[Unit]:
    """Units of random sizes whose losses mostly fall with the bytes, as measured ones do."""
    draw = random.Random(seed)
    units = []
    for number in range(draw.randint(1, 5)):
        weights, scale = draw.randint(1, 40), draw.random()
        widths = sorted(draw.sample([2, 3, 4, 5, 6, 8], draw.randint(1, 4)))
        options = [Option(str(b), weights * b, scale * weights * 4.0**-b * draw.uniform(0.4, 1.6)) for b in widths]
        units.append(Unit(str(number), tuple(options)))
    return units


def least(units: list[Unit], budget: int) -> float:
    choices = itertools.product(*(unit.options for unit in units))
    return min(sum(o.loss for o in each) for each in choices if sum(o.nbytes for o in each) <= budget)


def slack(units: list[Unit]) -> float:
    """The most that one step of a hull can gain."""
    gains = [a.loss - b.loss for unit in units for a, b in itertools.pairwise(unit.hull)]
    return max(gains, default=0.0)


@pytest.mark.parametrize("seed", range(200))
def test_the_choice_is_within_a_step_of_brute_force(seed: int) -> None:
    units = instance(seed)
    low, high = smallest(units), sum(max(o.nbytes for o in unit.options) for unit in units)
    for budget in {low, high, *random.Random(seed).choices(range(low, high + 1), k=6)}:
        chosen = allocate(units, budget)
        assert sum(option.nbytes for option in chosen) <= budget
        assert all(option in unit.options for option, unit in zip(chosen, units, strict=True))
        found, best = sum(option.loss for option in chosen), least(units, budget)
        assert best - 1e-12 <= found <= best + slack(units) + 1e-12
        if budget >= largest(units):
            assert found == pytest.approx(best, abs=1e-12)


def test_a_budget_below_the_smallest_is_an_error() -> None:
    units = instance(3)
    with pytest.raises(ValueError, match=f"smallest size, {smallest(units)}"):
        allocate(units, smallest(units) - 1)


def test_an_option_that_costs_more_and_loses_more_is_left_out() -> None:
    unit = Unit("a", (Option("3", 3, 2.0), Option("4", 4, 3.0), Option("5", 5, 1.0)))
    assert [option.scheme for option in unit.hull] == ["3", "5"]


def schemes_by(plan: Plan, modules: list[str]) -> dict[str, str | None]:
    rules = {module: next((r for r in plan.rules if fnmatchcase(module, r.match)), None) for module in modules}
    return {module: None if rule is None else rule.scheme for module, rule in rules.items()}


def test_a_plan_gives_each_module_its_scheme() -> None:
    base = Plan("base", "gptq", (Rule("*.down", "int4-g64", "awq"), Rule("*", "int4-g64", "gptq", {"damp": "0.1"})))
    schemes = {f"m.{i}.{leaf}": "int4-g64" for i in range(12) for leaf in ("up", "down")}
    schemes |= {"m.3.up": "int8-g64", "m.11.down": "int3-g64", "head": "int8-g64"}
    others = ["m.0.gate", "m.2.up.inner.up"]
    made = planned(base, schemes, others)
    assert schemes_by(made, [*schemes, *others]) == {**schemes, **dict.fromkeys(others)}
    assert len(made.rules) == 6
    methods = {rule.match: (rule.method, rule.options) for rule in made.rules}
    assert methods["m.*.up"] == ("gptq", {"damp": "0.1"})
    assert methods["m.11.down"] == ("awq", {})
    assert Plan.from_json(made.to_json()) == made
