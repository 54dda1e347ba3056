"""Move adapters between a model with folded AWQ scales and its original.

An adapter only fits the weights that it was trained on. Its folder records the scales of those weights
(`scales.write_record`); without that record, PEFT's `base_model_name_or_path` tells. If the model that loads the
adapter has other scales, columns of A and rows of B are multiplied by the ratio of the two. Importing this module makes
PEFT rescale each adapter that it loads, and record the scales beside each that it saves; `fewbit.hook` imports it with
PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import peft_model
from torch import nn

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile, is_gguf
from fewbit.models import scales
from fewbit.models.patching import replace
from fewbit.models.scales import Scales
from fewbit.models.source import name_of, only_gguf

_presumed: list[Scales] = []  # stack: the scales to assume for an adapter without a record


@contextmanager
def presumed(known: Scales | None) -> Iterator[None]:
    """Inside this context, an adapter without a record counts as trained on a model with these scales."""
    if known is None:
        yield
        return
    _presumed.append(known)
    try:
        yield
    finally:
        _presumed.pop()


def fit(model: nn.Module, adapter: str, config: Any, folder: Path | None) -> None:
    """Rescale the loaded adapter named `adapter`, read from `folder`, to the scales of `model`, in place.

    PlanError if this kind of adapter cannot be rescaled. A warning if the scales of the adapter or of the model are
    unknown, so that the adapter may not fit.
    """
    here, base = scales.of_model(model), _base(config)
    trained = _trained_on(model, here, config, folder)
    if trained is None or here is None:
        if trained is not None or not _named(model, config):
            unknown = "it does not record its model" if base is None else f"{base} does not record its AWQ scales"
            warnings.warn(
                f"the adapter {folder or adapter} is assumed to be trained on this very model: "
                + (unknown if here is not None else "the model does not record its AWQ scales")
                + ". On a model with other AWQ scales an adapter loses what it learned.",
                stacklevel=4,
            )
        return
    if trained.digest == here.digest:
        return
    if base is not None and str(base) != config.base_model_name_or_path and not _recorded(folder):
        warnings.warn(
            f"the adapter {folder or adapter} names its model {config.base_model_name_or_path!r}, which is taken to be "
            f"{base}: the adapter is rescaled from that model's AWQ scales",
            stacklevel=4,
        )
    if reason := _why_not(config):
        raise PlanError(
            f"the adapter {folder or adapter} was trained on a model whose AWQ scales differ from this model's, "
            f"and {reason}",
            "Use it on the model that it was trained on.",
        )
    prefix = getattr(model, "base_model_prefix", "")
    for name, layer in model.named_modules():
        if adapter not in getattr(layer, "lora_A", ()):
            continue
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        _scale(layer, adapter, (trained.columns(names), here.columns(names)), (here.rows(names), trained.rows(names)))
    config.base_model_name_or_path = name_of(model) or config.base_model_name_or_path


def _scale(layer: Any, adapter: str, columns: tuple[Any, Any], rows: tuple[Any, Any]) -> None:
    """Divide columns of A, and rows and bias of B, by the first of each pair of factors; multiply by the second."""
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    with torch.no_grad():
        for parameter, factors in ((a.weight, columns), (b.weight.T, rows), (b.bias, rows)):
            for factor, power in zip(factors, (-1, 1), strict=True):
                if parameter is not None and factor is not None:
                    parameter.copy_(parameter.double() * factor.to(parameter.device).double() ** power)


def _trained_on(model: nn.Module, here: Scales | None, config: Any, folder: Path | None) -> Scales | None:
    """The scales of the model that the adapter was trained on; None if unknown."""
    if (recorded := _recorded(folder)) is not None:
        return recorded
    if _named(model, config):
        return here
    name, base = config.base_model_name_or_path, _base(config)
    if base is not None and Path(name).is_absolute():
        return _folded(base)
    if here and name and name == here.origin:
        return Scales()
    if _presumed:
        return _presumed[-1]
    if base is not None:
        return _folded(base)
    return here if here is not None and not here else None


def _recorded(folder: Path | None) -> Scales | None:
    return None if folder is None else scales.read_record(folder)


def _folded(base: Path) -> Scales | None:
    """The scales in the files of a model; None if they are unknown, as those of a folder with several GGUF files."""
    if base.is_dir() and not (base / "config.json").is_file():
        try:
            base = only_gguf(base) or base
        except FormatError:
            return None
    return scales.of_metadata(GgufFile(base).metadata) if base.is_file() else scales.of_folder(base)


def _base(config: Any) -> Path | None:
    """The folder or GGUF file of the model that the adapter was trained on, if it is on this machine. As in PEFT, a
    relative name counts from the current folder."""
    if not config.base_model_name_or_path:
        return None
    folder = Path(config.base_model_name_or_path).absolute()
    if folder.is_file() and is_gguf(folder):
        return folder
    return folder if (folder / "config.json").is_file() or any(folder.glob("*.gguf")) else None


def _named(model: Any, config: Any) -> bool:
    """Whether the adapter's config names this very model."""
    name, base = name_of(model), _base(config)
    if not name:
        return False
    return bool(name == config.base_model_name_or_path or (base and Path(name).exists() and base.samefile(name)))


def _why_not(config: Any) -> str | None:
    """Why this kind of adapter cannot be rescaled; None if it can."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"only LoRA can be rescaled, not {kind}"
    if getattr(config, "use_dora", False):
        return "DoRA's magnitudes only fit the weights that they were trained on"
    if getattr(config, "bias", "none") != "none":
        return f"bias={config.bias!r} replaces biases, which AWQ scales too"
    for name in ("modules_to_save", "target_parameters", "trainable_token_indices"):
        if getattr(config, name, None):
            return f"{name} replaces weights, which AWQ may scale too"
    return None


def register() -> None:
    """Make `PeftModel` rescale each adapter that it loads, and record the model's scales beside each that it saves."""
    replace(peft_model.PeftModel, "load_adapter", _load_adapter)
    replace(peft_model.PeftModel, "save_pretrained", _save_pretrained)


def _load_adapter(theirs: Any, self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    result = theirs(self, model_id, adapter_name, *args, **kwargs)
    folder = Path(model_id) / (kwargs.get("subfolder") or "")
    config = self.peft_config[adapter_name]
    fit(self.get_base_model(), adapter_name, config, folder.absolute() if folder.is_dir() else None)
    return result


def _save_pretrained(theirs: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    base = self.get_base_model()
    for config in self.peft_config.values():
        if config.base_model_name_or_path in (None, getattr(base, "name_or_path", None)):  # PEFT fills in None
            config.base_model_name_or_path = name_of(base) or None
    result = theirs(self, save_directory, *args, **kwargs)
    if known := scales.of_model(base):
        for name in kwargs.get("selected_adapters") or list(self.peft_config):
            folder = Path(save_directory) / ("" if name == "default" else name)
            if folder.is_dir():
                scales.write_record(folder, known, name_of(base))
    return result


register()
