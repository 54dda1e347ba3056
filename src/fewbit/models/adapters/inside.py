"""An adapter of a language model, for a larger model with this language model inside.

    with named_in(folder, model, named) as place:     # a folder with an adapter for `model`

The language model of a GGUF file is a model of its own, and so are the adapters that are trained on it. With the file
of its vision tower, its weights have other names. A LoRA for the whole model has these names already, and stays.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from fewbit.formats.containers.safetensors import read_file, read_specs, write_file
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS
from fewbit.system.files import read_json, write_json

_BEFORE = "base_model.model."
_SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # settings that choose modules, too


@dataclass(frozen=True)
class Part:
    """The language model inside of a larger one. config: its own; named: gives the names of its tensors there."""

    config: Any
    named: Callable[[str], str]


@contextmanager
def named_in(folder: Path, model: nn.Module, named: Callable[[str], str]) -> Iterator[Path]:
    """A folder with the adapter in `folder`, whose names are those of `model`: `folder` itself if they are already."""
    keys = [key.partition(".lora_") for key in read_specs(folder / ADAPTER_WEIGHTS)]
    modules = list(dict.fromkeys(module.removeprefix(_BEFORE) for module, lora, _ in keys if lora))
    found = dict(model.named_modules())
    if any(module in found for module in modules):
        yield folder
        return
    tensors, metadata = read_file(folder / ADAPTER_WEIGHTS)
    renamed = {_BEFORE + named(key.removeprefix(_BEFORE)): tensor for key, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        write_json(out / ADAPTER, _config(read_json(folder / ADAPTER), modules, named))
        write_file(out / ADAPTER_WEIGHTS, renamed, metadata)
        yield out


def _config(lora: Mapping[str, Any], modules: Iterable[str], named: Callable[[str], str]) -> dict[str, Any]:
    """PEFT's config with each module by its whole name: those of a tower may end like those of the language model."""
    changed = {"target_modules": [named(module) for module in modules], **dict.fromkeys(_SELECTING)}
    for pattern in ("rank_pattern", "alpha_pattern"):
        values = lora.get(pattern) or {}
        keys = {module: get_pattern_key(list(values), module) for module in modules}
        changed[pattern] = {re.escape(named(module)): values[key] for module, key in keys.items() if key in values}
    return {**lora, **changed}
