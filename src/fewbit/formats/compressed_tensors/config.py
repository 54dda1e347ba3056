"""The `quantization_config` of compressed-tensors: which linear has which settings.

    quant_method    "compressed-tensors"
    format          the layout of all weights, or "mixed-precision": each group has a `format` of its own
    ignore          linears that no group claims, by name, or by "re:" and a pattern that matches from the start
    config_groups   name -> {targets, weights, input_activations, output_activations, format}

A target is the name of a linear, a pattern, or a class: "Linear" means every linear that no name and no pattern claims.
Source: compressed-tensors 0.20, `quantization/quant_config.py`, `quant_scheme.py`, `quant_args.py`, `utils/match.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbit.errors import FormatError

MIXED = "mixed-precision"
_GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGS_KEYS = (
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
)
_NO_PATTERN = re.compile(r"(?!)")
_WHERE = "in the quantization config"


@dataclass(frozen=True)
class Args:
    """The settings of weights.

    kind: "int" or "float". group: columns with one scale; 0: as `strategy` says. block: rows and columns with one
    scale. ordered: the file states the group of each column (act-order).
    """

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int = 0
    block: tuple[int, int] | None = None
    ordered: bool = False


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`. format: the layout of its weights; "" if the config does not state it."""

    name: str
    targets: tuple[str, ...]
    args: Args
    activations: Any
    format: str
    names: frozenset[str] = field(default=frozenset(), compare=False)
    pattern: re.Pattern[str] = field(default=_NO_PATTERN, compare=False)

    @property
    def is_class(self) -> bool:
        """Whether the group claims a whole class of modules, such as Linear."""
        return any(_is_class(target) for target in self.targets)

    def claim(self, module: str) -> int:
        """The rank of the group's claim on a linear: 3 by its name, 2 by a pattern, 1 by its class; 0: no claim."""
        return 3 if module in self.names else 2 if self.pattern.match(module) else int(self.is_class)


@dataclass(frozen=True)
class Groups:
    """The groups of a config, and the linears that it ignores."""

    groups: tuple[Group, ...]
    ignored: Group

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Groups:
        """FormatError that names the key if the config is malformed or has what fewbit does not read."""
        if config.get("transform_config"):
            raise FormatError("compressed-tensors with rotated weights (transform_config) are not supported")
        sparsity = config.get("sparsity_config")
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise FormatError(f"compressed-tensors: sparse weights (sparsity_config: {sparsity['format']!r})")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise FormatError(f"config_groups = {groups!r} {_WHERE}: an object of groups expected")
        form = config.get("format")
        if not isinstance(form, (str, type(None))):
            raise FormatError(f"format = {form!r} {_WHERE} is not a string")
        found = [_group(str(name), entry, "" if form in (None, MIXED) else str(form)) for name, entry in groups.items()]
        ignored = _matching("ignore", _texts(config.get("ignore") or [], "ignore"))
        return cls(tuple(group for group in found if group is not None), ignored)

    def claiming(self, module: str) -> list[Group]:
        """The groups with the highest claim on a linear. More than one is a fault of the config."""
        claims = {group.name: group.claim(module) for group in self.groups}
        most = max(claims.values(), default=0)
        return [group for group in self.groups if most and claims[group.name] == most]

    def for_module(self, module: str) -> Group:
        """The group of a linear with quantized weights. FormatError if there is none, or if two claim it."""
        found = self.claiming(module)
        if not found and len(self.groups) == 1:
            return self.groups[0]  # names may have changed since the config was written
        if not found:
            raise FormatError(f"{module} is quantized, but no targets of config_groups {_WHERE} match it")
        if len(found) > 1:
            names = " and ".join(group.name for group in found)
            raise FormatError(f"{module} is in the targets of {names} in config_groups {_WHERE}: one group expected")
        return found[0]

    def check(self, quantized: Iterable[str], plain: Iterable[str]) -> None:
        """FormatError if the config and the weights contradict each other.

        quantized: modules with quantized weights. plain: other modules with a weight matrix.
        """
        packed, others = list(quantized), list(plain)
        for module in packed:
            self.for_module(module)
        for group in self.groups:
            if not group.is_class and not any(group.claim(module) for module in (*packed, *others)):
                raise FormatError(
                    f"config_groups: targets of {group.name} {_WHERE} match no weight: {', '.join(group.targets)}"
                )
        routed = {module.rpartition(".experts.")[0] for module in packed if ".experts." in module}
        for module in others:
            parent, _, leaf = module.rpartition(".")
            if self.ignored.claim(module) > 1 or "embed" in leaf or leaf in ("wte", "wpe"):
                continue
            claims = self.claiming(module)
            if claims and (claims[0].claim(module) > 1 or parent in routed):
                raise FormatError(
                    f"{module}.weight is not quantized, but the targets of {claims[0].name} in config_groups {_WHERE} "
                    "match it and ignore does not",
                    f'Add "{module}" to ignore in config.json.',
                )


