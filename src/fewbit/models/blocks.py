"""Find the blocks (decoder layers) of a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fewbit.errors import PlanError


def find_blocks(model: PreTrainedModel) -> list[str]:
    """Names of the decoder layers: the members of the language model's largest `nn.ModuleList`. PlanError without one.

    A vision or audio tower may have a larger list. So a list outside the decoder, in a model without token embedding,
    inside another list, or of another length than config.json says, counts only if there is no better one. Lists of the
    same model that are as good and have the same kind of blocks count, too: HRM has two.
    """
    decoder: Any = model.get_decoder()
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    apart, count = towers(model), getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    ranks: dict[str, tuple[bool, bool, bool, bool, int]] = {}
    for name, module in lists.items():
        own = (
            f"{name}.".startswith(f"{inside}." if inside else ""),
            not f"{name}.".startswith(apart),
            not any(name.startswith(f"{outer}.") for outer in lists),
            len(module) == count,
            sum(p.numel() for p in module.parameters()),
        )
        if own[-1]:
            ranks[name] = own
    if not ranks:
        raise PlanError(f"{type(model).__name__} has no list of blocks (decoder layers), so it cannot be quantized")
    best = max(ranks, key=lambda name: ranks[name])
    alike = [
        name
        for name in ranks
        if ranks[name][:-1] == ranks[best][:-1]
        and type(lists[name][0]) is type(lists[best][0])
        and _model_around(model, name) is _model_around(model, best)
    ]
    return [f"{name}.{i}" for name in alike for i in range(len(lists[name]))]


def _model_around(model: PreTrainedModel, name: str) -> nn.Module:
    """The innermost model that contains the module `name`."""
    around: nn.Module = model
    for end in (place for place, each in enumerate(name) if each == "."):
        module = model.get_submodule(name[:end])
        around = module if isinstance(module, PreTrainedModel) else around
    return around


def towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Name prefixes of the models inside of `model` that do not contain its token embedding."""
    if (embedding := embedding_of(model)) is None:
        return ()
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and all(inner is not embedding for inner in module.modules())
    )


def embedding_of(model: PreTrainedModel) -> Any:
    """The token embedding of `model`; None if the model does not say which module it is."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None
