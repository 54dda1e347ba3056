"""Chooses the width of each weight so that a file has the size that was asked for, at the least loss.

Each unit, of weights that get one scheme, has options of so many bytes and so much loss. The sum of losses is to be
least, with the sum of bytes within a budget. For a price λ of a byte, the best choice for a unit is the option of least
loss + λ bytes. As λ falls, each unit moves along the lower convex hull of its options. So the choices for all λ are
found at once: take the steps of all hulls in the order of their gain per byte (Lagrangian relaxation; Everett 1963).

The step that no longer fits leaves some bytes. They are filled greedily: the change of one unit that gains the most
among those that fit, until none does. So the loss is above the least possible by less than the gain of that one step.

>>> a = Unit("a", (Option("2", 2, 9.0), Option("4", 4, 1.0)))
>>> b = Unit("b", (Option("2", 2, 3.0), Option("4", 4, 2.0)))
>>> [option.scheme for option in allocate([a, b], 6)]
['4', '2']
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from fewbit.plans.plan import Plan, Rule
from fewbit.plans.rules import deciding


@dataclass(frozen=True)
class Option:
    """A scheme for a unit, its bytes and its loss."""

    scheme: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Unit:
    """Weights that get one scheme."""

    name: str
    options: tuple[Option, ...]

    @property
    def hull(self) -> tuple[Option, ...]:
        """The options on the lower convex hull, from the fewest bytes to the least loss."""
        found: list[Option] = []
        for option in sorted(self.options, key=lambda each: (each.nbytes, each.loss)):
            if found and option.loss >= found[-1].loss:
                continue
            while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-2], option):
                found.pop()
            found.append(option)
        return tuple(found)


def _gain(small: Option, large: Option) -> float:
    """The loss that each further byte saves."""
    return (small.loss - large.loss) / (large.nbytes - small.nbytes)


def smallest(units: Iterable[Unit]) -> int:
    """The fewest bytes that all units together can have."""
    return sum(min(option.nbytes for option in unit.options) for unit in units)


def largest(units: Iterable[Unit]) -> int:
    """The bytes beyond which nothing is gained."""
    return sum(unit.hull[-1].nbytes for unit in units)


def allocate(units: Sequence[Unit], budget: int) -> list[Option]:
    """The option of each unit. ValueError if the budget is below `smallest`."""
    chosen = [unit.hull[0] for unit in units]
    left = budget - sum(option.nbytes for option in chosen)
    if left < 0:
        raise ValueError(f"{budget} bytes are below the smallest size, {smallest(units)}")
    for number, option in _steps(units):
        if (more := option.nbytes - chosen[number].nbytes) > left:
            break
        chosen[number], left = option, left - more
    return _filled(units, chosen, left)


def _steps(units: Sequence[Unit]) -> list[tuple[int, Option]]:
    """(number of a unit, its next option) of all steps, the one that saves the most per byte first."""
    steps = [
        (_gain(small, large), number, large)
        for number, unit in enumerate(units)
        for small, large in zip(unit.hull, unit.hull[1:], strict=False)
    ]
    # The gains of one unit fall along its hull, so its steps stay in order; `sort` keeps equal ones in order too.
    return [(number, option) for _, number, option in sorted(steps, key=lambda step: -step[0])]


def _filled(units: Sequence[Unit], chosen: list[Option], left: int) -> list[Option]:
    """`chosen` with changes of single units that use the `left` bytes, the one that saves the most first."""
    while True:
        best: tuple[float, int, Option] | None = None
        for number, unit in enumerate(units):
            for option in unit.options:
                saved = chosen[number].loss - option.loss
                if option.nbytes - chosen[number].nbytes <= left and saved > (best[0] if best else 0.0):
                    best = (saved, number, option)
        if best is None:
            return chosen
        _, number, option = best
        left -= option.nbytes - chosen[number].nbytes
        chosen[number] = option


def planned(plan: Plan, schemes: Mapping[str, str], others: Sequence[str], head: str = "") -> Plan:
    """A plan that gives each module its scheme, by the method of the rule of `plan` that decides on it.

    others: modules that stay as they are. head: as in `rules.deciding`. Modules that differ in numbers alone share a
    rule for the scheme that most of them have; the others have rules of their own, before it.
    """
    first = deciding(plan.rules, [*schemes, *others], head)
    own: dict[str, tuple[int, str]] = {module: (first[module], scheme) for module, scheme in schemes.items()}
    families: dict[str, Counter[tuple[int, str]]] = {}
    for module, kind in own.items():
        families.setdefault(_family(module), Counter())[kind] += 1
    shared = [(family, counts.most_common(1)[0][0]) for family, counts in families.items()]
    rules = []
    for module in (*others, *own):
        found = next((kind for family, kind in shared if fnmatchcase(module, family)), None)
        if found != own.get(module):
            rules.append((module, own.get(module)))
    return replace(plan, rules=tuple(_rule(plan, match, kind) for match, kind in (*rules, *shared)), adapt=False)


def _rule(plan: Plan, match: str, kind: tuple[int, str] | None) -> Rule:
    """A rule with this pattern. kind: the number of the rule of `plan` that has its method, and its scheme."""
    return Rule(match, None) if kind is None else replace(plan.rules[kind[0]], match=match, scheme=kind[1])


def _family(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", module)
