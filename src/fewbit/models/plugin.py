"""fewbit at transformers' own seam: an `HfQuantizer` that loads quantized checkpoints packed.

There is one loading path, `from_pretrained`. This file is the only one that touches transformers' registries; it
stands in for a back end only where that back end is not installed, except inside `serving`, where fewbit's own loader
asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.import_utils import is_gptqmodel_available, is_optimum_available

from fewbit import registry
from fewbit.errors import FormatError, KernelError, PlanError
from fewbit.formats.base import by_quant_method
from fewbit.formats.safetensors import read_specs
from fewbit.models.source import read_config
from fewbit.nn import QLinear
from fewbit.schemes.base import PartSpec

_forced_kernel: list[str] = []


class FewbitQuantizer(HfQuantizer):
    """Puts `QLinear` where the checkpoint has quantized weights, lets transformers fill it, and prepares its kernel."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        method = str(getattr(quantization_config.quant_method, "value", quantization_config.quant_method))
        format = by_quant_method(method)
        if format is None:
            raise FormatError(f"quantization method {method!r} is not one that fewbit reads")
        self.format = format
        self.config: dict[str, Any] = quantization_config.to_dict()
        if not self.pre_quantized:
            raise PlanError(
                f"{type(quantization_config).__name__} on a model that is not quantized",
                "Quantize it first: fewbit quantize MODEL -o OUT, or fewbit.quantize(...). Then load OUT.",
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise FormatError("a quantized model is loaded from its safetensors files, not from a state dict")
        self.dtype = model.dtype
        # As the file has it: config classes drop what they do not know, and a reader must not guess.
        stored = read_config(Path(checkpoint_files[0]).parent).get("quantization_config")
        if isinstance(stored, dict):
            self.config = stored
        specs: dict[str, PartSpec] = {}
        for file in checkpoint_files:
            specs |= read_specs(Path(file))
        named = _renamed(model, specs)
        for module, tensors in self.format.find(self.config, named).items():
            _put(model, module, tensors, has_bias=f"{module}.bias" in named)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        kernel = _forced_kernel[-1] if _forced_kernel else None
        # By these PEFT knows a model of bitsandbytes' that is to be prepared for training, whoever loads it.
        for flag in ("4bit", "8bit"):
            setattr(model, f"is_loaded_in_{flag}", bool(self.config.get(f"load_in_{flag}")))
        for name, module in model.named_modules():
            if isinstance(module, QLinear) and module.placeholders:
                tensors = module.take_tensors()
                if any(tensor.is_meta for tensor in tensors.values()):
                    raise KernelError(
                        f"{name}: packed weights cannot be offloaded to the disk yet",
                        "Give a device map that keeps the whole model in memory, such as device_map='cpu'.",
                    )
                weight = self.format.read(tensors, self.config, name)
                if weight.shape != (module.out_features, module.in_features):
                    raise FormatError(
                        f"{name} holds a weight of shape {list(weight.shape)}, "
                        f"config.json asks for {[module.out_features, module.in_features]}"
                    )
                module.adopt(weight, self.dtype, kernel)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that `save_pretrained` writes, quantized weights in the layout of their format."""
        quantized = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
        state = {}
        for name, tensor in model.state_dict().items():
            module, _, leaf = name.rpartition(".")
            if module not in quantized or leaf == "bias":
                state[name] = tensor
        for name, linear in quantized.items():
            for suffix, tensor in self.format.lay_out(linear.qtensor().map(lambda t: t.cpu()), self.config).items():
                state[f"{name}.{suffix}"] = tensor
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, QLinear):
                weight = module.qtensor().dequantize(dtype)
                plain: nn.Linear | Conv1D
                if module.transposed:
                    with torch.device("meta"):
                        plain = Conv1D(module.out_features, module.in_features)
                    weight = weight.T.contiguous()
                else:
                    k, n = module.in_features, module.out_features
                    plain = nn.Linear(k, n, bias=module.bias is not None, device="meta")
                plain.weight = nn.Parameter(weight, requires_grad=False)
                if module.bias is not None:
                    plain.bias = module.bias
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, plain)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Stand in for the back ends that are not installed."""
    if not (is_gptqmodel_available() and is_optimum_available()):
        auto.AUTO_QUANTIZER_MAPPING["gptq"] = FewbitQuantizer


@contextmanager
def serving(kernel: str | None = None) -> Iterator[None]:
    """Within, every format that fewbit knows is loaded by fewbit, and by `kernel` where one is named."""
    ours = {format().quant_method: FewbitQuantizer for format in registry.entries("formats").values()}
    before = {name: auto.AUTO_QUANTIZER_MAPPING.get(name) for name in ours}
    auto.AUTO_QUANTIZER_MAPPING.update(ours)
    if kernel:
        _forced_kernel.append(kernel)
    try:
        yield
    finally:
        if kernel:
            _forced_kernel.pop()
        auto.AUTO_QUANTIZER_MAPPING.update(before)


def _renamed(model: PreTrainedModel, specs: Mapping[str, PartSpec]) -> dict[str, PartSpec]:
    """The tensors of a checkpoint by the names of the modules that they belong to in `model`."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    modules = dict(model.named_modules())
    found = {}
    for key, spec in specs.items():
        # The loader adds or drops the base model's prefix by looking for the key; here its module is looked for.
        name, _ = rename_source_key(key, renamings, [])
        prefix = model.base_model_prefix + "."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate.rpartition(".")[0] in modules:
                name = candidate
                break
        found[name] = spec
    return found


def _put(model: PreTrainedModel, module: str, tensors: Mapping[str, PartSpec], *, has_bias: bool) -> None:
    """A `QLinear` in place of the linear called `module`, waiting for these tensors."""
    try:
        linear = model.get_submodule(module)
    except AttributeError:
        raise FormatError(f"the checkpoint has quantized tensors for {module}, which the model does not have") from None
    if isinstance(linear, Conv1D):
        k, n = linear.nx, linear.nf
    elif isinstance(linear, nn.Linear):
        k, n = linear.in_features, linear.out_features
    else:
        raise FormatError(f"the checkpoint has quantized tensors for {module}, which is a {type(linear).__name__}")
    bias = linear.bias
    if bias is None and has_bias:  # methods that shift weights write one where the model has none
        bias = nn.Parameter(torch.empty(n, dtype=model.dtype, device="meta"))
    parent, _, leaf = module.rpartition(".")
    packed = QLinear(k, n, bias, module).await_tensors(tensors)
    packed.transposed = isinstance(linear, Conv1D)
    setattr(model.get_submodule(parent), leaf, packed)


register()
