"""Lets `AutoModelForImageTextToText` load a folder with a GGUF model and its vision tower.

transformers gets the config of the language model alone, and refuses it. `fewbit.hook` applies this patch when the
module of the auto classes is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from fewbit.errors import PlanError
from fewbit.models.patching import replace
from fewbit.models.plugin.patch_gguf_config import LOCATING, named

_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def _of_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say where a config is."""
    return {key: value for key, value in options.items() if key in (*LOCATING, "gguf_file", "trust_remote_code")}


def register() -> None:
    """Give the classes a method of their own. PlanError for a GGUF model without a tower."""
    for name in _CLASSES:
        if (cls := getattr(modeling_auto, name, None)) is not None:
            replace(cls, "from_pretrained", _from_pretrained)


def _from_pretrained(theirs: Any, kind: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    place = pretrained_model_name_or_path  # the parameter keeps transformers' name: callers may pass it by keyword
    config = kwargs.pop("config", None)  # pipelines give that of the language model
    file = None if type(config) in kind._model_mapping else named(place, kwargs)
    if file is None:
        return theirs(kind, place, *args, config=config, **kwargs)
    from fewbit.models.plugin.patch_processor import with_tower  # imports AutoProcessor

    if (found := with_tower(place, kwargs)) is None:
        own = config or AutoConfig.from_pretrained(place, **_of_config(kwargs))
        if type(own) in kind._model_mapping:
            return theirs(kind, place, *args, config=config, **kwargs)
        raise PlanError(
            f"{place}: {file} is a language model of type {own.model_type}, and {kind.__name__} needs a vision "
            "tower, too",
            "Name a folder with both files and without `gguf_file`, or use fewbit.load(file, mmproj=...). "
            "AutoModelForCausalLM loads the language model.",
        )
    from fewbit.models.plugin.serving import serving

    options = {**kwargs, **found.options}
    with serving(tower=found.mmproj):
        return theirs(kind, place, *args, config=AutoConfig.for_model(**found.config), **options)


register()
