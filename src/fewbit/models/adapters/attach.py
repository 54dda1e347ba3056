"""Load PEFT adapters onto a model, after a check that they fit it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile, is_gguf
from fewbit.formats.containers.safetensors import read_specs
from fewbit.models import scales
from fewbit.models.adapters.as_gguf import KEY, as_folder, opened, recorded
from fewbit.models.adapters.inside import Part, named_in
from fewbit.models.experts import is_of_expert, like_experts, separate
from fewbit.models.gguf.rows.towers import ROWS
from fewbit.models.linears import LINEARS, shape_of
from fewbit.models.scales import Scales
from fewbit.models.source import Source
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS, check_adapter
from fewbit.nn.layers import QEmbedding
from fewbit.system.files import read_json

_EMBEDDINGS = (nn.Embedding, QEmbedding)


def attach(model: PreTrainedModel, adapter: str | Path, part: Part | None = None) -> Any:
    """Load an adapter, a folder or a GGUF file, onto `model` with PEFT, in evaluation mode.

    part: the language model in `model` that the adapter may be for; None: the adapter is for `model`.
    If the adapter has weights for single experts, or for modules named as theirs, the experts of `model` get linears of
    their own first. PlanError if it does not exist, or if it belongs to another model; the message lists the tensors
    and shapes that differ. FormatError if its files are missing or broken, or if PEFT does not find all its weights.
    """
    place, config = Path(adapter).absolute(), model.config if part is None else part.config
    with (
        as_folder(place, config) if place.is_file() else nullcontext(place) as folder,
        nullcontext(folder) if part is None else named_in(folder, model, part.named) as named,
    ):
        return _attached(model, named, place)


def _attached(model: PreTrainedModel, folder: Path, place: Path) -> Any:
    """The model with the adapter in `folder`, which the user named `place`."""
    config = read_config(folder)
    modules = {key.partition(".lora_")[0] for key in read_specs(folder / ADAPTER_WEIGHTS)}
    if any(map(is_of_expert, modules)) or like_experts(model, modules):
        separate(model)  # PEFT takes any module with the name of an expert's for one of fused experts
    check_fits(model, folder, place, config)
    try:
        with quiet():
            # PEFT renames the experts of some model types in loading, as if they were fused. It must not lose them.
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder, torch_device=str(model.device)).eval()
    except (ValueError, TypeError, RuntimeError, KeyError, UserWarning) as error:
        raise FormatError(f"{place} could not be loaded: {str(error).strip().splitlines()[0][:300]}") from error


def check_fits(model: PreTrainedModel, folder: Path, place: Path, config: Mapping[str, Any]) -> None:
    """PlanError if the adapter in `folder`, with this PEFT config, has matrices that fit no weight of `model`.

    place: the user's name for it.
    """
    check_experts(model, place, config)
    if differing := _differing(model, folder):
        if _is_of_whole(model, folder):
            raise PlanError(
                f"{place} is an adapter for a whole vision model, and this is its language model alone",
                "`load` and `generate` use the whole model with `mmproj`, the file of the vision tower.",
            )
        more = f"\n  and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise PlanError(
            f"{place} is an adapter for another model ({config.get('base_model_name_or_path')}):\n  "
            + "\n  ".join(differing[:8])
            + more
        )


def check_experts(model: PreTrainedModel, place: Path, config: Mapping[str, Any]) -> None:
    """PlanError if an adapter with this PEFT config adapts fused parameters of experts that `model` has separate.

    place: the user's name for it.
    """
    if fused := _fused(model, config):
        raise PlanError(
            f"{place} adapts the fused parameters {', '.join(fused)}, and in this model each expert has linears of "
            "its own",
            f"Put it into the weights: `fewbit merge ORIGINAL {place.name} -o OUT --plan PLAN`, where ORIGINAL is the "
            "model before it was quantized. Or train another on this model: `fewbit finetune` adapts the linears of "
            "all experts.",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Inside this context, PEFT does not warn of renamed arguments of transformers, or of `fan_in_fan_out`, which it
    corrects itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        yield


def folded(source: Source) -> Scales | None:
    """The scales that AWQ folded into a model. None if it has, or may have, scales that its files do not record."""
    if source.gguf is not None:
        return scales.of_metadata(GgufFile(source.files[0]).metadata)
    return scales.of_folder(source.beside)


def check(adapter: Path) -> None:
    """Check an adapter, a folder or a GGUF file, without its model. PlanError if there is none, or FormatError."""
    if not adapter.is_file():
        read_config(adapter)
    elif is_gguf(adapter):
        opened(adapter)
    else:
        raise PlanError(f"adapter {adapter}: this is a file", "Give a .gguf file, or the folder that PEFT has written.")


def trained_on(adapter: str | Path) -> Scales | None:
    """The scales of the model that an adapter was trained on; None if it does not record them."""
    place = Path(adapter)
    return recorded(opened(place)) if place.is_file() else scales.read_record(place)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the adapter in a folder. PlanError if there is no folder; FormatError if its files are broken."""
    check_adapter(folder)
    config = read_json(folder / ADAPTER)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise FormatError(f"{folder / ADAPTER} does not describe an adapter: it has no peft_type")
    read_specs(folder / ADAPTER_WEIGHTS)
    return config


