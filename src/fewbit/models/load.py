"""Load a whole model with `from_pretrained`; fewbit reads every quantization format that it knows."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from fewbit import registry
from fewbit.errors import FewbitError, FormatError, KernelError, PlanError
from fewbit.formats.base import by_quant_method
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models import classes, decoded, foreign, on_text, parallel
from fewbit.models.building import building
from fewbit.models.decoding import compiled_blocks, decode
from fewbit.models.decoding import fuse as fusing
from fewbit.models.decoding.graph import check_compile
from fewbit.models.describe import describe
from fewbit.models.gguf import towers
from fewbit.models.loading import Loading, need_peft
from fewbit.models.plugin import quantizer
from fewbit.models.quiet import no_progress_bars
from fewbit.models.skeleton import INCOMPLETE
from fewbit.models.source import Source
from fewbit.names import lacking
from fewbit.nn import choose
from fewbit.system import ranks

if TYPE_CHECKING:
    from fewbit.models.adapters.inside import Part

_FUSED = 8192  # tokens of a text at most that is fused by itself
_DEFAULT = Loading()


def load_model(
    source: Source,
    loading: Loading = _DEFAULT,
    *,
    for_text: bool = False,
) -> Any:
    """Load the model of `source` in evaluation mode, with weights of fewbit's formats packed.

    for_text: PlanError if the model does not run on token ids alone.

    FormatError if the model's files are malformed or not supported. KernelError if `loading.kernel` cannot multiply by
    one of the packed weights. PlanError if the adapter belongs to another model, if `fuse` is beyond the model's
    context, and for `compile` without `fuse` or without an NVIDIA GPU.
    """
    split = _split(loading)
    if split is not None:
        loading = replace(loading, device="cpu")  # files are mapped there, and only parts are copied
    if loading.fuse is True:
        raise PlanError(
            "`fuse=True`: only `generate` knows how many tokens a text needs", "Give their number, such as `fuse=512`."
        )
    device, kernel, fuse = loading.device, loading.kernel, loading.fuse or None
    method = str((source.quantization or {}).get("quant_method"))
    left = decoded.is_left(source, str(device))
    packed = not left and decoded.is_packed(source)
    if (format := by_quant_method(method)) is not None and not packed and not left:
        reason = format.why_unpacked(source.quantization or {}, Checkpoint(list(source.files)).specs)
        warnings.warn(f"{source.name} is dequantized in memory: {reason}", stacklevel=2)
    if loading.adapter is not None:
        check_adapter(loading.adapter)
    if kernel is not None:
        registry.get("kernels", kernel)
        if not packed:
            raise PlanError(
                f"`kernel={kernel}`: {source.name} has no packed weights that fewbit reads, and kernels need them",
                "Leave out `kernel`.",
            )
    if loading.compile:
        check_compile(device, fuse)
    if fuse is not None:
        decode.checked_length(fuse, source.stated_context, f"`fuse={fuse!r}`")
        if not packed:
            raise PlanError(
                f"{source.name} has no packed weights that fewbit reads, and only these are fused",
                "Leave out `fuse`, `max_length` and `compile`.",
            )
    if source.quantization is None:
        decoded.opened(source)  # refuses FP8 weights whose scales have no config; transformers would ignore the scales
    elif method not in decoded.LAYOUTS and not AutoHfQuantizer.supports_quant_method(source.quantization):
        # transformers would skip such weights and initialize new ones at random.
        error = foreign.unread(method)
        raise FormatError(f"{source.folder}: {error.message}", error.hint)
    if packed:
        # For clearer errors than those of transformers if config and tensors contradict each other.
        describe(source.language)
    try:
        exact = choose.exact_activations() if loading.exact_activations else nullcontext()
        serving = nullcontext() if left else quantizer.serving(kernel, source.mmproj)
        with building(), no_progress_bars(), serving, exact, parallel.splitting(split):
            model, info = _loaded(source, loading)
    except FewbitError:
        raise
    except torch.OutOfMemoryError as error:
        raise KernelError(f"{source.folder} does not fit the memory of {device}", "Use another `device`.") from error
    except Exception as error:  # transformers can raise anything on malformed files
        reason = str(error).strip() or type(error).__name__
        raise FormatError(
            f"{source.folder} could not be loaded: {reason.splitlines()[0][:300]}",
            "If you trust its code, set `trust_remote_code=True`."
            if "trust_remote_code" in reason
            else foreign.by_transformers(method),
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise FormatError(
            f"{source.folder}: {lacking(missing)}",
            foreign.by_transformers(method) or INCOMPLETE,
        )
    assert isinstance(model, PreTrainedModel)
    model.eval()
    if split is not None:
        split.finish(model)
        compiled_blocks.remove(model)
    if for_text:
        on_text.check(model)
    if fuse is not None:
        fusing.fuse(model)
        decode.within(model, fuse, compile=loading.compile)
    if loading.adapter is None:
        return model
    from fewbit.models.adapters.attach import attach  # PEFT is an extra

    return attach(model, loading.adapter, _part(source))


def fuses_by_itself(source: Source, loading: Loading, tokens: int) -> bool:
    """Whether one text of so many tokens, prompt included, is generated fused although nobody set it.

    A recorded step takes a GPU a tenth of the time of a step whose kernels Python launches. Recording pays off within
    16 tokens. A cache of more than `_FUSED` tokens would take memory that the text may never use.
    """
    return (
        str(loading.device).partition(":")[0] == "cuda"
        and loading.adapter is None
        and not loading.tensor_parallel
        and tokens <= min(_FUSED, source.stated_context or _FUSED)
        and not decoded.is_left(source, str(loading.device))
        and decoded.is_packed(source)
    )


def _split(loading: Loading) -> parallel.Split | None:
    """This process's part of the model, if it gets only a part. PlanError for settings that need a whole model."""
    if not loading.tensor_parallel:
        return None
    for name in ("adapter", "compile"):
        if getattr(loading, name):
            raise PlanError(f"`{name}` in several processes that share one model", f"Leave out `{name}`.")
    device = ranks.connected(loading.device)
    return parallel.Split(ranks.rank(), ranks.size(), device)


