"""The error for weights that the format of a plan cannot store: which, why, by which rule, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import inf, log2

from fewbit.errors import PlanError
from fewbit.formats.base import Format, Stored, storing
from fewbit.names import in_short

_GROUPS = (1024, 512, 256, 128, 64, 32, 16, 0)


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> the modules that have it."""
    found: dict[str, list[str]] = {}
    for module, reason in reasons.items():
        found.setdefault(reason, []).append(module)
    return found


def not_stored(
    plan: str, rules: Sequence[str], refused: Mapping[str, str], wanted: Mapping[str, Stored], format: Format
) -> PlanError:
    """The error for the modules `refused` (module -> reason) of all that the plan quantizes.

    plan: its name. rules: the patterns of its rules, the first that matches counts.
    """
    groups, total = by_reason(refused), len(wanted)
    if len(refused) == total > 1 and len(groups) == 1:
        why, modules = next(iter(groups.items()))
        said = f"plan {plan}: none of {total} tensors can be stored as requested: {why}{_by_rule(rules, modules)}"
        return PlanError(said, _instead(refused, wanted, format))
    lines = [f"plan {plan}: {len(refused)} of {total} tensors cannot be stored as requested:"]
    for why, modules in groups.items():
        shapes = dict.fromkeys("{} x {}".format(*wanted[module].shape) for module in modules)
        count = f"{len(modules)} tensors, " if len(modules) > 1 else ""
        lines.append(f"  {count}{in_short(modules)} [{', '.join(shapes)}]: {why}{_by_rule(rules, modules)}")
    return PlanError("\n".join(lines), _instead(refused, wanted, format))


def _by_rule(rules: Sequence[str], modules: Sequence[str]) -> str:
    """The rules that chose the scheme of these modules; nothing if the plan has only one."""
    if len(rules) == 1:
        return ""
    numbers = dict.fromkeys(next(n for n, rule in enumerate(rules) if fnmatchcase(m, rule)) for m in modules)
    return " (" + " and ".join(f"rule {n + 1}, {rules[n]!r}" for n in sorted(numbers)) + ")"


def _instead(refused: Mapping[str, str], wanted: Mapping[str, Stored], format: Format) -> str:
    """Other formats of the schemes that this one never stores; else a scheme or a group size that fits."""
    formats = {scheme: storing(scheme) for scheme in dict.fromkeys(wanted[module].scheme for module in refused)}
    if never := {scheme: others for scheme, others in formats.items() if format.name not in others}:
        lines = [f"Formats that store {scheme}: {', '.join(others)}." for scheme, others in never.items()]
        return " ".join([*lines, "Choose one of them, or another scheme."])
    for scheme in sorted({stored.scheme for stored in wanted.values()}, key=str):
        for group in sorted(_GROUPS, key=lambda group: _steps(group, scheme.group)):
            tried = scheme.with_group(group)
            if not any(format.why_not(stored.shape, tried) for stored in wanted.values()):
                return f"The scheme {tried} fits every tensor."
    return "No other group size fits: use another scheme or format, or exclude tensors with a plan file."


def _steps(group: int, requested: int) -> float:
    """How far a group size is from the requested one, in doublings. The whole row (0) comes last."""
    return abs(log2(group / (requested or _GROUPS[0]))) if group else inf