def _is_of_whole(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the adapter in `folder` is for a vision model with this language model inside."""
    wanted = {match[1] for key in read_specs(folder / ADAPTER_WEIGHTS) if (match := KEY.fullmatch(key)) is not None}
    names = [name for name, _ in model.named_modules() if name.startswith("model.") and name not in wanted]
    return any(row.inside(name) in wanted for row in ROWS for name in names)


def _fused(model: PreTrainedModel, config: Mapping[str, Any]) -> list[str]:
    """The parameters that an adapter with this config adapts, and of which `model` has linears of single experts.

    Without the names of the layers.
    """
    single = {name.removesuffix(".0") for name, _ in model.named_modules() if name.endswith(".experts.0")}
    owners = {name: name.rpartition(".")[0] for name in config.get("target_parameters") or ()}
    found = [name for name, owner in owners.items() if any(f".{each}".endswith(f".{owner}") for each in single)]
    return sorted({".".join(name.split(".")[-2:]) for name in found})


def _differing(model: PreTrainedModel, folder: Path) -> list[str]:
    """One line for each LoRA matrix that fits no weight of the model.

    Of a linear [N, K]: A [rank, K] and B [N, rank]. Of an embedding [V, H]: A [rank, V] and B [H, rank].
    """
    found, lines = dict(model.named_modules()), []
    for key, spec in read_specs(folder / ADAPTER_WEIGHTS).items():
        if (match := KEY.fullmatch(key)) is None or len(spec.shape) != 2:
            continue
        layer, shown = found.get(match[1]), f"{key} {list(spec.shape)}"
        weight = _weight_shape(layer)
        if layer is None:
            lines.append(f"{shown}: the model has no {match[1]}")
        elif weight is None:
            continue
        elif isinstance(layer, _EMBEDDINGS) != bool(match[3]):
            lines.append(f"{shown}: the model has {'a linear' if match[3] else 'an embedding'} there")
        else:
            n, k = weight[::-1] if match[3] else weight
            if spec.shape != ((n, spec.shape[1]) if (match[2] or match[3]) == "B" else (spec.shape[0], k)):
                lines.append(f"{shown}: the model's weight there is {list(weight)}")
    return lines


def _weight_shape(layer: nn.Module | None) -> tuple[int, int] | None:
    """The shape of the weight of a linear or an embedding; None of other modules."""
    if isinstance(layer, _EMBEDDINGS):
        return layer.num_embeddings, layer.embedding_dim
    return shape_of(layer) if isinstance(layer, LINEARS) else None
