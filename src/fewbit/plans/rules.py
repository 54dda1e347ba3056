"""The rules of a plan, and what is said of those that match no weight of a model: an error with the nearest names, or a
note where nothing is lost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.formats.base import Shape
from fewbit.names import in_short


@dataclass(frozen=True)
class Rule:
    """Quantize modules whose names match the glob `match` to `scheme` with `method`. scheme None: do not quantize them.

    A scheme may be a mixture such as `mixture:q4_k_m` (plans/mixtures.py), which chooses a scheme for each tensor.
    """

    match: str
    scheme: str | None
    method: str = "rtn"
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("scheme", "method"):  # in any case, such as llama.cpp's Q4_K
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, value.lower())


def deciding(rules: Sequence[Rule], modules: Iterable[str], head: str = "") -> dict[str, int]:
    """Module -> the number of the rule that decides on it: the first that matches its name. -1: none does.

    head: the one of the `modules` that is the output head of a model in a folder; "": none is. Only a rule that names
    it decides on it, which is a rule that matches no other of the `modules`. So `*` leaves it as it is.

    >>> deciding([Rule("*", "int4-g64"), Rule("*head", "int8-g64")], ["a.q_proj", "lm_head"], "lm_head")
    {'a.q_proj': 0, 'lm_head': 1}
    """
    matching = {module: [n for n, rule in enumerate(rules) if fnmatchcase(module, rule.match)] for module in modules}
    others = {n for module, numbers in matching.items() if module != head for n in numbers}
    if head:
        matching[head] = [n for n in matching[head] if n not in others]
    return {module: next(iter(numbers), -1) for module, numbers in matching.items()}


def names_head(rules: Sequence[Rule], head: str, modules: Iterable[str]) -> bool:
    """Whether a rule gives the output head a scheme. modules: as in `deciding`, without the head."""
    number = deciding(rules, [*modules, head], head)[head]
    return number >= 0 and rules[number].scheme is not None


def unmatched(
    plan: str,
    rules: Sequence[Rule],
    first: Mapping[str, int],
    shapes: Mapping[str, Shape],
    modules: Collection[str],
    tied: Mapping[str, str],
) -> list[str]:
    """Notes on rules with a scheme that name only modules that are no linears of the blocks, such as most routers.

    plan: its name. first: as `deciding` returns it. shapes: of the weights that a rule can match. modules: names of all
    modules of the model, and of those that only the checkpoint has. tied: module -> the module whose weight it has.
    PlanError lists the rules that match no module, that name a block without its linears, or that have no effect,
    because an earlier rule or one for the tied weight decides.
    """
    notes, wrong, hints = list[str](), list[str](), dict[str, None]()
    used = {*first.values()}
    for number, rule in enumerate(rules):
        if number in used:
            continue
        said = f"rule {number + 1} of the plan, {rule.match!r},"
        named = [module for module in modules if module and fnmatchcase(module, rule.match)]
        begins = tuple(f"{name}." for name in named)
        if matched := [module for module in shapes if fnmatchcase(module, rule.match)]:
            if (hiding := _hiding(rules, number, {first[module] for module in matched})) is not None:
                wrong.append(
                    f"{said} has no effect: rule {hiding + 1}, {rules[hiding].match!r}, matches the same first"
                )
                hints[f"Put rule {number + 1} before rule {hiding + 1}."] = None
        elif owners := [tied[module] for module in named if tied.get(module) in first]:
            if any(_differs(rules, number, first[owner]) for owner in owners):
                wrong.append(f"{said} has no effect: {in_short(named)} has the weight of {in_short(owners)}")
                hints[f"Write '{owners[0]}'."] = None
        elif any(module.startswith(begins) for module in shapes):
            wrong.append(f"{said} names {in_short(named)}, and no linear inside")
            hints[f"To name its linears, write '{rule.match.rstrip('.')}.*'."] = None
        elif named and rule.scheme is not None:
            outer = in_short(module for module in named if module.rpartition(".")[0] not in named)
            notes.append(f"{said} matches no linear in the model's blocks: {outer} stays in 16 bits")
        elif not named:
            wrong.append(f"{said} matches nothing in this model")
            hints[_near(rule.match, shapes, modules)] = None
    if wrong:
        raise PlanError(f"plan {plan}: " + "\n  ".join(wrong), "\n  ".join(hints))
    return notes


def _hiding(rules: Sequence[Rule], number: int, winners: Iterable[int]) -> int | None:
    """The first of the `winners`, rules before `number`, that matches all names that this rule can match in any model,
    and does something else with them. None if there is none."""
    rule = rules[number]
    return next(
        (
            n
            for n in sorted(winners)
            if not set("?[") & set(rules[n].match)
            and fnmatchcase(rule.match, rules[n].match)
            and _differs(rules, number, n)
        ),
        None,
    )


def _differs(rules: Sequence[Rule], one: int, other: int) -> bool:
    """Whether two rules, by their numbers, do something else with a weight. -1: no rule, which leaves it as it is."""
    done = [rules[n] if n >= 0 else Rule("*", None) for n in (one, other)]
    schemes = [rule.scheme for rule in done]
    return schemes != [None, None] and replace(done[0], match="") != replace(done[1], match="")


def _near(pattern: str, names: Collection[str], modules: Iterable[str]) -> str:
    """A hint with the patterns nearest to `pattern` that match some of `names`, or with all names.

    modules: names of all modules, some of which may end as `pattern` says.
    """
    if pattern and any(fnmatchcase(module, f"*.{pattern}") for module in modules):
        return f"Did you mean '*.{pattern}'?"
    core = pattern.strip("*.")
    parts = core.split(".")
    nearest = registry.close(core, dict.fromkeys(_windows(parts, names))) if core else []
    tried = [pattern.replace(core, each) for each in nearest]
    found = [repr(each) for each in tried if any(fnmatchcase(name, each) for name in names)]
    return f"Did you mean {' or '.join(found)}?" if found else f"The model's linears are {in_short(names)}."


def _windows(parts: Sequence[str], names: Iterable[str]) -> Iterator[str]:
    """As many successive parts of each name as there are in `parts`, with the `*` of these for whole parts."""
    for name in names:
        own = name.split(".")
        for at in range(len(own) - len(parts) + 1):
            yield ".".join("*" if theirs == "*" else mine for theirs, mine in zip(parts, own[at:], strict=False))
