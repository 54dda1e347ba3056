"""Recommend a plan for a purpose. Rules, memory and kernels narrow the choice; measurements decide.

Rules are data (rules.json): for each purpose, tiers of plans (the preferred tier first) and the plans that the common
advice names. Within a tier, measurements rank the plans: those of this model if a report of `fewbit compare` is given,
otherwise priors, which are measurements of the embedded model (priors.json). Every answer says which. If numbers
contradict the common advice, the recommendation follows the numbers and says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from math import floor
from pathlib import Path
from typing import Any

import torch

from fewbit.advise.estimate import Estimate, PlanEstimate
from fewbit.advise.fitting import Fitted, Losses
from fewbit.advise.rules import check, rules
from fewbit.brief import brief
from fewbit.errors import PlanError
from fewbit.measure.comparison import Comparison, Timing, leaders
from fewbit.measure.intervals import Interval
from fewbit.names import EMBEDDED
from fewbit.nn.choose import expected
from fewbit.schemes.base import parse
from fewbit.units import size

_SHAPE = (4096, 4096)  # a shape that every kernel supports


_Criterion = tuple[Callable[["Candidate"], Interval | None], bool]  # what is compared, and whether more is better


@dataclass(frozen=True)
class Candidate:
    """A plan and the reasons for its rank. `tier`: 0 is the preferred tier of the purpose. `total`: bytes in use, as
    estimated. `kl` comes from `basis`: "measured", "prior" or "none". `decode`: tokens/s of a report, or as timed on
    this machine; `decode_interval`: its 95 % interval. `kernel`: the best here.

    `excluded`: why the plan is excluded; None if it is not.
    """

    plan: str
    tier: int
    format: str
    bits: float
    weights_bytes: int
    total: int
    kl: Interval | None
    decode: float | None
    basis: str
    kernel: str
    calibrates: bool
    excluded: str | None = None
    decode_interval: Interval | None = None


@dataclass(frozen=True)
class Sized:
    """The best plan with types that `quantize --bits` chooses for each tensor, at no more bytes than the plan takes.

    kl: the KL divergence of the chosen types, kl_of_plan: that of the plan's own, both measured `where`. command: makes
    it.
    """

    bits: float
    kl: Interval
    kl_of_plan: Interval
    where: str
    command: str


@brief
@dataclass(frozen=True)
class Recommendation:
    """The ranked plans (`ranked`, the best first) and the excluded ones. `rule`, `why` and `source`: the common
    advice for the purpose. `ranked_by`: what decided among plans. `contradictions`: where numbers say otherwise.
    `speeds`: where tokens/s come from, or why there are none. `sized`: the best plan with types that are chosen for its
    size; None if that was not measured to lose less. `fitted`: the best plan with widths that fill the memory; None
    unless it is asked for. Only with it, `ranked` may be empty: no plan fits with its own types."""

    model: str
    purpose: str
    target: str | None
    memory: int
    ranked: tuple[Candidate, ...]
    excluded: tuple[Candidate, ...]
    rule: str
    why: str
    source: str
    ranked_by: str
    contradictions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    speeds: str = ""
    sized: Sized | None = None
    fitted: Fitted | None = None

    @property
    def best(self) -> Candidate:
        return self.ranked[0]


@cache
def priors() -> dict[str, Any]:
    """priors.json: `where` it was measured, and plan -> KL divergence with its interval.

    `sizes`: the same for types that were chosen for the size of the plan."""
    return dict(json.loads((Path(__file__).parent / "priors.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Demands:
    """What a plan must meet: `memory` in bytes, the runtime `target` that must read it, the largest KL divergence.

    speed_first: choose the fastest plan that meets them, not the one with the least loss. capability: the compute
    capability of the card that serves; None without one. given: the argument that gave `memory`. fitted: what fills
    the memory with chosen widths; with it, no other plan needs to meet the demands.
    """

    memory: int
    target: str | None = None
    max_kl: float | None = None
    speed_first: bool = False
    capability: tuple[int, int] | None = None
    given: str = "memory"
    fitted: Fitted | None = None


def recommend(
    estimated: Estimate,
    purpose: str,
    demands: Demands,
    *,
    measured: Comparison | None = None,
    timed: Mapping[str, Timing] | None = None,
    device: str = "cpu",
) -> Recommendation:
    """Recommend a plan from an estimate of all plans. PlanError if none meets all demands.

    timed: decoding speed of plans on this machine, from earlier comparisons. Ignored if `measured` is given.
    """
    memory, target, max_kl, speed_first = demands.memory, demands.target, demands.max_kl, demands.speed_first
    timed = timed if timed and measured is None else {}
    check(purpose, target)
    rule = rules()["purposes"][purpose]
    runtime = target or rule.get("target")
    formats = rules()["targets"][runtime]["formats"] if runtime else None
    card = _of_card(purpose, runtime, demands.capability)
    found = [
        _limited(
            _candidate(row, tier, measured, timed, device),
            row,
            memory=memory,
            formats=formats,
            runtime=runtime,
            max_kl=max_kl,
        )
        for tier, plans in enumerate(_tiers(rule, card))
        for row in estimated.plans
        if row.plan in plans
    ]
    allowed = [c for c in found if c.excluded is None]
    excluded = [c for c in found if c.excluded is not None]
    if not allowed and demands.fitted is None:
        raise _nothing(estimated, purpose, excluded, demands, runtime, formats)
    tiers = not (speed_first and max_kl is not None)  # a stated loss is allowed: then the fastest plan is the best
    here = bool(rule.get("kernels")) and runtime in (None, "transformers")
    size_first = speed_first or rule["order"] == "size"

    def group(c: Candidate) -> tuple[Any, ...]:
        # A prior is of another model: it orders plans among themselves, after all that were measured.
        prior = (c.kl is None, measured is not None and c.basis == "prior")
        return c.tier if tiers else 0, here and c.kernel == "reference", *(() if size_first else prior)

    # Losses were measured on the same tokens: their differences are surer than their intervals, so values decide.
    quality: _Criterion = (lambda c: None if c.kl is None else Interval.exact(c.kl.value), False)
    speed: _Criterion = (lambda c: c.decode_interval, True)
    weights: _Criterion = (lambda c: Interval.exact(c.weights_bytes), False)
    order: list[_Criterion] = [speed, weights, quality] if size_first else [quality, speed, weights]
    groups = groupby(sorted(allowed, key=group), key=group)
    ranked = [c for _, members in groups for c in _ordered(list(members), order)]
    done = Recommendation(
        model=estimated.model,
        purpose=purpose,
        target=target,
        memory=memory,
        ranked=tuple(ranked),
        excluded=tuple(excluded),
        rule=rule["says"],
        why=rule["why"],
        source=rule["source"],
        ranked_by=_basis(measured, size_first, rule, here, any(c.decode is not None for c in ranked), estimated.model),
        notes=_of_limit(max_kl, (demands.fitted or ranked[0]).basis),
    )
    if not ranked:
        return done
    return replace(
        done,
        contradictions=tuple(_contradictions(ranked, found, rule, measured)),
        notes=(
            *([card["says"]] if card and ranked[0].plan in card["plans"] else []),
            *_notes(ranked, estimated, purpose, runtime),
            *done.notes,
        ),
        commands=tuple(_commands(ranked, estimated, purpose, runtime, measured, demands.fitted)),
        speeds=_speeds(ranked, measured, estimated.model),
        sized=_sized(ranked[0], estimated),
    )


def fitting_plans(estimated: Estimate, purpose: str, target: str | None) -> list[str]:
    """The plans of a purpose that the model can have and the runtime reads, those of the preferred tiers first.

    PlanError for another purpose or target.
    """
    check(purpose, target)
    rule = rules()["purposes"][purpose]
    runtime = target or rule.get("target")
    formats = rules()["targets"][runtime]["formats"] if runtime else None
    possible = {row.plan: row.format for row in estimated.plans if row.why_not is None}
    tiers = [plan for plans in rule["tiers"] for plan in plans if plan in possible]
    return [plan for plan in tiers if formats is None or possible[plan] in formats]


def losses(estimated: Estimate, measured: Comparison | None) -> Losses:
    """The losses of all plans: those of a report, or else the priors."""
    basis = "prior" if measured is None else "measured"
    every = [_candidate(row, 0, measured, {}, "cpu") for row in estimated.plans]
    of = {c.plan: c.kl.value for c in every if c.kl is not None and c.basis == basis}
    sizes = priors()["sizes"]["plans"] if measured is None else {}
    return Losses(
        of,
        {plan: (found["bits"], found["kl"]) for plan, found in sizes.items()},
        "prior" if measured is None else "report",
    )


def _of_card(purpose: str, runtime: str | None, capability: tuple[int, int] | None) -> dict[str, Any] | None:
    """The rule for serving with `runtime` on a card of this compute capability; None if there is none."""
    cards = rules()["targets"][runtime].get("cards", []) if runtime and purpose == "serving" else []
    return next((dict(card) for card in cards if capability and capability >= tuple(card["from"])), None)


def _tiers(rule: Mapping[str, Any], card: Mapping[str, Any] | None) -> list[list[str]]:
    """The tiers of a purpose, after the plans that are fastest on the card."""
    if card is None:
        return list(rule["tiers"])
    return [card["plans"], *([p for p in tier if p not in card["plans"]] for tier in rule["tiers"])]


def _ordered(found: list[Candidate], order: Sequence[_Criterion]) -> list[Candidate]:
    """By the first criterion, the best first; those whose intervals it cannot tell apart by the next, and so on."""
    if len(found) < 2 or not order:
        return found
    (get, more), *rest = order
    known, unknown, ranked = [c for c in found if get(c) is not None], [c for c in found if get(c) is None], []
    while known:
        first = leaders([get(c) for c in known], more_is_better=more)
        ranked += _ordered([known[i] for i in first], rest)
        known = [c for i, c in enumerate(known) if i not in first]
    return ranked + _ordered(unknown, rest)


def _speeds(ranked: list[Candidate], measured: Comparison | None, model: str) -> str:
    """Where tokens/s come from, or why there are none."""
    if measured is not None:
        return f"tokens/s: as measured for the report, on {measured.machine.cpu}; a plan that it lacks has none"
    if any(c.decode is not None for c in ranked):
        return "tokens/s: as fewbit compare timed them on this machine; a plan that it did not time has none"
    return f"tokens/s: none, as {model} was not timed on this machine; the first command below does that"


def _candidate(
    row: PlanEstimate, tier: int, measured: Comparison | None, timed: Mapping[str, Timing], device: str
) -> Candidate:
    kl, timing, basis, failed = None, timed.get(row.plan), "none", None
    line = next((r for r in measured.rows if r.plan == row.plan), None) if measured else None
    if line is not None and not line.done:
        failed = f"it failed when it was measured: {line.reason}"
    elif line is not None and line.loss is not None:
        kl, basis = line.loss.kl, "measured"
        timing = line.speed.decode if line.speed else None
    elif (prior := priors()["plans"].get(row.plan)) is not None:
        kl, basis = Interval(prior["kl"], *prior["interval"]), "prior"
    return Candidate(
        plan=row.plan,
        tier=tier,
        format=row.format,
        bits=row.bits,
        weights_bytes=row.weights_bytes,
        total=row.total,
        kl=kl,
        decode=timing.median if timing else None,
        decode_interval=timing.interval if timing else None,
        basis=basis,
        kernel=kernel(row.schemes[0], device) if row.schemes else "",
        calibrates=row.calibrates,
        excluded=row.why_not or failed,
    )


def kernel(scheme: str, device: str, *, here: bool = True) -> str:
    """The kernel to multiply by, bfloat16 activations given: of those that run `here`, or of all that there are."""
    return expected(parse(scheme), _SHAPE, torch.device(device), torch.bfloat16, here=here)


def _limited(
    c: Candidate, row: PlanEstimate, *, memory: int, formats: Any, runtime: str | None, max_kl: float | None
) -> Candidate:
    """The candidate, with a reason where a demand excludes it."""
    if c.excluded is not None:
        return c
    if formats is not None and c.format not in formats:
        return replace(c, excluded=f"{runtime} reads {', '.join(formats)}, not {c.format}")
    if row.total > memory:
        return replace(c, excluded=f"needs {size(row.total)} of memory, {size(memory)} are there")
    if max_kl is not None and c.kl is not None and c.kl.value > max_kl:
        return replace(c, excluded=f"KL divergence {c.kl.value:.3g} ({c.basis}), {max_kl:g} at most is asked for")
    if max_kl is not None and c.kl is None:
        return replace(c, excluded="its KL divergence was not measured")
    return c


def _nothing(
    estimated: Estimate,
    purpose: str,
    excluded: list[Candidate],
    demands: Demands,
    runtime: str | None,
    formats: Any,
) -> PlanError:
    """The error that says why no plan meets all demands, and which one is nearest."""
    memory, max_kl = demands.memory, demands.max_kl
    readable = [c for c in excluded if formats is None or c.format in formats]
    if not readable:
        others = [
            p for p, rule in rules()["purposes"].items() if rule.get("target") in (None, runtime) and p != purpose
        ]
        return PlanError(
            f"no plan for {purpose} makes files that {runtime} reads",
            f"Omit `target`, or choose another `purpose`: {' or '.join(others)}.",
        )
    possible = [c for c in readable if c.total]
    if not possible:
        return PlanError(f"no plan for {purpose} fits {estimated.model}: {readable[0].excluded}")
    smallest = min(possible, key=lambda c: c.total)
    if smallest.total > memory:
        return PlanError(
            f"nothing fits {size(memory)}: the smallest is {smallest.plan} with {size(smallest.total)}, "
            f"for {estimated.batch} x {estimated.context} tokens",
            f"Give more `{demands.given}`, a smaller `context` or `batch`, or a smaller model.",
        )
    fitting = [c for c in possible if c.total <= memory and c.kl is not None]
    if max_kl is not None and fitting:
        nearest = min(fitting, key=lambda c: c.kl.value if c.kl else 0.0)
        assert nearest.kl is not None
        return PlanError(
            f"nothing that fits {size(memory)} has a KL divergence of {max_kl:g} or less: "
            f"the nearest is {nearest.plan} with {nearest.kl.value:.3g} ({nearest.basis})",
            f"Allow a larger `max_kl` or more `{demands.given}`.",
        )
    return PlanError(f"no plan for {purpose} meets all demands: {readable[0].plan}: {readable[0].excluded}")


def _basis(
    measured: Comparison | None, size_first: bool, rule: Mapping[str, Any], here: bool, timed: bool, model: str
) -> str:
    what = "speed of decoding" if size_first and timed else "size" if size_first else "KL divergence"
    if len(rule["tiers"]) > 1:
        what = f"what the rule prefers, then {what}"
    kernels = "kernels of this machine, then " if here else ""
    if measured is not None:
        return f"{kernels}{what} as measured on {measured.model} ({measured.date[:10]}); where it has no row, by priors"
    if size_first and timed:
        return f"{kernels}{what} as timed on this machine; where intervals overlap, and where it was not, by size"
    if size_first:
        return f"{kernels}{what}: one token reads all weights once; no speed of this model was measured"
    whose = "measured on this model" if model == EMBEDDED else "not measured on this model"
    return f"{kernels}{what} by priors, {whose}: {priors()['where']}"


def _contradictions(
    ranked: list[Candidate], found: list[Candidate], rule: Mapping[str, Any], measured: Comparison | None
) -> list[str]:
    """Sentences for each contradiction of the common advice: a plan no larger, with clearly less loss."""
    advised = [c for c in found if c.plan in rule["guide"] and c.kl is not None]
    lines = []
    best = ranked[0]
    if advised and best.plan not in rule["guide"] and best.kl is not None:
        near = min(advised, key=lambda c: c.kl.value if c.kl else 0.0)
        assert near.kl is not None
        if best.kl.high < near.kl.low and best.weights_bytes <= near.weights_bytes:
            where = "on this model" if best.basis == near.basis == "measured" else "by priors"
            lines.append(
                f"The rule is {rule['says']}. But {best.plan} loses less than {near.plan} {where}: "
                f"KL divergence {best.kl.value:.3g} against {near.kl.value:.3g}, in {best.bits:.3g} bits against "
                f"{near.bits:.3g}. This recommendation follows the numbers."
            )
    original = measured.original if measured else None
    first = original.speed.decode.interval if original and original.speed else None
    if first and original and original.speed and best.decode_interval and best.decode_interval.high < first.low:
        lines.append(
            f"Fewer bits are not faster here: {best.plan} writes {best.decode:.3g} tokens/s, the original "
            f"{original.speed.decode.median:.3g}. It only saves memory."
        )
    return lines


def _of_limit(max_kl: float | None, basis: str) -> tuple[str, ...]:
    if max_kl is None or basis != "prior":
        return ()
    return ("The KL limit was checked against priors. To measure this model, run fewbit compare or fewbit evaluate.",)


def _notes(
    ranked: list[Candidate],
    estimated: Estimate,
    purpose: str,
    runtime: str | None,
) -> list[str]:
    best, notes = ranked[0], []
    # Mention a larger plan that also fits and loses far less.
    better = [c for c in ranked[1:] if best.kl and c.kl and c.kl.high < best.kl.low / 2 and c.bits > best.bits + 1]
    if better and purpose in ("quality", "edge", "serving"):
        other = max(better, key=lambda c: -c.weights_bytes)
        assert other.kl is not None
        assert best.kl is not None
        notes.append(
            f"{other.plan} fits too and loses far less (KL divergence {other.kl.value:.2g} against "
            f"{best.kl.value:.2g}) for {other.weights_bytes / best.weights_bytes:.1f} times the weights."
        )
    if runtime in (None, "transformers") and best.kernel == "reference":
        notes.append(f"No fast kernel of this machine serves {best.plan}: it saves memory, but is slow here.")
    if estimated.imagined:
        notes.append("The weights are not on this machine: sizes are computed from config.json alone.")
    return notes


def _sized(best: Candidate, estimated: Estimate) -> Sized | None:
    """What `--bits` makes of the best plan at the same size, if that was clearly better where it was measured."""
    sizes = priors()["sizes"]
    if (found := sizes["plans"].get(best.plan)) is None:
        return None
    kl, of_plan = Interval(found["kl"], *found["interval"]), Interval(found["of_plan"], *found["interval_of_plan"])
    if kl.high >= of_plan.low:
        return None
    bits = floor(best.bits * 1000) / 1000  # the output is no larger than the plan's
    command = f"fewbit quantize {estimated.model} -o {_out(best, estimated)} --plan {best.plan} --bits {bits:g}"
    return Sized(bits, kl, of_plan, sizes["where"], command)


def _name(estimated: Estimate) -> str:
    return base_name(estimated.model)


def base_name(model: str) -> str:
    place = Path(model).absolute()  # of a Hub name too this keeps the last part
    return os.path.basename(os.path.normpath(place.parent if place.name == "config.json" else place))


def _out(best: Candidate, estimated: Estimate) -> str:
    return f"{_name(estimated) or 'model'}-{best.plan}" + (".gguf" if best.format == "gguf" else "")


def _commands(
    ranked: list[Candidate],
    estimated: Estimate,
    purpose: str,
    runtime: str | None,
    measured: Comparison | None,
    fitted: Fitted | None,
) -> list[str]:
    best, model = ranked[0], estimated.model
    name, out = _name(estimated), _out(best, estimated)
    lines = []
    named = dict.fromkeys([*(c.plan for c in ranked[:4]), *([fitted.plan] if fitted else [])])
    if measured is None and len(named) > 1:
        plans = ",".join(["bf16", *named])
        lines.append(f"fewbit compare {model} --plans {plans} -o {name}-report")
    lines += [f"fewbit quantize {model} -o {out} --plan {best.plan}", f"fewbit evaluate {out} --reference {model}"]
    if purpose == "finetuning":
        lines.append(f"fewbit finetune {out} --data train.jsonl -o {name}-adapter")
    else:
        fallback = "llama.cpp" if best.format == "gguf" else "transformers"
        runs = runtime or ("vllm" if purpose == "serving" and best.format != "gguf" else fallback)
        target = rules()["targets"][runs]
        if "serve" in target:
            lines.append(" ".join(part.format(model=out) for part in target["serve"]["command"]))
        else:
            lines.append(f"fewbit serve {out}" if purpose == "serving" else target["run"].format(out=out))
    return lines