def _loaded(source: Source, loading: Loading) -> Any:
    """What `from_pretrained` returns for a model: the model and the loading info."""
    options: dict[str, Any] = {"device_map": loading.device, "output_loading_info": True}
    trusted: dict[str, Any] = {"trust_remote_code": loading.trust_remote_code}
    if not decoded.is_read_here(source, str(loading.device)):
        kind = _class_of(source, loading)
        options |= source.options if source.mmproj is None else {**source.options, "config": built_config(source)}
        return kind.from_pretrained(source.folder, dtype=loading.torch_dtype, **options, **trusted)
    config: Any = AutoConfig.from_pretrained(source.folder, **trusted)
    vars(config).pop("quantization_config", None)  # it may be in another file
    with torch.device("meta"):  # an auto class takes only a folder
        kind = type(classes.build(config, **trusted))
    checkpoint, packing = decoded.opened(source)
    state = {name: checkpoint.slice(name) for name in checkpoint.specs}
    dtype = packing.dtype if packing is not None and loading.torch_dtype == "auto" else loading.torch_dtype
    made: Any = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    model, info = made
    model.config.name_or_path = str(source.folder)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model, info


def _class_of(source: Source, loading: Loading) -> Any:
    """The class that loads the model of `source`. PlanError as `classes.class_for`."""
    if source.mmproj is not None:
        return classes.class_for(built_config(source))
    if source.gguf is not None:  # a GGUF file holds a causal LM, and its config takes long to read
        return AutoModelForCausalLM
    return classes.class_for(AutoConfig.from_pretrained(source.folder, trust_remote_code=loading.trust_remote_code))


def built_config(source: Source) -> Any:
    """transformers' config object of a GGUF model with a vision tower."""
    return AutoConfig.for_model(**source.config)


def _part(source: Source) -> Part | None:
    """The language model of a GGUF model with a vision tower, which adapters may be for; None for other models."""
    if source.mmproj is None:
        return None
    from fewbit.models.adapters.inside import Part  # PEFT is an extra

    own = source.language.config
    return Part(AutoConfig.for_model(**own), towers.opened(source.mmproj, own["model_type"]).row.inside)


def check_adapter(adapter: str | Path) -> None:
    """Check an adapter as far as possible without its model. PlanError without PEFT or the adapter; FormatError."""
    need_peft()
    from fewbit.models.adapters.attach import check  # PEFT is an extra

    check(Path(adapter).absolute())


def import_code(source: Source, *, trust_remote_code: bool = False) -> None:
    """Import all code that loading this model imports: build its architecture without weights, then drop it."""
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, **source.options)
    with building(), torch.device("meta"):
        classes.build(config, trust_remote_code=trust_remote_code)
