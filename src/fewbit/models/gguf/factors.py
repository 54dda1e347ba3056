"""Numbers by which a model multiplies activations, multiplied into the weights beside them.

Falcon-H1 multiplies what enters and leaves its layers by numbers of config.json. llama.cpp has no keys for them: its
converter multiplies them into the weights. So does fewbit before it measures or quantizes anything. The model that it
then sees has 1 in their place, and gives the same outputs.

    made = taken(config)                     # weight -> factor, [1] or [rows, 1]; config has 1 in place of the numbers
    multiply(checkpoint, name_of, made)      # its tensors are then multiplied when they are read
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.architectures import of_config
from fewbit.models.gguf.names import names_of, routes
from fewbit.schemes.base import PartSpec


def taken(config: Any) -> dict[str, Tensor]:
    """The factor of each weight that has one, float32 [1] or [rows, 1], by its name in the model.

    config: transformers' config object; the numbers become 1. PlanError if tied weights need different factors.
    """
    arch = of_config(config)
    if arch is None or all(getattr(config, key) == factor.neutral for key, factor in arch.factors.items()):
        return {}
    ours, made = names_of(routes(config)), dict[str, Tensor]()
    for name, factor in _of_tensors(config, arch):
        for block in ["", *(f"blk.{layer}." for layer in range(config.num_hidden_layers))]:
            for weight in ours.get(f"{block}{name}.weight", ()):
                made[weight] = made.get(weight, torch.ones(1, dtype=torch.float32, device="cpu")) * factor
    _check_ties(config, arch, made)
    for key, each in arch.factors.items():
        setattr(config, key, each.neutral)
    return {weight: factor for weight, factor in made.items() if bool((factor != 1).any())}


def _of_tensors(config: Any, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Names in the file and factors; a name may come several times."""
    for key, each in arch.factors.items():
        numbers = torch.tensor(getattr(config, key), dtype=torch.float32, device="cpu").reshape(-1)
        if each.rows:
            rows = [prod(getattr(config, entry) for entry in entries) for entries in each.rows]
            counts = torch.tensor(rows, dtype=torch.int64, device="cpu")
            yield each.tensors[0], numbers.repeat_interleave(counts)[:, None]
        else:
            yield from zip(each.tensors, numbers if each.each else numbers.expand(len(each.tensors)), strict=True)


def _check_ties(config: Any, arch: Architecture, made: dict[str, Tensor]) -> None:
    names = {ours: f"{theirs}.weight" for theirs, ours in arch.model.items()}
    one, other = (float(made[names[each]]) if names[each] in made else 1.0 for each in ("token_embd", "output"))
    if config.tie_word_embeddings and one != other:
        raise PlanError(
            f"a GGUF file of {arch.name} has factors in its weights; here the tied embedding and head need {one} and "
            f"{other}"
        )


def multiply(checkpoint: Checkpoint, name_of: Mapping[str, str], made: Mapping[str, Tensor]) -> dict[str, PartSpec]:
    """Multiply the factors into the tensors of a checkpoint. Returns the specs that these have in the files.

    name_of: names in the checkpoint -> in the model. The products are float32.
    """
    before = {key: checkpoint.specs[key] for key, name in name_of.items() if name in made}
    for key, spec in before.items():
        own = Multiplied(checkpoint.slice(key), made[name_of[key]])
        checkpoint.add(key, PartSpec(spec.shape, torch.float32), own)
    return before


@dataclass(frozen=True)
class Multiplied:
    """A lazy handle of a tensor times a factor, float32."""

    handle: Any
    factor: Tensor

    def __getitem__(self, index: Any) -> Tensor:
        whole: Tensor = self.handle[...].float() * self.factor
        return whole[index]

    def get_shape(self) -> list[int]:
        shape: list[int] = self.handle.get_shape()
        return shape