def _group(name: str, entry: Any, form: str) -> Group | None:
    """One group; None if it quantizes no weights. form: the format of the whole config."""
    where = f"config_groups: {name}"
    if isinstance(entry, list):  # "W4A16": ["Linear"]
        if (preset := _preset(name)) is None:
            raise FormatError(f"{where} {_WHERE}: unknown preset", "Known: W4A16, FP8_DYNAMIC, NVFP4 and the like.")
        entry = {"targets": entry, **preset}
    if not isinstance(entry, Mapping):
        raise FormatError(f"{where} {_WHERE} is {entry!r}: an object expected")
    _known(entry, _GROUP_KEYS, where)
    targets = _texts(entry.get("targets"), f"{where}: targets")
    if not targets:
        raise FormatError(f"{where}: targets {_WHERE} is empty")
    own = entry.get("format") or form
    if not isinstance(own, str):
        raise FormatError(f"{where}: format = {own!r} {_WHERE} is not a string")
    for key in ("input_activations", "output_activations"):
        if (given := entry.get(key)) is not None:
            _known(_object(given, f"{where}: {key}"), _ARGS_KEYS, f"{where}: {key}")
    if entry.get("weights") is None:
        return None
    args = _args(_object(entry["weights"], f"{where}: weights"), f"{where}: weights")
    made = _matching(name, targets)
    return Group(name, made.targets, args, entry.get("input_activations"), own, made.names, made.pattern)


def _args(data: Mapping[str, Any], where: str) -> Args:
    _known(data, _ARGS_KEYS, where)

    def wrong(key: str, expected: str) -> FormatError:
        return FormatError(f"{where}: {key} = {data.get(key)!r} {_WHERE}: {expected} expected")

    width, kind, symmetric = data.get("num_bits", 8), data.get("type", "int"), data.get("symmetric", True)
    if type(width) is not int or not 1 <= width <= 8:
        raise wrong("num_bits", "1 to 8")
    if kind not in ("int", "float"):
        raise wrong("type", "int or float")
    if not isinstance(symmetric, bool):
        raise wrong("symmetric", "true or false")
    group, strategy, block = data.get("group_size"), data.get("strategy"), data.get("block_structure")
    if group is not None and (type(group) is not int or group < -1 or not group):
        raise wrong("group_size", "a positive integer, or -1 for a row,")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group < 0 else "group"
    if strategy not in ("tensor", "channel", "group", "block", "tensor_group"):
        raise wrong("strategy", "tensor, channel, group, block or tensor_group")
    if strategy in ("group", "tensor_group") and (group is None or group < 0):
        raise wrong("group_size", f"a positive integer for the strategy {strategy}")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise wrong("block_structure", "two positive integers")
    if strategy == "block" and block is None:
        raise wrong("block_structure", "two positive integers for the strategy block")
    order = data.get("actorder")
    if order not in (None, False, True, "weight", "static", "group", "dynamic"):
        raise wrong("actorder", "null, weight or group")
    return Args(
        bits=width,
        kind=kind,
        symmetric=symmetric,
        strategy=strategy,
        group=group if group and strategy in ("group", "tensor_group") else 0,
        block=(block[0], block[1]) if strategy == "block" and block else None,
        ordered=order in (True, "group", "dynamic"),
    )


