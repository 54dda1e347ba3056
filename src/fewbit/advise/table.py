"""The table of methods, built from the registry and measurements: method, bits, calibration, quality, best for.

A row is a method with a format of its own; plans, bits and needs come from the presets, quality from a report of
`fewbit compare` or from the priors, the kernel from what serves the scheme, and the purposes from the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.advise.precision import bits_of
from fewbit.advise.recommend import kernel, priors
from fewbit.advise.rules import rules
from fewbit.measure.comparison import Comparison
from fewbit.methods.base import make
from fewbit.plans import mixtures, plan
from fewbit.schemes.base import parse
from fewbit.stats import Need

_FOUR_BITS = 4.5  # quality is compared at about this many bits per weight


@dataclass(frozen=True)
class MethodRow:
    """`bits`: the least and the most of its plans. `kl`: nats per token, of `kl_plan`, the first of those advised, else
    the one nearest to 4.5 bits; `decode`: its tokens/s, if they were measured. `best_for`: what it is advised for."""

    method: str
    plans: tuple[str, ...]
    bits: tuple[float, float]
    calibrates: bool
    kernel: str
    kl: float | None
    kl_plan: str | None
    decode: float | None
    basis: str
    finetuning: str
    best_for: tuple[str, ...]


def table(measured: Comparison | None = None, device: str = "cpu", *, here: bool = True) -> tuple[MethodRow, ...]:
    """One row for each method and format that a preset combines, the least loss first. Schemes of bitsandbytes and of
    compressed-tensors have rows of their own.

    Its kernels are those that run `here`, or would with all that fewbit can use.
    """
    groups: dict[str, list[plan.Plan]] = {}
    for preset in plan.PRESETS.values():
        groups.setdefault(_title(preset), []).append(preset)
    rows = (_row(title, members, measured, device, here) for title, members in groups.items())
    return tuple(
        sorted(rows, key=lambda row: (row.kl is None, row.basis == "prior" and measured is not None, row.kl or 0.0))
    )


def _title(preset: plan.Plan) -> str:
    rule = preset.rules[0]
    if preset.format == "gguf":
        return "GGUF block types"
    if preset.format == "bnb":
        return "bitsandbytes NF4" if preset.name == "nf4" else "bitsandbytes LLM.int8()"
    if preset.format == "compressed-tensors":
        family = parse(str(rule.scheme)).family
        return "compressed-tensors integers" if family == "affine" else family.upper()
    return {"rtn": "round to nearest"}.get(rule.method, rule.method.upper())


def _scheme(preset: plan.Plan) -> str:
    """The preset's scheme. For a mixture, the scheme of most weights."""
    scheme = str(preset.rules[0].scheme)
    if scheme.startswith(mixtures.PREFIX):
        return mixtures.MIXTURES[scheme.removeprefix(mixtures.PREFIX)].base
    return scheme


def _bits(preset: plan.Plan) -> float:
    return bits_of(_scheme(preset))


def _row(title: str, members: list[plan.Plan], measured: Comparison | None, device: str, here: bool) -> MethodRow:
    found = {row.plan: row for row in measured.rows if row.loss is not None} if measured else {}
    known = {m.name: priors()["plans"].get(m.name, {}).get("kl") for m in members}
    basis = "prior"
    if any(m.name in found for m in members):
        basis = "measured"
        known = {m.name: loss.kl.value if m.name in found and (loss := found[m.name].loss) else None for m in members}
    at_four = [m for m in members if known[m.name] is not None]
    advised = [plan for rule in rules()["purposes"].values() for plan in rule["guide"]]
    chosen = min(
        at_four,
        key=lambda m: (advised.index(m.name) if m.name in advised else len(advised), abs(_bits(m) - _FOUR_BITS)),
        default=None,
    )
    line = found.get(chosen.name) if chosen is not None else None
    served = {kernel(_scheme(m), device, here=here) for m in members}
    purposes = rules()["purposes"]
    names = {m.name for m in members}
    return MethodRow(
        method=title,
        plans=tuple(m.name for m in members),
        bits=(min(_bits(m) for m in members), max(_bits(m) for m in members)),
        calibrates=any(make(m.rules[0].method).needs > Need.NOTHING for m in members),
        kernel=", ".join(sorted(served, key=lambda name: name == "reference")),
        kl=known[chosen.name] if chosen is not None else None,
        kl_plan=chosen.name if chosen is not None else None,
        decode=line.speed.decode.median if line is not None and line.speed is not None else None,
        basis=basis if chosen is not None else "none",
        finetuning="the usual choice" if names & set(purposes["finetuning"]["guide"]) else "yes",
        best_for=tuple(purpose for purpose, rule in purposes.items() if names & set(rule["guide"])),
    )
