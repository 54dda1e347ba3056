"""The plan that fills a memory with the least loss, if each weight has the width that `quantize --fit` chooses for it.

What weights, cache and activations take is counted as `quantize --fit` counts it. The loss to expect comes from plans
that were measured. A file may have the types of one plan in some weights and those of another in the rest, so its loss
is at most about on the line between the two points (bits, loss). Types that were chosen for a size are points too.

>>> round(expected(4.0, [(3.0, 0.3), (5.0, 0.1), (4.5, 0.4)]), 3)
0.2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from fewbit.advise import memory
from fewbit.errors import PlanError
from fewbit.methods.base import name_of
from fewbit.models.outline import Outline, geometry
from fewbit.pipeline.budgeted import Choice
from fewbit.pipeline.settled import Settled
from fewbit.plans.budget import Allocation, Budget
from fewbit.plans.plan import Assignment, Plan

Points = Sequence[tuple[float, float]]  # bits of a quantized weight, KL divergence in nats per token


@dataclass(frozen=True)
class Fitted:
    """A plan whose widths are chosen to fill a memory: `bits` of a quantized weight, `weights_bytes` in memory, and
    `total`, which includes the KV cache and activations for `context` tokens.

    kl: the KL divergence to expect; None if nothing similar was measured. basis: where it comes from, "costs" of this
    model's weights, a "report" or a "prior"; "none" if kl is None. schemes: scheme -> number of weights; None before
    costs are measured. quantized: the number of quantized weights.
    """

    plan: str
    format: str
    bits: float
    weights_bytes: int
    total: int
    context: int
    kl: float | None
    basis: str
    schemes: Mapping[str, int] | None = None
    quantized: int = 0

    def chosen(self, found: Allocation) -> Fitted:
        """The same with the widths that costs of this model's weights lead to."""
        more = round((found.bits - self.bits) * self.quantized / 8)
        sized = replace(self, bits=found.bits, weights_bytes=self.weights_bytes + more, total=self.total + more)
        return replace(sized, kl=found.kl, basis="costs", schemes=found.schemes)

    def check(self, max_kl: float) -> None:
        """PlanError if the loss to expect is above `max_kl`, or is not known."""
        if self.kl is None:
            raise PlanError(
                f"the KL divergence of {self.plan} at {self.bits:.3g} bits was not measured",
                "Omit `max_kl`, or give `measure`.",
            )
        if self.kl > max_kl:
            raise PlanError(
                f"nothing that fills `fit` has a KL divergence of {max_kl:g} or less: the nearest is {self.plan} at "
                f"{self.bits:.3g} bits with {self.kl:.3g} ({self.basis})",
                "Allow a larger `max_kl` or more `fit`.",
            )


@dataclass(frozen=True)
class Losses:
    """of: plan -> KL divergence. of_sizes: plan -> point of types that were chosen for a size. basis: see `Fitted`."""

    of: Mapping[str, float]
    of_sizes: Mapping[str, tuple[float, float]]
    basis: str


@dataclass(frozen=True)
class _Option:
    plan: Plan
    choice: Choice

    @property
    def own(self) -> Mapping[str, Assignment]:
        return self.choice.settled.resolved.assignments

    @property
    def bits(self) -> float:
        """The plan's own."""
        return 8 * sum(a.scheme.nbytes(a.shape) for a in self.own.values()) / self.choice.weights

    def of(self, module: str) -> tuple[str, str, tuple[str, ...]] | None:
        """Scheme, method and widths of a weight."""
        if (found := self.own.get(module)) is None:
            return None
        return str(found.scheme), name_of(found.method), tuple(map(str, self.choice.widths[module]))

    def has(self, other: _Option, modules: Sequence[str]) -> bool:
        """Whether the widths of this plan include those that the other plan gives to the weights `modules`."""
        for module in modules:
            own, its = self.of(module), other.of(module)
            if (own is None) != (its is None):
                return False
            if own is not None and its is not None and (own[1] != its[1] or its[0] not in own[2]):
                return False
        return True


def fitted(outline: Outline, plans: Sequence[Plan], limit: int, use: memory.Use, losses: Losses) -> Fitted:
    """The plan that fills `limit` bytes with the least loss to expect; plans with one width are left out.

    PlanError if no plan has several widths, or if none fits.
    """
    g = geometry(outline.config, outline.source.context)
    beside = memory.cache_bytes(g, use) + memory.activation_peak(g, use, packed=True)
    options, errors = list[_Option](), list[PlanError]()
    for plan in plans:
        try:
            options.append(_Option(plan, Choice.to_fit(Settled.of(outline, plan), Budget(fit=limit), beside)))
        except PlanError as error:
            errors.append(error)
    if not options:
        raise errors[-1] if errors else PlanError("none of the requested plans has several widths", "Omit `fit`.")
    # Of weights that no plan tells from one another, one is enough.
    every = {module for option in options for module in option.own}
    modules = list({tuple(option.of(module) for option in options): module for module in sorted(every)}.values())

    def rank(option: _Option) -> tuple[float, int, float]:
        points = list(_points([other for other in options if option.has(other, modules)], losses))
        kl = expected(option.choice.filled, points)
        widths = {scheme for each in option.choice.widths.values() for scheme in each}
        return inf if kl is None else kl, len(widths), abs(option.bits - option.choice.filled)

    (kl, _, _), best = min(((rank(option), option) for option in options), key=lambda pair: pair[0])
    packed = int(best.choice.filled * best.choice.weights / 8)
    return Fitted(
        plan=best.plan.name,
        format=best.choice.settled.resolved.format.name,
        bits=best.choice.filled,
        weights_bytes=best.choice.fixed - beside + packed,
        total=best.choice.fixed + packed,
        context=use.context,
        kl=None if kl == inf else kl,
        basis="none" if kl == inf else losses.basis,
        quantized=best.choice.weights,
    )


def expected(bits: float, points: Points) -> float | None:
    """The loss at so many bits: on the lowest line between two points, the largest point's beyond it.

    None below the smallest point.
    """
    known = [kl for at, kl in points if at <= bits]
    if not known:
        return None
    between = (
        low + (high - low) * (bits - at) / (further - at)
        for at, low in points
        for further, high in points
        if at <= bits < further
    )
    return min([*known, *between])


def _points(options: Sequence[_Option], losses: Losses) -> Iterator[tuple[float, float]]:
    for option in options:
        if (kl := losses.of.get(option.plan.name)) is not None:
            yield option.bits, kl
        if (point := losses.of_sizes.get(option.plan.name)) is not None:
            yield point
