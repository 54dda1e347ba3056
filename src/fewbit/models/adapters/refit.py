"""Adapters between a model with folded scales (AWQ) and its original: PEFT fits those it loads, marks those it saves.

An adapter belongs to the weights that it was trained on. Its folder says which scales those had (`scales.say`), else
PEFT's own record of the base model does. Where the model that it is put on has others, columns of A and rows of B are
multiplied by what lies between. Importing this module registers that with PEFT; `fewbit.hook` does so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft import peft_model
from torch import nn

from fewbit.errors import PlanError
from fewbit.models import scales
from fewbit.models.scales import Scales

_presumed: list[Scales] = []  # of the model that an adapter belongs to which does not say so


@contextmanager
def presumed(known: Scales | None) -> Iterator[None]:
    """Within, an adapter that does not say what it was trained on is taken as trained on a model with these scales."""
    if known is None:
        yield
        return
    _presumed.append(known)
    try:
        yield
    finally:
        _presumed.pop()


def fit(model: nn.Module, adapter: str, config: Any, folder: Path | None) -> None:
    """Change the loaded adapter of this name, which comes from `folder`, so that it fits the scales of `model`.

    PlanError where its kind cannot be moved. A warning where it may not fit and nothing says so.
    """
    here = scales.of_model(model)
    trained = _trained_on(model, here, config, folder)
    if trained is None or here is None:
        if (here is None or here) and (trained is not None or not _named(model, config)):
            warnings.warn(
                f"the adapter {folder or adapter} is taken as trained on this very model: "
                + ("it does not say so" if here is not None else "the model does not say which scales it holds")
                + ". On a model with other AWQ scales an adapter loses what it learned.",
                stacklevel=3,
            )
        return
    if trained.digest == here.digest:
        return
    if reason := _why_not(config):
        raise PlanError(
            f"the adapter {folder or adapter} was trained on a model whose AWQ scales differ from those of this one, "
            f"and {reason}",
            "Use it on the model that it was trained on.",
        )
    prefix = getattr(model, "base_model_prefix", "")
    for name, layer in model.named_modules():
        if adapter not in getattr(layer, "lora_A", ()):
            continue
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        _scale(layer, adapter, (trained.columns(names), here.columns(names)), (here.rows(names), trained.rows(names)))
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or config.base_model_name_or_path


def _scale(layer: Any, adapter: str, columns: tuple[Any, Any], rows: tuple[Any, Any]) -> None:
    """Divide columns of A, and rows of B, by the first of each pair, and multiply them by the second."""
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    with torch.no_grad():
        for parameter, factors in ((a.weight, columns), (b.weight.T, rows), (b.bias, rows)):
            for factor, power in zip(factors, (-1, 1), strict=True):
                if parameter is not None and factor is not None:
                    parameter.copy_(parameter.double() * factor.to(parameter.device).double() ** power)


def _trained_on(model: nn.Module, here: Scales | None, config: Any, folder: Path | None) -> Scales | None:
    """The scales of the model that the adapter was trained on; None where nothing says."""
    if folder is not None and (told := scales.said(folder)) is not None:
        return told
    base = str(config.base_model_name_or_path or "")
    if _named(model, config):
        return here
    if base and Path(base).is_absolute() and Path(base).is_dir():
        return scales.of_folder(Path(base))
    if here and base and base == here.origin:
        return Scales()
    if _presumed:
        return _presumed[-1]
    return here if here is not None and not here else None


def _named(model: Any, config: Any) -> bool:
    """Whether the adapter's config names this very model."""
    name = getattr(model, "name_or_path", None)
    return bool(name) and name == config.base_model_name_or_path


def _why_not(config: Any) -> str | None:
    """Why an adapter of this kind cannot be moved between scales; None if it can."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"only LoRA can be fitted to other scales, not {kind}"
    if getattr(config, "use_dora", False):
        return "DoRA's magnitudes hold for the weights that they were trained on"
    if getattr(config, "bias", "none") != "none":
        return f"bias={config.bias!r} replaces biases, which are scaled too"
    for name in ("modules_to_save", "target_parameters", "trainable_token_indices"):
        if getattr(config, name, None):
            return f"{name} replaces weights, which may be scaled too"
    return None


def register() -> None:
    """Let `PeftModel` fit each adapter that it loads, and say of each that it saves which scales it belongs to."""
    model: Any = peft_model.PeftModel
    load, save = model.load_adapter, model.save_pretrained

    @wraps(load)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        result = load(self, model_id, adapter_name, *args, **kwargs)
        folder = Path(model_id) / (kwargs.get("subfolder") or "")
        config = self.peft_config[adapter_name]
        fit(self.get_base_model(), adapter_name, config, folder.absolute() if folder.is_dir() else None)
        return result

    @wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_directory, *args, **kwargs)
        base = self.get_base_model()
        if known := scales.of_model(base):
            for name in kwargs.get("selected_adapters") or list(self.peft_config):
                folder = Path(save_directory) / ("" if name == "default" else name)
                if folder.is_dir():
                    scales.say(folder, known, str(getattr(base, "name_or_path", "")))
        return result

    model.load_adapter, model.save_pretrained = load_adapter, save_pretrained


register()
