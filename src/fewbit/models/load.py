"""Load a whole model with `from_pretrained`; fewbit reads every quantization format that it knows."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from fewbit import registry
from fewbit.errors import FewbitError, FormatError, KernelError, PlanError
from fewbit.formats.base import by_quant_method
from fewbit.models.decoding import decode
from fewbit.models.decoding import fuse as fusing
from fewbit.models.decoding.graph import check_compile
from fewbit.models.describe import describe
from fewbit.models.plugin import quantizer
from fewbit.models.quiet import no_progress_bars
from fewbit.models.source import Source

_OLDEST_PEFT = (0, 20)


def load_model(
    source: Source,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    kernel: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    fuse: int | None = None,
    compile: bool = False,
) -> Any:
    """Load the model of `source` in evaluation mode, with quantized weights packed.

    dtype: of activations and unquantized weights; "auto" takes the checkpoint's. device: a device, or "auto" to spread
    the model over all devices. kernel: use this one for all packed weights; KernelError if it cannot. adapter: the
    folder of a PEFT adapter to load onto the model; PlanError if it belongs to another model. fuse: fuse linears that
    read the same tensor, and generate in a static cache of this many tokens; PlanError beyond the model's context.
    compile: compile a decoding step with PyTorch; PlanError without `fuse` or without an NVIDIA GPU.

    FormatError if the model's files are malformed or not supported.
    """
    if adapter is not None:
        need_peft()
    if kernel is not None:
        registry.get("kernels", kernel)
        if source.quantization is None or by_quant_method(source.quantization["quant_method"]) is None:
            raise PlanError(
                f"`kernel={kernel}`: {source.name} has no packed weights that fewbit reads, and kernels need them",
                "Leave out `kernel`.",
            )
    if compile:
        check_compile(device, fuse)
    if fuse is not None:
        decode.checked_length(fuse, source.context, f"`fuse={fuse!r}`")
        if source.quantization is None:
            raise PlanError(f"{source.name} is not quantized, and only packed weights are fused", "Leave out `fuse`.")
    if source.quantization is not None:
        # transformers would skip such weights and initialize new ones at random.
        method = source.quantization["quant_method"]
        if not AutoHfQuantizer.supports_quant_method(source.quantization):
            raise FormatError(
                f"{source.folder}: quantization method {method!r} is not one that fewbit or transformers reads"
            )
    if source.quantization is not None and by_quant_method(source.quantization["quant_method"]) is not None:
        describe(source)  # for clearer errors than those of transformers if config and tensors contradict each other
    try:
        with no_progress_bars(), quantizer.serving(kernel):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=dtype,
                device_map=device,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **source.options,
            )
    except FewbitError:
        raise
    except torch.OutOfMemoryError as error:
        raise KernelError(f"{source.folder} does not fit the memory of {device}", "Use another `device`.") from error
    except Exception as error:  # transformers can raise anything on malformed files
        reason = str(error).strip() or type(error).__name__
        raise FormatError(
            f"{source.folder} could not be loaded: {reason.splitlines()[0][:300]}",
            "If you trust its code, set `trust_remote_code=True`." if "trust_remote_code" in reason else "",
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise FormatError(f"{source.folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    assert isinstance(model, PreTrainedModel)
    model.eval()
    if fuse is not None:
        fusing.fuse(model)
        decode.within(model, fuse, compile=compile)
    if adapter is None:
        return model
    from fewbit.models.adapters.attach import attach  # PEFT is an extra

    return attach(model, adapter)


def need_peft() -> None:
    """PlanError unless PEFT is installed in version 0.20 or later."""
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise PlanError("adapters need the package peft", "pip install 'fewbit[finetune]'") from None
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_PEFT:
        raise PlanError(f"peft {version} is too old", "pip install --upgrade 'fewbit[finetune]'")


def import_code(source: Source, *, trust_remote_code: bool = False) -> None:
    """Import all code that loading this model imports: build its architecture without weights, then drop it."""
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, **source.options)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
