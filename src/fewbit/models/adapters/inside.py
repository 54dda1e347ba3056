"""An adapter of a language model, for a larger model with this language model inside.

    with named_in(folder, model, named) as place:     # a folder with an adapter for `model`

The language model of a GGUF file is a model of its own, and so are the adapters that are trained on it. With the file
of its vision tower, its weights have other names. An adapter for the whole model has these names already, and stays.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from fewbit.errors import PlanError
from fewbit.formats.containers.safetensors import read_file, read_specs, write_file
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS
from fewbit.system.files import read_json, write_json

_BEFORE = "base_model.model."
# peft_type -> how the names of its tensors begin
_TENSORS = {"LORA": "lora_", "IA3": "ia3_", "LOHA": "hada_", "LOKR": "lokr_", "VERA": "vera_"}
_SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # settings that choose modules, too


@dataclass(frozen=True)
class Part:
    """The language model inside of a larger one. config: its own; named: gives the names of its tensors there."""

    config: Any
    named: Callable[[str], str]


@contextmanager
def named_in(folder: Path, model: nn.Module, named: Callable[[str], str]) -> Iterator[Path]:
    """A folder with the adapter in `folder`, whose names are those of `model`: `folder` itself if they are already.

    PlanError if the adapter is for the language model, and of a type whose names are not known.
    """
    config = read_json(folder / ADAPTER)
    kind, specs = str(config.get("peft_type")), read_specs(folder / ADAPTER_WEIGHTS)
    found, keys = dict(model.named_modules()), [key.removeprefix(_BEFORE) for key in specs if key.startswith(_BEFORE)]
    if any(owner in found and named(owner) not in found for key in keys for owner in _owners(key)):
        yield folder
        return
    if kind not in _TENSORS:
        raise PlanError(
            f"{folder}: an adapter of type {kind} is not attached to a language model inside of a vision model",
            f"Use it with the language model alone. Types that are attached: {', '.join(_TENSORS)}.",
        )
    parts = [key.partition(f".{_TENSORS[kind]}") for key in keys]
    modules = list(dict.fromkeys(name.partition(".base_layer")[0] for name, mark, _ in parts if mark))
    saved = [name for name, mark, _ in parts if not mark]
    tensors, metadata = read_file(folder / ADAPTER_WEIGHTS)
    renamed = {
        _BEFORE + named(key.removeprefix(_BEFORE)) if key.startswith(_BEFORE) else key: tensor
        for key, tensor in tensors.items()
    }
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        write_json(out / ADAPTER, _config(config, modules, saved, named))
        write_file(out / ADAPTER_WEIGHTS, renamed, metadata)
        yield out


def _owners(key: str) -> list[str]:
    """The names of all modules that the tensor of this name may be in, from the outermost."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _config(
    adapter: Mapping[str, Any], modules: Sequence[str], saved: Sequence[str], named: Callable[[str], str]
) -> dict[str, Any]:
    """PEFT's config with each module by its whole name: those of a tower may end like those of the language model.

    modules: those with tensors of the adapter. saved: names of other tensors, which replace those of the model.
    """
    entries = adapter.get("target_parameters") or []
    owned = {
        f"{named(module)}.{leaf}": module
        for owner, _, leaf in (entry.rpartition(".") for entry in entries)
        for module in modules
        if _ends(module, owner)
    }
    linears = [module for module in modules if module not in owned.values()]
    changed: dict[str, Any] = {key: None for key in _SELECTING if key in adapter}
    changed["target_modules"] = [named(module) for module in linears]
    if entries:
        changed["target_parameters"] = list(owned)
    if forward := adapter.get("feedforward_modules"):
        changed["feedforward_modules"] = [
            named(module)
            for module in linears
            if (re.fullmatch(forward, module) if isinstance(forward, str) else any(map(module.endswith, forward)))
        ]
    if kept := adapter.get("modules_to_save"):
        whole = {owner for key in saved for owner in _owners(key) if any(_ends(owner, end) for end in kept)}
        changed["modules_to_save"] = sorted(map(named, whole)) or kept
    for pattern in ("rank_pattern", "alpha_pattern"):
        if values := adapter.get(pattern):
            keys = {module: get_pattern_key(list(values), module) for module in modules}
            changed[pattern] = {re.escape(named(module)): values[key] for module, key in keys.items() if key in values}
    return {**adapter, **changed}