def _preset(name: str) -> dict[str, Any] | None:
    """The settings of a preset of compressed-tensors 0.20; None if fewbit knows none of this name."""
    name = name.upper()
    token = {"num_bits": 8, "strategy": "token", "dynamic": True}
    if match := re.fullmatch(r"W([2-8])A16(_ASYM)?", name):
        size: dict[str, Any] = {"strategy": "group", "group_size": 128} if match[1] == "4" else {"strategy": "channel"}
        return {"weights": {"num_bits": int(match[1]), "type": "int", "symmetric": not match[2], **size}}
    if name in ("W8A8", "INT8"):
        weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        return {"weights": weights, "input_activations": {**token, "type": "int"}}
    fp8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    acts = {
        "FP8": {**fp8, "strategy": "tensor", "dynamic": False},
        "FP8_DYNAMIC": {**token, "type": "float"},
        "FP8_BLOCK": {**fp8, "strategy": "group", "group_size": 128, "dynamic": True},
    }
    how = {"FP8": {"strategy": "tensor"}, "FP8_DYNAMIC": {"strategy": "channel"}}
    if name in acts:
        block = {"strategy": "block", "block_structure": [128, 128]}
        return {"weights": {**fp8, **how.get(name, block)}, "input_activations": acts[name]}
    fp4: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True}
    if name in ("NVFP4", "NVFP4A16"):
        weights = {**fp4, "strategy": "tensor_group", "group_size": 16}
        return {"weights": weights, "input_activations": {**weights, "dynamic": "local"} if name == "NVFP4" else None}
    if name in ("MXFP4", "MXFP4A16"):
        weights = {**fp4, "strategy": "group", "group_size": 32}
        return {"weights": weights, "input_activations": {**weights, "dynamic": True} if name == "MXFP4" else None}
    return None


def _matching(name: str, entries: Sequence[str]) -> Group:
    """A group that claims modules by `entries`, without settings."""
    patterns = []
    for entry in entries:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise FormatError(f"{name}: {entry!r} {_WHERE} is not a regular expression: {error}") from None
            patterns.append(f"(?:{entry[3:]})")
    args = Args(8, "int", symmetric=True, strategy="channel")
    joined = re.compile("|".join(patterns)) if patterns else _NO_PATTERN
    return Group(name, tuple(entries), args, None, "", frozenset(entries), joined)


def _is_class(target: str) -> bool:
    return target[:1].isupper() and "." not in target


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise FormatError(f"{where} {_WHERE} is {value!r}: an object expected")
    return value


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise FormatError(f"{where} {_WHERE} is {value!r}: a list of strings expected")
    return value


def _known(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise FormatError(f"{where}: unknown key {key!r} {_WHERE}", f"Known: {', '.join(known)}.")


def patterns(modules: Mapping[str, Any], others: Sequence[str] = ()) -> dict[Any, list[str]]:
    """Value -> targets that match exactly the modules with that value, and none of the modules `others`.

    Modules that differ in numbers alone (layers, experts) share a pattern if they have the same value. A pattern leaves
    out what comes before the first number where it can, because servers may have another prefix.

    >>> patterns({"a.h.0.q": 4, "a.h.1.q": 4, "a.h.0.v": 4, "a.h.1.v": 8})
    {4: ['re:.*h\\\\.\\\\d+\\\\.q$', 'a.h.0.v'], 8: ['a.h.1.v']}
    """
    families: dict[str, list[str]] = {}
    for module in modules:
        families.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "#", module), []).append(module)
    found: dict[Any, list[str]] = {value: [] for value in modules.values()}
    everything = [*modules, *others]
    for family, members in families.items():
        value = modules[members[0]]
        if len(members) > 1 and all(modules[each] == value for each in members):
            whole = re.escape(family).replace("\\#", r"\d+")
            short = f".*{re.escape(_from_number(family))}".replace("\\#", r"\d+")
            for pattern in (short, whole):
                matched = [each for each in everything if re.match(f"{pattern}$", each)]
                if len(matched) == len(members):
                    found[value].append(f"re:{pattern}$")
                    break
            else:
                found[value] += members
        else:
            for each in members:
                found[modules[each]].append(each)
    return found


def _from_number(family: str) -> str:
    """The part of a name from the word before its first number: `layers.#.mlp.up_proj`."""
    parts = family.split(".")
    return ".".join(parts[max(parts.index("#") - 1, 0) :])
