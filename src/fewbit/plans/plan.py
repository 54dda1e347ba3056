"""Plans: which tensors get which method and scheme, and the format of the output.

A plan has an ordered list of rules, which match module names by glob. The first match applies. A rule without a scheme
leaves its modules unquantized. Presets are plans. `resolve` applies a plan to a model's shapes and reports all
conflicts in one error.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fewbit import registry
from fewbit.errors import FormatError, PlanError
from fewbit.formats.base import Format, Shape, Stored, storing
from fewbit.lazy import Tensor, torch
from fewbit.methods.base import Method, make, name_of
from fewbit.names import expanded, in_short
from fewbit.plans import mixtures
from fewbit.plans.refused import by_reason, not_stored
from fewbit.plans.rules import Rule as Rule
from fewbit.plans.rules import deciding, unmatched
from fewbit.schemes.base import Scheme, parse
from fewbit.stats import Need
from fewbit.system.files import read_json

_WITHOUT_INPUTS = "imatrix"  # the method for weights without input statistics; it then weights all columns equally
_GGUF = "Use the format gguf and an `out` that ends in .gguf."
_WITH_IMPORTANCES = ("iq2_xxs", "iq2_xs", "iq2_s")  # llama.cpp quantizes to these with an importance matrix only
_SMALLEST_GROUP = 32  # the smallest group size that other projects' kernels support


@dataclass(frozen=True)
class Plan:
    """An ordered list of rules and an output format.

    `adapt`: reduce the group size to the largest that divides every tensor; tensors that none divides stay unquantized.
    `activations`: "dynamic" if the files declare that a server rounds activations too, with scales that it computes
    from them (W8A8). fewbit itself never rounds them for that. None: they stay in 16 bits.
    """

    name: str
    format: str
    rules: tuple[Rule, ...]
    adapt: bool = False
    activations: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", self.format.lower())

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan that a JSON object describes. PlanError, with the rule and the key, if the object is invalid."""
        data = _object(data, "this is not a plan", _KEYS, ("name", "format", "rules"))
        name, format = (_text(data[key], f"this is not a plan: {key}") for key in ("name", "format"))
        if not isinstance(data["rules"], (list, tuple)):
            raise PlanError(f"this is not a plan: rules is {data['rules']!r}", f"Give a list of rules. {_SHOWN}")
        if not isinstance(adapt := data.get("adapt", False), bool):
            raise PlanError(f"this is not a plan: adapt is {adapt!r}", "Give true or false.")
        if (activations := data.get("activations")) not in (None, *_ACTIVATIONS):
            raise PlanError(f"this is not a plan: activations is {activations!r}", 'Give "dynamic" or null.')
        rules = tuple(_rule(rule, number) for number, rule in enumerate(data["rules"], 1))
        made = cls(name, format, rules, adapt, activations)
        format_of(made)
        return made

    def changed(
        self,
        *,
        scheme: str | None = None,
        method: str | None = None,
        format: str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Plan:
        """A copy of this plan with another scheme, method, format or method options.

        If `scheme` is given, its group size is used as it is: the copy does not `adapt`.
        """
        scheme, method, format = (each and each.lower() for each in (scheme, method, format))
        if format is not None:
            registry.get("formats", format)
        rules = tuple(
            rule
            if rule.scheme is None
            else replace(
                rule,
                scheme=scheme or rule.scheme,
                method=method or rule.method,
                # Options are for one method: they are dropped if the method changes.
                options={**(rule.options if method in (None, rule.method) else {}), **(options or {})},
            )
            for rule in self.rules
        )
        for rule in rules:
            _verify(rule)
        given = {"scheme": scheme, "method": method, "format": format, **(options or {})}
        said = ", ".join(f"{key} {value}" for key, value in given.items() if value is not None)
        return replace(
            self,
            name=f"{self.name} with {said}" if said else self.name,
            rules=rules,
            format=format or self.format,
            adapt=self.adapt and scheme is None,
        )


_ACTIVATIONS = ("dynamic",)
_KEYS = ("name", "format", "rules", "adapt", "activations", "$schema")  # $schema is for editors
_RULE_KEYS = ("match", "scheme", "method", "options")
_SHOWN = 'A plan is {"name", "format", "rules": [{"match", "scheme", "method", "options"}]}.'


def _rule(data: Any, number: int) -> Rule:
    """A rule from JSON; PlanError that names it by its number and pattern. Options may be JSON's own values."""
    where = f"rule {number} of the plan"
    if isinstance(data, Mapping) and "match" in data:
        where += f", {data['match']!r}"
    data = _object(data, where, _RULE_KEYS, ("match", "scheme"))
    scheme = None if data["scheme"] is None else _text(data["scheme"], f"{where}: scheme")
    options = data.get("options", {})
    if not isinstance(options, Mapping):
        raise PlanError(f"{where}: options is {options!r}", 'Give an object, such as {"damp": 0.05}.')
    rule = Rule(
        _text(data["match"], f"{where}: match"),
        scheme,
        _text(data.get("method", "rtn"), f"{where}: method"),
        {key: _option(value, f"{where}: option {key}") for key, value in options.items()},
    )
    try:
        _verify(rule)
    except PlanError as error:
        raise PlanError(f"{where}: {error.message}", error.hint) from None
    return rule


def _verify(rule: Rule) -> None:
    """PlanError unless the scheme, the method and its options exist."""
    make(rule.method, dict(rule.options))
    if rule.scheme is None:
        return
    if rule.scheme.startswith(mixtures.PREFIX):
        name = rule.scheme.removeprefix(mixtures.PREFIX)
        if name not in mixtures.MIXTURES:
            raise registry.unknown("mixture", name, mixtures.MIXTURES)
    else:
        _storable(rule.scheme)


def _storable(spec: str) -> Scheme:
    """The scheme that `spec` names. PlanError if there is none, or if no format stores it."""
    scheme = parse(spec)
    if not storing(scheme):
        others = [example for example in type(scheme).examples if storing(parse(example))]
        hint = f"Schemes of this kind that a format stores: {', '.join(others)}." if others else ""
        raise PlanError(f"scheme {spec}: no format stores it yet", hint)
    return scheme


def _object(data: Any, where: str, known: Sequence[str], needed: Sequence[str]) -> Mapping[str, Any]:
    """Return `data` if it is an object with these keys. PlanError otherwise; it suggests the nearest known key."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: {reprlib.repr(data)} is not an object", _SHOWN)
    for key in data:
        if key not in known:
            unknown = registry.unknown("key", str(key), known)
            raise PlanError(f"{where}: {unknown.message}", unknown.hint)
    if missing := [key for key in needed if key not in data]:
        raise PlanError(f"{where}: {' and '.join(missing)} missing", _SHOWN)
    return data


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{where} is {reprlib.repr(value)}", "Give a string.")
    return value


def _option(value: Any, where: str) -> str:
    if not isinstance(value, (str, int, float)):
        raise PlanError(f"{where} is {reprlib.repr(value)}", "Give a number, a string, true or false.")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _preset(name: str, method: str, bits: int) -> Plan:
    return Plan(name, "gptq", (Rule("*", f"int{bits}-g128-sym", method),), adapt=True)


_CT = "compressed-tensors"
PRESETS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        _preset("rtn-4bit", "rtn", 4),
        *(_preset(f"gptq-{bits}bit", "gptq", bits) for bits in (2, 3, 4, 8)),
        Plan("awq-4bit", "awq", (Rule("*", "int4-g128", "awq"),), adapt=True),
        Plan("nf4", "bnb", (Rule("*", "nf4-b64-dq"),)),
        Plan("int8", "bnb", (Rule("*", "llm.int8"),)),
        Plan("w4a16", _CT, (Rule("*", "int4-g128-sym", "gptq"),), adapt=True),
        Plan("fp8", _CT, (Rule("*", "fp8-row"),), activations="dynamic"),
        Plan("fp8-block", _CT, (Rule("*", "fp8-b128"),), activations="dynamic"),
        Plan("mxfp4", _CT, (Rule("*", "mxfp4", "gptq"),)),
        Plan("nvfp4", _CT, (Rule("*", "nvfp4", "gptq"),), activations="dynamic"),
        Plan("w8a16", _CT, (Rule("*", "int8-row-sym"),)),
        *(Plan(name, "gguf", (Rule("*", mixtures.PREFIX + name, "imatrix"),)) for name in mixtures.MIXTURES),
    )
}


def find(name: str) -> Plan:
    """The preset called `name`, in any case, or the plan in the JSON file `name`. PlanError if there is neither.

    The file may also be the record of an output (`fewbit.json`), or the JSON of a preview.
    """
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    name = expanded(name)
    if name.endswith(".json"):
        try:
            data = read_json(Path(name))
            for key in ("plan", "definition"):  # of a record, and of what a dry run prints
                if isinstance(data, dict) and "rules" not in data and isinstance(data.get(key), dict):
                    data = data[key]
            return Plan.from_json(data)
        except OSError as error:
            raise PlanError(f"plan file {name}: {error.strerror}", "Give a plan's name or a .json file.") from None
        except FormatError as error:  # the user wrote the plan file: a PlanError, as for an invalid argument
            raise PlanError(f"plan file {error.message}", error.hint) from None
        except PlanError as error:
            raise PlanError(f"plan file {name}: {error.message}", error.hint) from None
    if Path(name).is_dir():
        raise PlanError(f"plan {name}: this is a folder", "Give a plan's name (fewbit list) or a .json file.")
    raise registry.unknown("plan", name, PRESETS)


def find_all(names: Iterable[str], *, but: str) -> dict[str, Plan | Path | None]:
    """Name -> its plan. The name `but` maps to None. An existing path, such as a model's, maps to that path.

    One PlanError lists all names that do not exist.
    """
    found: dict[str, Plan | Path | None] = {}
    unknown, hints = [], dict[str, None]()
    for name in names:
        path = Path(expanded(name))
        if name.lower() in (but, *PRESETS) and not path.exists():
            name = name.lower()
        if name not in (but, *PRESETS) and path.suffix != ".json" and path.exists():
            found[path.name if path.name not in found else name] = path
            continue
        try:
            plan = None if name == but else find(name)
            # A plan from a file is listed under the name in the file, unless that name is taken.
            found[name if plan is None or plan.name in found else plan.name] = plan
        except PlanError as error:
            unknown.append(error.message)
            hints[error.hint] = None
    if len(unknown) > 1:
        raise PlanError("; ".join(unknown), f"Known: {', '.join(sorted([but, *PRESETS]))}.")
    if unknown:
        raise PlanError(unknown[0], next(iter(hints)))
    if not found:
        raise PlanError("no plans to compare", f"Give some, such as `plans={but},gptq-4bit`.")
    return found


def format_of(plan: Plan) -> Format:
    """The plan's format; PlanError if it does not exist, or cannot declare the plan's `activations`."""
    format = registry.get("formats", plan.format)()
    assert isinstance(format, Format)
    return format.with_activations(plan.activations)


def is_file(out: str | Path, plan: Plan) -> bool:
    """Whether the plan writes one file rather than a folder. PlanError if the suffix of `out` does not match."""
    suffix = format_of(plan).suffix
    if suffix and Path(out).suffix != suffix:
        raise PlanError(f"{out}: plan {plan.name} makes one {suffix} file", f"Give an `out` that ends in {suffix}.")
    if not suffix and Path(out).suffix == ".gguf":
        raise PlanError(
            f"{out} would be a GGUF file, but plan {plan.name} makes a folder of {plan.format} weights",
            "Use a plan for GGUF, such as `plan=q4_k_m`, or another `out`.",
        )
    return bool(suffix)


@dataclass(frozen=True)
class Assignment(Stored):
    """The scheme and method for one weight. order: the column of the weight that each column of the file is, int64 [K],
    so that blocks of columns are those of the file; None if the order is the same."""

    method: Method
    order: Tensor | None = field(default=None, compare=False)

    @property
    def need(self) -> Need:
        """The input statistic that the method needs for this scheme."""
        return self.method.need(self.scheme)


@dataclass(frozen=True)
class Resolved:
    """A plan applied to one model: assignments per module, modules that stay unquantized (`kept`), and user notes."""

    plan: Plan
    format: Format
    assignments: Mapping[str, Assignment]
    kept: tuple[str, ...]
    notes: tuple[str, ...]


def resolve(
    plan: Plan,
    shapes: Mapping[str, Shape],
    model: mixtures.Model | None = None,
    dtype: torch.dtype | None = None,
    modules: Collection[str] = (),
    tied: Mapping[str, str] = MappingProxyType({}),
    head: str = "",
) -> Resolved:
    """Apply `plan` to modules with these shapes [N, K]. PlanError lists every module that it does not fit.

    dtype: of the model; some formats store scales in it. None: the schemes stay as the plan names them. modules, tied:
    as in `rules.unmatched`. PlanError for a rule that names none of them.

    `model` is required for formats that store whole models, such as GGUF. head: as in `rules.deciding`, if it is one of
    the `shapes`. Embeddings and head get the method of their rule if that needs only weights, else the method `imatrix`
    with equal weights, which searches scales.
    """
    format = format_of(plan)
    wanted, kept = {}, []
    first = deciding(plan.rules, shapes, head)
    notes = unmatched(plan.name, plan.rules, first, shapes, modules, tied)
    mixed, gates, transposed = _mixed(plan, format, shapes, model), list[str](), list[str]()
    for module, shape in shapes.items():
        rule = plan.rules[first[module]] if first[module] >= 0 else None
        if rule is not None and rule.match == "*" and is_gate(module, shape):
            gates.append(module)
            rule = None
        elif rule is not None and rule.match == "*" and model is not None and module in model.transposed:
            transposed.append(module)
            rule = None
        scheme = None if rule is None or rule.scheme is None else mixed.get(rule.scheme, {}).get(module, rule.scheme)
        if rule is None or scheme is None:
            kept.append(module)
        else:
            method = make(rule.method, dict(rule.options))
            outside = module == head or (model is not None and not model.in_block(module))
            if outside and (method.needs > Need.NOTHING or method.rewrites):
                method = make(_WITHOUT_INPUTS)
            order = None if model is None else model.orders.get(module)
            wanted[module] = Assignment(module, shape, _storable(scheme), method, order)
    if not wanted:
        raise PlanError(f"plan {plan.name} matches none of the {len(shapes)} linears in the model's blocks")
    if gates:
        notes.append(f"in 16 bits, as they choose experts or set how fast a state decays: {in_short(gates)}")
    if transposed:
        notes.append(f"in 16 bits, as {_TRANSPOSED}: {in_short(transposed)}")
    blind = [m for m, a in wanted.items() if format.measures_inputs(a.scheme) and a.method.needs == Need.NOTHING]
    if blind:
        plan, format = replace(plan, activations=None), format.with_activations(None)
        notes.append(
            "activations stay in 16 bits: to round them, servers need the largest inputs in a calibration text, and "
            f"the method {name_of(wanted[blind[0]].method)} measures none; imatrix and gptq do"
        )
    coarse = [m for m, a in wanted.items() if str(a.scheme) in _WITH_IMPORTANCES and a.method.needs == Need.NOTHING]
    if coarse:
        kinds = ", ".join(sorted({str(wanted[m].scheme) for m in coarse}))
        notes.append(
            f"{len(coarse)} weights become {kinds} without an importance matrix, which llama-quantize refuses: they "
            f"lose much without one. The method {name_of(wanted[coarse[0]].method)} uses none; imatrix and gptq do"
        )
    if plan.adapt:
        wanted, adapted = _adapt(wanted, format)
        notes += adapted
        kept += [module for module in shapes if module not in wanted and module not in kept]
        if not wanted:
            raise PlanError(f"plan {plan.name} fits none of the model's linears", "\n  ".join(notes[:8]))
    refused = {m: reason for m, a in wanted.items() if (reason := format.why_not(a.shape, a.scheme))}
    if head in wanted and head not in refused and format.measures_inputs(wanted[head].scheme):
        refused[head] = "servers would round its inputs by a scale that fewbit does not measure: give it another scheme"
    refused |= {m: _TRANSPOSED for m in ([] if model is None else model.transposed) if m in wanted}
    if refused:
        raise not_stored(plan.name, [rule.match for rule in plan.rules], refused, wanted, format)
    if dtype is not None:
        wanted, suited = _suit(wanted, format, dtype)
        notes += suited
    if wanted and (reason := format.why_not_together(list(wanted.values()), kept)):
        raise PlanError(reason, "Give these one scheme, or use another format.")
    if plan.activations is not None:
        notes.append("servers may round activations too; all that fewbit measures is with activations in 16 bits")
    if any(scheme is None for schemes in mixed.values() for scheme in schemes.values()):
        notes.append(f"in 16 bits, as no block divides their rows: {in_short(kept)}")
    return Resolved(plan, format, wanted, tuple(kept), tuple(notes))


_TRANSPOSED = "a GGUF file has a part of each head transposed, where blocks of rows cannot be"

# The last part of the names of small linears that steer a model: routers, gates of shared experts, decay rates of gated
# delta nets. They are below 1 % of the parameters, and a router in 4 bits sends tokens to other experts.
_GATES = {
    *("gate", "router", "wg", "shared_expert_gate", "modality_router"),
    *("in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "igate_preact", "fgate_preact"),
}


def is_gate(module: str, shape: Shape) -> bool:
    """Whether a linear of this name and shape [N, K] stays in 16 bits unless a rule of the plan names it."""
    *inside, leaf = module.split(".")
    return "router" in inside or (leaf in _GATES and 2 * shape[0] <= shape[1])


def _mixed(
    plan: Plan, format: Format, shapes: Mapping[str, Shape], model: mixtures.Model | None
) -> dict[str, dict[str, str | None]]:
    """For each mixture that the plan's rules name: module -> scheme."""
    asked = {rule.scheme for rule in plan.rules if rule.scheme is not None and rule.scheme.startswith(mixtures.PREFIX)}
    if not asked:
        return {}
    if model is None:
        raise PlanError(f"plan {plan.name} is a mixture of block types, which {format.name} cannot store", _GGUF)
    weighed = any(make(rule.method, dict(rule.options)).needs > Need.NOTHING for rule in plan.rules)
    tensors = {model.names[module]: shape for module, shape in shapes.items()}
    found = {}
    for spec in sorted(asked):
        name = spec.removeprefix(mixtures.PREFIX)
        if name not in mixtures.MIXTURES:
            raise registry.unknown("mixture", name, mixtures.MIXTURES)
        schemes = mixtures.schemes(name, tensors, model, weighed=weighed)
        found[spec] = {module: schemes[model.names[module]] for module in shapes}
    return found


def _suit(
    wanted: Mapping[str, Assignment], format: Format, dtype: torch.dtype
) -> tuple[dict[str, Assignment], list[str]]:
    """The assignments with the variant of each scheme for a model of `dtype`, and a note on what changed."""
    found = {m: replace(a, scheme=format.suited(a.scheme, dtype)) for m, a in wanted.items()}
    changed = {str(wanted[m].scheme): str(a.scheme) for m, a in found.items() if a.scheme != wanted[m].scheme}
    called = str(dtype).removeprefix("torch.")
    notes = [
        f"{after} instead of {before}: servers load the scales of {format.name} files in the model's {called}"
        for before, after in changed.items()
    ]
    return found, notes


def _adapt(wanted: Mapping[str, Assignment], format: Format) -> tuple[dict[str, Assignment], list[str]]:
    """The assignments that fit the format, with one group size for all, and notes on what changed."""
    fitting = {m: a for m, a in wanted.items() if _groups_that_fit(a, format)}
    left = {
        m: str(format.why_not(a.shape, a.scheme.with_group(_sizes(a.scheme.group)[-1])))
        for m, a in wanted.items()
        if m not in fitting
    }
    notes = [f"{in_short(modules)} {_stay(modules)}: {why}" for why, modules in by_reason(left).items()]
    common = set.intersection(*(set(_groups_that_fit(a, format)) for a in fitting.values())) if fitting else set()
    asked = {a.scheme.group for a in fitting.values()}
    if len(asked) == 1 and common and (group := max(common)) != (before := asked.pop()):
        odd = sorted({a.shape[1] for a in fitting.values() if a.shape[1] % before})
        notes.append(
            f"groups of {group} instead of {before}: a {format.name} file has one group size, "
            f"and {before} does not divide {' or '.join(map(str, odd))} columns"
        )
        fitting = {m: replace(a, scheme=a.scheme.with_group(group)) for m, a in fitting.items()}
    return fitting, notes


def _stay(modules: Sequence[str]) -> str:
    return "stays as it is" if len(modules) == 1 else "stay as they are"


def _groups_that_fit(assignment: Assignment, format: Format) -> list[int]:
    """The group sizes of `_sizes` with which the format can store this weight."""
    shape, scheme = assignment.shape, assignment.scheme
    return [group for group in _sizes(scheme.group) if format.why_not(shape, scheme.with_group(group)) is None]


def _sizes(group: int) -> list[int]:
    """The requested group size, its half and so on, down to the smallest that other projects' kernels support."""
    found = [group]
    while found[-1] // 2 >= _SMALLEST_GROUP:
        found.append(found[-1] // 2)
    return found
