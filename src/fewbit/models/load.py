"""Loading a whole model to use it: `from_pretrained`, with fewbit serving every format it knows."""

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
    """The model of `source`, quantized weights packed, in evaluation mode.

    dtype: of activations and of what is not quantized; "auto" is the checkpoint's own. device: where it goes, or
    "auto" to spread it over what there is. kernel: the one to use for all, KernelError if it cannot. adapter: the
    folder of one to put on it; PlanError if it was made for another model. fuse: linears that read the same tensor
    become one, and texts of up to so many tokens are generated in a static cache; PlanError beyond the model's context.
    compile: what a step of that runs is compiled first; PlanError without `fuse`, and without a GPU.
    """
    if adapter is not None:
        need_peft()
    if kernel is not None:
        registry.get("kernels", kernel)
        if source.quantization is None or by_quant_method(source.quantization["quant_method"]) is None:
            raise PlanError(
                f"`kernel={kernel}`: kernels multiply packed weights, and {source.name} has none that fewbit reads",
                "Leave out `kernel`.",
            )
    if compile:
        check_compile(device, fuse)
    if fuse is not None:
        decode.checked_length(fuse, source.context, f"`fuse={fuse!r}`")
        if source.quantization is None:
            raise PlanError(f"{source.name} is not quantized, and only packed weights are fused", "Leave out `fuse`.")
    if source.quantization is not None:
        # transformers would leave such weights out, and make up others.
        method = source.quantization["quant_method"]
        if not AutoHfQuantizer.supports_quant_method(source.quantization):
            raise FormatError(
                f"{source.folder}: quantization method {method!r} is not one that fewbit or transformers reads"
            )
    if source.quantization is not None and by_quant_method(source.quantization["quant_method"]) is not None:
        describe(source)  # says more clearly than transformers where config and tensors contradict one another
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
    except Exception as error:  # whatever transformers meets in a foreign folder
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
    """PlanError unless the package that adapters need is there, and new enough."""
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise PlanError("adapters need the package peft", "pip install 'fewbit[finetune]'") from None
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_PEFT:
        raise PlanError(f"peft {version} is too old", "pip install --upgrade 'fewbit[finetune]'")


def import_code(source: Source, *, trust_remote_code: bool = False) -> None:
    """Import all that loading this model would: its architecture is built without weights, and dropped."""
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, **source.options)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
