"""Adapters in PEFT's files: put on a model that they fit, and merged into its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from fewbit import scales
from fewbit.errors import FormatError, NumericsError, PlanError
from fewbit.files import read_json
from fewbit.formats.gguf import GgufFile
from fewbit.formats.safetensors import Checkpoint, ShardWriter, copy_side_files, read_specs, writing
from fewbit.fused import packed_linears
from fewbit.models.load import load_model
from fewbit.models.skeleton import load_tokenizer, owned, placed
from fewbit.models.source import Source
from fewbit.refit import presumed
from fewbit.scales import Scales
from fewbit.schemes.base import PartSpec

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def attach(model: PreTrainedModel, adapter: str | Path) -> Any:
    """`model` with the adapter of a folder, as PEFT loads it, in evaluation mode.

    PlanError if there is none or it was made for another model, with the tensors and shapes that differ; FormatError if
    its files are broken.
    """
    folder = Path(adapter).expanduser().absolute()
    config = _config(folder)
    if differing := _differing(model, folder):
        more = f"\n  and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise PlanError(
            f"{folder} is an adapter for another model ({config.get('base_model_name_or_path')}):\n  "
            + "\n  ".join(differing[:8])
            + more
        )
    try:
        with quiet():
            return PeftModel.from_pretrained(model, folder, torch_device=str(model.device)).eval()
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise FormatError(f"{folder} could not be loaded: {str(error).strip().splitlines()[0][:300]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within, PEFT says nothing of names that transformers has given newer ones, nor of what it sets right itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        yield


def folded(source: Source) -> Scales | None:
    """The scales that AWQ folded into a model; None where it has some, or may have, and does not say which."""
    if source.gguf is not None:
        return scales.of_metadata(GgufFile(source.files[0]).metadata)
    return scales.of_folder(source.beside)


def write_merged(
    source: Source,
    adapter: str | Path,
    folder: Path,
    *,
    trained: Scales | None = None,
    trust_remote_code: bool = False,
) -> dict[str, PartSpec]:
    """Write the model of `source` with an adapter added to its weights, packed ones unpacked, into `folder`.

    trained: the scales of the model that the adapter was trained on, where its folder does not say.
    The whole model is held in memory in its own type. Tensors that it has no place for are carried over, and given
    back by name. NumericsError if a sum is not finite.
    """
    plain = load_model(source, device="cpu", trust_remote_code=trust_remote_code)
    packed = packed_linears(plain)
    if source.quantization is not None:
        plain.dequantize()
    carried = dict[str, PartSpec]()
    if source.gguf is None:
        checkpoint = Checkpoint(list(source.files))
        _, without = placed(plain, checkpoint.specs, plain.state_dict())
        prefix = plain.base_model_prefix
        carried = {k: checkpoint.specs[k] for k, name in without.items() if not owned(name, prefix, packed)}
    verbose = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with presumed(trained):
            merged = attach(plain, adapter).merge_and_unload(safe_merge=True)
        if source.gguf is None:
            merged.generation_config = GenerationConfig()  # transformers saves none that its own rules find fault with
        with writing():
            merged.save_pretrained(folder)
    except ValueError as error:
        raise NumericsError(f"{adapter} cannot be merged into {source.name}: {error}") from None
    finally:
        if verbose:
            hf_logging.enable_progress_bar()
    scales.write(folder, scales.of_model(plain) or Scales())
    if source.gguf is not None:  # it has no side files: what it says of its tokenizer becomes one
        load_tokenizer(source).save_pretrained(folder)
        return {}
    (folder / "generation_config.json").unlink(missing_ok=True)  # the source's own is copied
    copy_side_files(source.beside, folder)
    if carried:
        writer = ShardWriter(folder)
        writer.adopt()
        for key in carried:
            writer.add(key, checkpoint.get(key))
        writer.close()
    return carried


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PlanError(f"adapter {folder}: no such folder", f"Give the folder that holds {_CONFIG}.")
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise FormatError(f"adapter {folder} has no {name}", "An adapter is a folder as PEFT writes it.")
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise FormatError(f"{folder / _CONFIG} describes no adapter")
    return config


def _differing(model: PreTrainedModel, folder: Path) -> list[str]:
    """A line for each LoRA matrix [rank, K] or [N, rank] that has no weight [N, K] in the model to be added to."""
    found, lines = dict(model.named_modules()), []
    for key, spec in read_specs(folder / _WEIGHTS).items():
        if (match := re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", key)) is None or len(spec.shape) != 2:
            continue
        module, which = match.groups()
        linear = found.get(module)
        n, k = (linear.nf, linear.nx) if isinstance(linear, Conv1D) else _features(linear)
        if linear is None:
            lines.append(f"{key} {list(spec.shape)}: the model has no {module}")
        elif n is not None and spec.shape != ((spec.shape[0], k) if which == "A" else (n, spec.shape[1])):
            lines.append(f"{key} {list(spec.shape)}: the model's weight there is [{n}, {k}]")
    return lines


def _features(linear: Any) -> tuple[int | None, int | None]:
    return getattr(linear, "out_features", None), getattr(linear, "in_features", None)
