"""An `HfQuantizer` that loads quantized checkpoints and keeps their weights packed.

There is one loading path, `from_pretrained`. Only this file changes transformers' registries. Its quantizer replaces a
back end in three cases: the back end is not installed, the user prefers fewbit (`fewbit.prefer`), or fewbit's own
loader runs (`serving`).

If a config object requests quantization of an unquantized model, there are two ways. A scheme that needs no calibration
quantizes each weight as transformers reads it, so at most one weight is in memory in 16 bits. For GPTQ and AWQ,
`fewbit.api.on_load` makes a quantized checkpoint first, and transformers loads that instead.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as hf_logging
from transformers.utils.import_utils import (
    is_auto_round_available,
    is_bitsandbytes_available,
    is_gptqmodel_available,
    is_optimum_available,
)

from fewbit import hook, registry
from fewbit.errors import FewbitError, FormatError, NumericsError, PlanError
from fewbit.formats.base import by_quant_method, one_warning
from fewbit.formats.containers import pickle
from fewbit.formats.containers.safetensors import files_in, read_specs
from fewbit.models import as_read, experts, foreign, parallel, scales, stacking
from fewbit.models.decoding import compiled_blocks, decode
from fewbit.models.decoding.fuse import fuse
from fewbit.models.linears import is_linear, shape_of
from fewbit.models.patching import replace
from fewbit.models.plugin import (
    apart,
    checks,
    compressed_tensors,
    modelopt,
    options,
    patch_adapters,
    patch_dtype,
    patch_embeddings,
    patch_fp8,
    patch_outputs,
    patch_saving,
)
from fewbit.models.plugin.modules import (
    as_stored,
    left_as_they_are,
    on_disk,
    put,
    put_scales,
    releasing,
    renamed,
    taken,
    unpack,
    untie,
)
from fewbit.models.plugin.on_load import QuantizeOnLoad
from fewbit.models.plugin.serving import dispatched, own_loader, requested_kernel, supports
from fewbit.models.plugin.serving import serving as serving
from fewbit.models.source import read_config
from fewbit.nn.fused import packed_linears
from fewbit.nn.layers import Packed, QLinear, slot
from fewbit.plans.plan import is_gate
from fewbit.schemes.base import PartSpec, QTensor, chunk_rows, too_small, vanished
from fewbit.system import heap, locks
from fewbit.system.cache import cache_folder

# transformers' names of a method's back ends, if they differ from the method's name.
_BACK_ENDS = {"bitsandbytes": ("bitsandbytes_4bit", "bitsandbytes_8bit")}
_INSTALLED = {
    "gptq": lambda: is_gptqmodel_available() and is_optimum_available(),
    "awq": is_gptqmodel_available,
    "bitsandbytes": is_bitsandbytes_available,
    # transformers itself; `patch_fp8` refuses what it would load wrong
    **dict.fromkeys(("fp8", "mxfp4"), lambda: True),
    "auto-round": is_auto_round_available,
}


class FewbitQuantizer(HfQuantizer):
    """Replaces linears with quantized weights by `QLinear`, lets transformers fill them, and prepares the kernels."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        method = str(getattr(quantization_config.quant_method, "value", quantization_config.quant_method))
        config: dict[str, Any] = {**quantization_config.to_dict(), "quant_method": method}
        if method == "auto-round":
            config = foreign.normalized(config)
            method = config["quant_method"]
        format = by_quant_method(method)
        if format is None:
            raise foreign.unread(method)
        self.format = format
        self.config = config
        self.own_loader, self.kernel = own_loader(), requested_kernel()
        self.renamings: list[WeightRenaming] = []
        self.transposed: set[str] = set()
        self.packed: list[str] = []  # names of the layers that are packed
        self.stored_as: dict[str, str] = {}  # their names in the checkpoint
        self.headers: dict[str, dict[str, PartSpec]] = {}  # and the headers of their tensors there
        self.carried: dict[str, dict[str, Tensor]] = {}  # tensors of these layers that only other readers need
        self.beside: dict[str, Tensor] = {}  # scales of the KV cache for other readers, by their names in the model
        self.origin: Path | None = None  # the folder of the files
        self.fused: apart.Fused = {}  # for experts: the packed tensors of the checkpoint
        self.separated = False  # whether the experts of the model have linears of their own
        self.splitting: list[WeightConverter] = []  # for fused experts in the checkpoint, if `separated`
        self.length: int | None = None  # length of the static cache, if the model is to be fused
        self.failure: FewbitError | None = None  # the first error while quantizing weights as they are read
        self.vanished: list[tuple[str, str, int]] = []  # name, scheme and number of groups that became 0
        self.waiting: tuple[PreTrainedModel, list[str], Any] | None = None  # model, files, device map to quantize first
        self.request = None if self.pre_quantized else options.request(quantization_config)
        self.scheme = None if self.pre_quantized or self.request else format.scheme(self.config)
        if not self.pre_quantized and self.scheme is None and self.request is None:
            raise PlanError(
                f"{type(quantization_config).__name__} on a model that is not quantized",
                "Quantize it first: fewbit quantize MODEL -o OUT, or fewbit.quantize(...). Then load OUT.",
            )

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """KernelError if the device map puts a packed layer on the disk. Called again when the map is final."""
        if not isinstance(device_map, dict):
            return
        for name in self.packed:
            inside = [place for place in device_map if not place or f"{name}.".startswith(f"{place}.")]
            if inside and str(device_map[max(inside, key=len)]) == "disk":
                raise on_disk(name)

    def update_device_map(self, device_map: Any) -> Any:
        """In place of bitsandbytes, choose its default: the GPU, if the caller gives no device map."""
        if (
            device_map is None
            and self.format.quant_method in _BACK_ENDS
            and not self.own_loader
            and torch.cuda.is_available()
        ):
            return {"": torch.cuda.current_device()}
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        parallel.check_loader(model)
        self.dtype, self.origin = model.dtype, Path(checkpoint_files[0]).parent if checkpoint_files else None
        if getattr(self.quantization_config, "do_fuse", False):
            context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            length = getattr(self.quantization_config, "fuse_max_seq_len", None)
            self.length = decode.checked_length(length, context or sys.maxsize, f"fuse_max_seq_len {length!r}")
        if self.scheme is not None:
            experts.separate(model)
            self._make_room(model, kwargs.get("device_map"))
            self.separated = experts.names_one(model, self.packed)
            if not self.separated:  # the config leaves them unquantized
                experts.join(model)
            self.splitting = apart.splitting(model, self.get_quantize_ops(), self._fail)
            self.validate_environment(kwargs.get("device_map"))
            return model
        if not checkpoint_files:
            raise FormatError("a quantized model is loaded from its safetensors files, not from a state dict")
        if self.request is not None:
            head = model.get_output_embeddings()
            linears = [(n, m) for n, m in model.named_modules() if is_linear(m) and m is not head]
            self.packed = [name for name, _ in linears]
            self.validate_environment(kwargs.get("device_map"))
            self.waiting = (model, checkpoint_files, kwargs.get("device_map"))
            return model
        if checkpoint_files[0].endswith(".bin"):
            folder = pickle.converted(Path(checkpoint_files[0]).parent, str(model.config.name_or_path))
            checkpoint_files[:] = [str(file) for file in files_in(folder)]
        self._make_places(model, checkpoint_files)
        self.validate_environment(kwargs.get("device_map"))
        if self.config.get("backend") != getattr(self.quantization_config, "backend", None):
            options.check(self.quantization_config, "backend")
        return model

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Do nothing. transformers would replace Llama 4's fused experts even if the checkpoint has them fused."""

    def _make_places(self, model: PreTrainedModel, checkpoint_files: list[str]) -> None:
        """Replace each linear that has quantized tensors in these files by a `QLinear`."""
        # Read the config from the file: transformers' config classes drop keys that they do not know.
        stored = read_config(Path(checkpoint_files[0]).parent).get("quantization_config")
        if isinstance(stored, dict):
            self.config = foreign.normalized(stored)
            # Keep those keys on the config object too, so that saving the model writes them, not other defaults.
            config: Any = self.quantization_config
            kept = {key: value for key, value in stored.items() if key not in vars(config)}
            vars(config).update(kept, **{k: v for k, v in self.format.absent.items() if k not in self.config})
        self.packed = []
        scales.attach(model, scales.of_folder(Path(checkpoint_files[0]).parent))
        specs: dict[str, PartSpec] = {}
        for file in checkpoint_files:
            specs |= read_specs(Path(file))
        if reason := self.format.why_unpacked(self.config, specs):
            raise FormatError(
                f"{reason}, and fewbit does not keep such weights packed",
                "fewbit.load(...) dequantizes them in memory.",
            )
        # The config has the names of the checkpoint, so weights are found by these.
        found, named = self.format.find(self.config, specs), renamed(model, specs)
        fused = self.format.find_fused(self.config, specs)
        if fused or experts.names_one(model, (named[f"{m}.{next(iter(tensors))}"] for m, tensors in found.items())):
            experts.separate(model)
            self.separated = True
            named = renamed(model, specs)
        suffixes, biased = set[str](), set(named.values())
        for stored, tensors in found.items():
            suffix = next(iter(tensors))
            module = named[f"{stored}.{suffix}"].removesuffix(f".{suffix}")
            put(model, module, tensors, has_bias=f"{module}.bias" in biased)
            self.packed.append(module)
            self.stored_as[module], self.headers[module] = stored, tensors
            suffixes |= set(tensors)
        untie(model, self.packed)
        if fused:
            ends = {stored: next(iter(tensors)) for stored, tensors in fused.items()}
            self.fused = {named[f"{f}{end}"].removesuffix(end): fused[f] for f, end in ends.items()}
            own = apart.put_fused(model, self.fused, self._shape_of_fused)
            self.packed += own
            self.stored_as |= own
            self.splitting = apart.splitting_packed(model, self.fused, self._fail)
            self.splitting += apart.splitting(model, self.get_quantize_ops(), self._fail)  # biases, unpacked layers
        checks.check(model, self.format, self.config, checkpoint_files, (found, fused), self.stored_as)
        self.beside = checks.scales_of_cache(model, checkpoint_files, named)
        for module, spec in self.format.activations({named[key]: spec for key, spec in specs.items()}).items():
            put_scales(model, module, spec)
        self.renamings = [WeightRenaming(f".{name}", f".{slot(name)}") for name in sorted(suffixes) if "." in name]

    def _shape_of_fused(self, fused: str, tensors: Mapping[str, PartSpec]) -> tuple[int, ...]:
        count, _, shape = self.format.describe_fused(tensors, self.config, fused)
        return count, *shape

    def _make_checkpoint(self, model: PreTrainedModel, files: list[str], device_map: Any) -> None:
        """Make a quantized checkpoint from `files`, and replace their paths by its own in that list.

        The list is the loader's, so transformers then reads the quantized files.
        """
        on_load, held = hook.on_load(), locks.scratch(cache_folder() / "on-load")
        self.remove, out = weakref.finalize(self, held.remove), held.folder
        # If the model's class is remote code, the user has allowed remote code.
        trusted = type(model).__module__.startswith("transformers_modules.")
        with as_read.folder_of(model, files, trust_remote_code=trusted) as folder:
            self.forget = on_load.quantized(
                folder,
                self.request,
                out,
                device=on_load.device_of(device_map),
                trust_remote_code=trusted,
                verbose=hf_logging.is_progress_bar_enabled(),
            )
        files[:] = [str(file) for file in files_in(out)]
        with torch.device("meta"):
            self._make_places(model, files)

    def _make_room(self, model: PreTrainedModel, device_map: Any) -> None:
        """Replace each linear that is quantized while it is loaded by a `QLinear`."""
        requested = self.config.get("llm_int8_skip_modules")
        skipped = self.get_modules_to_not_convert(model, requested, list(model._keep_in_fp32_modules or ()))
        if self.config.get("llm_int8_enable_fp32_cpu_offload") and isinstance(device_map, dict):
            slow = [name for name, place in device_map.items() if str(place) in ("cpu", "disk")]
            skipped += slow if len(slow) < len(device_map) else []
        skipped += [name.removesuffix(".weight") for name in model.all_tied_weights_keys]  # tied to embeddings
        unknown = [
            key
            for key in requested or ()
            if all(should_convert_module(name, [key]) for name, _ in model.named_modules())
        ]
        if unknown:
            warnings.warn(f"llm_int8_skip_modules: the model has no module {', '.join(unknown)}", stacklevel=2)
        for name, module in list(model.named_modules()):
            if is_linear(module) and should_convert_module(name, skipped) and not is_gate(name, shape_of(module)):
                assert isinstance(module.weight, Tensor)
                if isinstance(module, Conv1D):
                    self.transposed.add(name)
                put(model, name, {"weight": PartSpec(tuple(module.weight.shape), model.dtype)}, has_bias=False)
                self.packed.append(name)
        if note := left_as_they_are(model, skipped):
            warnings.warn(f"{type(self.quantization_config).__name__}: {note}", stacklevel=2)

    def update_weight_conversions(self, weight_conversions: Any, *rest: Any) -> Any:
        """Transformers calls this once per load: after it has built the model, and before it reads the files.

        So a checkpoint that needs calibration is quantized here. Earlier, all new tensors would be on the meta device.
        The returned rules are for renaming the tensors of the quantized files.
        """
        self._quantize_checkpoint(weight_conversions)
        theirs: Any = super().update_weight_conversions  # newer versions also pass the model
        rules = theirs(weight_conversions, *rest)
        return [*self.splitting, *(experts.unmerged(rules) if self.separated else rules)]

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """The rules for renaming the tensors of the format. Transformers adds them to those of the model."""
        return self.renamings

    def _quantize_checkpoint(self, weight_conversions: Any) -> None:
        """Quantize the checkpoint first, if the config requests that; else do nothing.

        PlanError if the caller renames tensors (`key_mapping`): the pipeline would not find them.
        """
        if self.waiting is None:
            return
        (model, files, device_map), self.waiting = self.waiting, None
        known = {str(c.source_patterns) for c in get_model_conversion_mapping(model)}
        if other := [str(c.source_patterns) for c in weight_conversions if str(c.source_patterns) not in known]:
            raise PlanError(
                f"{type(self.quantization_config).__name__} does not support key_mapping ({other[0]})",
                "Load the model with key_mapping alone, save it, and quantize that folder.",
            )
        self._make_checkpoint(model, files, device_map)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and isinstance(model.get_submodule(module), QLinear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element, for device maps. For a weight that is still to be quantized, its bytes after that."""
        if self.scheme is not None and self.param_needs_quantization(model, param_name):
            return self.scheme.nbytes((param.shape[0], param.shape[1])) / param.numel()
        return param.element_size()

    def _fail(self, error: FewbitError) -> None:
        """Keep the first error: transformers would print it and raise its own instead."""
        self.failure = self.failure or error

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeOnLoad(self)

    def quantize(self, module: QLinear, weight: Tensor) -> None:
        """Round `weight` to nearest, and store it in `module`."""
        assert self.scheme is not None
        weight = weight.T if module.module in self.transposed else weight
        if weight.shape != (module.out_features, module.in_features):
            raise FormatError(
                f"{module.module}.weight has shape {list(weight.shape)}, "
                f"config.json says {[module.out_features, module.in_features]}"
            )
        try:
            codes, grids = self.scheme.nearest(weight)
        except NumericsError as error:
            raise NumericsError(f"{module.module}: {error.message}", error.hint) from None
        module.take_tensors()
        packed = QTensor(self.scheme, (weight.shape[0], weight.shape[1]), self.scheme.pack(codes, grids))
        count = 0
        for rows in chunk_rows(*packed.shape):
            values = self.scheme.dequantize(packed.parts, packed.shape, torch.float32, rows)
            count += vanished(self.scheme, weight[rows], values)
        if count:
            self.vanished.append((module.module, str(self.scheme), count))
        module.adopt(packed, self.dtype, self.kernel)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failure is not None:
            raise self.failure
        for note in too_small(self.vanished, len(self.packed)):
            warnings.warn(f"{type(self.quantization_config).__name__}: {note}", stacklevel=2)
        # Saving must not undo the renamings either: the format itself gives the names on disk.
        if used := getattr(model, "_weight_conversions", None):
            used = apart.kept((c for c in used if c not in self.renamings), self.packed)
            model._weight_conversions = used  # type: ignore[assignment]
        with heap.trimmed() as done_with, one_warning():
            self._prepare(model, done_with)
        if self.pre_quantized and getattr(self.quantization_config, "dequantize", False):
            self._dequantize(model, self.dtype)
        if self.request is not None:
            self._describe_result(model)
        compiled_blocks.use(model)
        if self.length is not None:
            fuse(model)
            decode.within(model, self.length)
        return model

    def _prepare(self, model: PreTrainedModel, done_with: heap.DoneWith) -> None:
        """Convert every weight to its kernel's layout, and release what was read from the files."""
        compute, read = self._compute_dtype(), list[Tensor]()
        for module in model.modules():
            if isinstance(module, QLinear):
                module.compute = compute

        def weight_of(name: str, module: QLinear) -> QTensor:
            if not module.placeholders:
                return module.qtensor()  # quantized while it was read
            if self.scheme is not None:
                raise FormatError(f"{name}.weight is missing, or could not be quantized")
            tensors = taken(name, module)
            own = {suffix: tensor for suffix, tensor in tensors.items() if suffix in self.format.carried_suffixes}
            self.carried[name] = {suffix: tensor.cpu().clone() for suffix, tensor in own.items()}
            weight = self.format.read(tensors, self.config, self.stored_as.get(name, name))
            read.extend(tensors.values())
            return weight

        stacking.pack(model, weight_of, releasing(read, done_with), self.dtype, self.kernel)

    def _compute_dtype(self) -> torch.dtype | None:
        """The dtype that bitsandbytes would compute in; None for the activations' dtype, as in fewbit's own loader."""
        cast = self.config.get("load_in_4bit") and not self.own_loader
        name = self.config.get("bnb_4bit_compute_dtype") if cast else None
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name).removeprefix("torch."))

    def _describe_result(self, model: PreTrainedModel) -> None:
        """Replace the requested config by that of the quantized model, and delete the intermediate checkpoint."""
        original: Any = self.quantization_config
        self.pre_quantized = True
        # The requested format is `version` in AwqConfig.to_dict and `checkpoint_format` in GPTQConfig.to_dict. A
        # request for gptq (v1) is not copied: asymmetric weights are saved as gptq_v2.
        form = str(getattr(original.format, "value", original.format))
        if form == "gptq_v2":
            self.config |= {"format": form, "checkpoint_format": form}
        elif self.format.quant_method == "awq":
            self.config["version"] = form
        result: Any = type(original).from_dict(self.config)
        vars(result).update({key: value for key, value in self.config.items() if key not in vars(result)})
        result.meta, result.dataset = original.meta, original.dataset if isinstance(original.dataset, str) else None
        for name in ("damp_percent", "true_sequential", "modules_in_block_to_quantize", *options.FUSING):
            if hasattr(original, name):
                setattr(result, name, getattr(original, name))
        model.config.quantization_config = self.quantization_config = result
        self.forget()
        self.remove()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that `save_pretrained` writes, with quantized weights in the layout of their format.

        If the model has an adapter (`add_adapter`), transformers writes only the adapter.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return model.state_dict(), {}
        quantized = packed_linears(model)
        held = {name for name, m in model.named_modules() if isinstance(m, Packed)}
        state = {}
        for name, tensor in model.state_dict().items():
            module, _, leaf = name.rpartition(".")
            if module not in held or leaf == "bias":
                state[name] = tensor
        for name, linear in quantized.items():
            weight, stored = linear.qtensor().map(lambda t: t.cpu()), self.stored_as.get(name, name)
            for suffix, tensor in self.format.lay_out(weight, self.config, stored).items():
                state[f"{name}.{suffix}"] = as_stored(tensor, self.headers.get(name, {}).get(suffix))
            state |= {f"{name}.{suffix}": tensor for suffix, tensor in self.carried.get(name, {}).items()}
        state |= self.beside
        return apart.joined(model, state, self.fused) if self.fused else state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # A saved config holds the dtype's name.
        plain = unpack(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        if self.fused:
            experts.join(plain)  # files of this model have fused tensors
        return plain

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Register the quantizers, in place of back ends that are not installed or that `fewbit.prefer` replaces."""
    for method in _methods():
        if method in hook.preferred or not _INSTALLED.get(method, lambda: False)():
            auto.AUTO_QUANTIZER_MAPPING.update(dict.fromkeys(_back_ends(method), FewbitQuantizer))
    replace(auto.AutoHfQuantizer, "supports_quant_method", supports)
    replace(auto.AutoHfQuantizer, "from_config", dispatched(FewbitQuantizer, _methods()))
    own = (patch_adapters, patch_dtype, patch_fp8, patch_outputs, patch_embeddings, patch_saving)
    for each in (*own, compressed_tensors, modelopt):
        each.register()
    with suppress(ImportError):  # a version of transformers without its own GGUF quantizer needs no replacement
        from fewbit.models.plugin.gguf import GgufQuantizer

        mapping: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
        mapping["gguf"] = GgufQuantizer


def _methods() -> list[str]:
    """The quantization methods of formats that are folders, and AutoRound's, whose files have one of their layouts.
    GGUF, a single file, has its own quantizer."""
    return [*(each.quant_method for each in registry.entries("formats").values() if not each.suffix), "auto-round"]


def _back_ends(method: str) -> tuple[str, ...]:
    return _BACK_ENDS.get(method, (method,))


register()
