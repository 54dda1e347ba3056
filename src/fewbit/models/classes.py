"""The class of a language model: the one that `architectures` in config.json names.

A config can describe a model that has a text-only class too, such as Qwen3.5's. `AutoModelForCausalLM` would then build
the text-only class and leave out the vision tower.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from fewbit.errors import PlanError

_AUTOS: tuple[Any, ...] = tuple(
    getattr(transformers, name)
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    if hasattr(transformers, name)
)
# For a config without `architectures`: first the classes that keep every part of the model.
_WHOLE = (*_AUTOS[1:], AutoModelForCausalLM)


def class_for(config: Any) -> Any:
    """The auto class, or the class of transformers, that builds and loads the model that `config` describes.

    PlanError for an encoder-decoder model without a head that generates text.
    """
    named = str(next(iter(getattr(config, "architectures", None) or ()), None))
    if named in _offered(AutoModelForCausalLM, config):
        return AutoModelForCausalLM
    for auto in _AUTOS:
        if named in _offered(auto, config):
            return auto
    own = getattr(transformers, named, None)
    if (
        isinstance(own, type)
        and issubclass(own, PreTrainedModel)
        and issubclass(own, GenerationMixin)
        and own.config_class is type(config)
    ):
        return own
    if getattr(config, "is_encoder_decoder", False) and hasattr(transformers, named):
        raise PlanError(f"{named} is an encoder-decoder model that generates no text, and cannot be quantized")
    return next((auto for auto in _WHOLE if any(_offered(auto, config))), AutoModelForCausalLM)


def build(config: Any, **options: Any) -> PreTrainedModel:
    """The model that `config` describes, with new weights. options: of `from_config`. PlanError as `class_for`."""
    maker = class_for(config)
    if hasattr(maker, "from_config"):
        made = maker.from_config(config, **options)
    else:  # a class of transformers; the code of the model is there
        options.pop("trust_remote_code", None)
        made = maker._from_config(config, **options)
    assert isinstance(made, PreTrainedModel)
    return made


def model_class(config: Any) -> type[PreTrainedModel] | None:
    """The class of the model that `config` describes; None if it is remote code."""
    maker = class_for(config)
    if not hasattr(maker, "from_config"):
        return maker  # type: ignore[no-any-return]
    if (getattr(config, "auto_map", None) or {}).get(maker.__name__) or type(config) not in maker._model_mapping:
        return None
    known = maker._model_mapping[type(config)]
    return known[0] if isinstance(known, tuple) else known  # type: ignore[no-any-return]


def other_class(config: Any, model: PreTrainedModel) -> str | None:
    """The class that `config` names, if it is not that of `model`; None otherwise.

    A model without a language model's head, such as a classifier, is built as the language model of its type.
    """
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    return None if named in (None, type(model).__name__) else str(named)


def why_no_forward(model: PreTrainedModel) -> str | None:
    """Why `model` has no forward pass; None if it has one."""
    if type(model).forward is nn.Module.forward:
        return f"{type(model).__name__} has no forward pass over text: it is made of several models"
    return None


def needed(model: PreTrainedModel) -> list[str]:
    """The arguments besides token ids that the signature of the forward pass requires."""
    return [
        name
        for name, parameter in list(inspect.signature(type(model).forward).parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name != "input_ids"
    ]


def _offered(auto: Any, config: Any) -> Iterator[str]:
    """The names of the classes that the class `auto` has for `config`."""
    code = getattr(config, "auto_map", None) or {}
    if isinstance(reference := code.get(auto.__name__), str):
        yield reference.rpartition(".")[2]
    if type(config) in auto._model_mapping:
        known = auto._model_mapping[type(config)]
        yield from (each.__name__ for each in (known if isinstance(known, tuple) else (known,)))
