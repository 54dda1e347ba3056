"""Replaces modules of a model by packed ones, and packed ones by ordinary ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from fewbit.errors import FormatError, KernelError
from fewbit.models.conversions import owner
from fewbit.models.linears import LINEARS, shape_of
from fewbit.nn.fused import packed_linears
from fewbit.nn.layers import Packed, QEmbedding, QLinear
from fewbit.schemes.base import PartSpec
from fewbit.system import heap

FEW = 0.01  # a smaller share of unquantized parameters gives no warning


def renamed(model: PreTrainedModel, specs: Iterable[str]) -> dict[str, str]:
    """The name in `model` of each tensor of a checkpoint."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    modules = dict(model.named_modules())
    found = {}
    for key in specs:
        # transformers adds or drops the base model's prefix if the model has that key. Quantized tensors are no keys of
        # the model, so look for their module instead.
        name, _ = rename_source_key(key, renamings, [])
        prefix = model.base_model_prefix + "."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if owner(candidate) in modules:
                name = candidate
                break
        found[key] = name
    return found


def without_place(model: PreTrainedModel, name: str, said: str) -> FormatError:
    """The error `said`, for a module or tensor `name` of a checkpoint that `model` does not have, with its reason."""
    theirs, _, rest = name.partition(".")
    ours, own = model.base_model_prefix, [*dict(model.named_modules()), *dict(model.named_parameters())]
    if theirs == ours or f"{ours}.{rest}" not in own:
        return FormatError(said)
    return FormatError(
        f"{said}: a {type(model).__name__} names its base model {ours!r}, and the checkpoint names it {theirs!r}. "
        "transformers would begin with random weights",
        f"Use a class that names it {theirs!r}, such as AutoModelForCausalLM or AutoModelForTokenClassification.",
    )


def put(model: PreTrainedModel, module: str, tensors: Mapping[str, PartSpec], *, has_bias: bool) -> None:
    """Replace the linear called `module` by a `QLinear` with placeholders for `tensors`."""
    try:
        linear = model.get_submodule(module)
    except AttributeError:
        said = f"the checkpoint has quantized tensors for {module}, which the model does not have"
        raise without_place(model, module, said) from None
    if not isinstance(linear, LINEARS):
        raise FormatError(f"the checkpoint has quantized tensors for {module}, which is a {type(linear).__name__}")
    (n, k), bias = shape_of(linear), linear.bias
    if bias is None and has_bias:  # methods that shift weights add a bias that the model does not have
        bias = nn.Parameter(torch.empty(n, dtype=model.dtype, device="meta"))
    parent, _, leaf = module.rpartition(".")
    packed = QLinear(k, n, bias, module).await_tensors(tensors)
    packed.transposed = isinstance(linear, Conv1D)
    packed._is_hf_initialized = True  # else the code of some models draws numbers of the shape of a plain weight
    setattr(model.get_submodule(parent), leaf, packed)


def untie(model: PreTrainedModel, packed: Iterable[str]) -> None:
    """Let the layers `packed` of `model` have weights of their own, whatever its config says.

    A file that has a packed output head beside the embedding does not tie the two: they differ by its rounding.
    """
    own = [name for name in (f"{module}.weight" for module in packed) if name in model.all_tied_weights_keys]
    for name in own:
        del model.all_tied_weights_keys[name]
    if own:
        model.config.tie_word_embeddings = False


def as_stored(tensor: Tensor, spec: PartSpec | None) -> Tensor:
    """A tensor to save again, in the dtype and shape that the checkpoint had for it, if these hold the same numbers.

    Shapes may differ in dimensions of size 1 only. Another layout of the same format has the same number of entries.
    """
    if spec is None or spec == PartSpec.of(tensor) or _sizes(tensor.shape) != _sizes(spec.shape):
        return tensor
    cast = tensor.to(spec.dtype)
    return cast.reshape(spec.shape) if torch.equal(cast.to(tensor.dtype), tensor) else tensor


def _sizes(shape: Iterable[int]) -> list[int]:
    """The sizes of the dimensions that are not 1."""
    return [size for size in shape if size != 1]


class ScaledActivation(nn.Module):
    """An activation function that divides its outputs by `scales`, one for each channel.

    AutoAWQ uses it if it scaled a linear's columns and there is no norm or linear before it to fold the scales into.
    """

    def __init__(self, act: nn.Module, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(torch.empty(channels, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x)
        return out / self.scales.to(out)


def taken(name: str, module: QLinear | QEmbedding) -> dict[str, Tensor]:
    """The tensors that transformers read for a packed module. KernelError if it left them on the disk."""
    tensors = module.take_tensors()
    if any(tensor.is_meta for tensor in tensors.values()):
        raise on_disk(name)
    return tensors


def on_disk(name: str) -> KernelError:
    """The error for a packed module that a device map puts on the disk."""
    return KernelError(
        f"{name}: packed weights cannot be offloaded to the disk yet",
        "Give a device map that keeps the whole model in memory, such as device_map='cpu'.",
    )


def releasing(read: list[Tensor], done_with: heap.DoneWith) -> Callable[[list[Packed]], None]:
    """What to call with layers that have their kernel's layout. It releases the tensors in `read`, and empties it."""

    def done(layers: list[Packed]) -> None:
        done_with(read, [tensor for layer in layers for tensor in layer.prepared])
        read.clear()

    return done


def put_scales(model: PreTrainedModel, module: str, spec: PartSpec) -> None:
    """Replace the activation function called `module` by a `ScaledActivation` with a placeholder for its scales."""
    try:
        act = model.get_submodule(module)
    except AttributeError:
        raise FormatError(f"the checkpoint has {module}.scales, but the model has no {module}") from None
    if any(True for _ in act.parameters()):
        raise FormatError(f"the checkpoint has {module}.scales, but {module} is a {type(act).__name__}")
    parent, _, leaf = module.rpartition(".")
    setattr(model.get_submodule(parent), leaf, ScaledActivation(act, spec.shape[0], model.dtype))


def left_as_they_are(model: PreTrainedModel, skipped: Iterable[str] = ()) -> str | None:
    """A sentence about the weights that are not going to be quantized; None if they are less than `FEW` of the model.

    Embeddings, the output head and the modules in `skipped` are not counted.
    """
    waiting = [module for module in model.modules() if isinstance(module, QLinear)]
    quantized = sum(module.in_features * module.out_features for module in waiting)
    left: dict[str, int] = {}
    names = list(skipped)
    for name, module in model.named_modules():
        if isinstance(module, (QLinear, nn.Embedding)) or not should_convert_module(name, names):
            continue
        for leaf, weight in module.named_parameters(recurse=False):
            if weight.dim() > 1:
                left[f"{name}.{leaf}"] = weight.numel()
    share = sum(left.values()) / max(sum(left.values()) + quantized, 1)
    if share < FEW:
        return None
    largest = max(left, key=lambda name: left[name])
    kind = type(model.get_submodule(largest.rpartition(".")[0])).__name__
    return (
        f"{sum(left.values()):,} parameters, {share:.0%} of those in the model's layers, stay in {model.dtype}: only "
        f"ordinary linears are quantized, and {largest} belongs to a {kind}"
    )


def put_embedding(model: PreTrainedModel, module: str, spec: PartSpec) -> bool:
    """Replace the embedding called `module` by a `QEmbedding` with a placeholder for its codes.

    Returns False, and changes nothing, if fewbit does not know this class of embedding.
    """
    embedding = model.get_submodule(module)
    scale = getattr(embedding, "scalar_embed_scale", None)
    if not isinstance(embedding, nn.Embedding) or (type(embedding) is not nn.Embedding and scale is None):
        return False
    packed = QEmbedding(embedding.num_embeddings, embedding.embedding_dim, module, scale)
    packed.stands_for = (embedding,)  # in a tuple, so that PyTorch does not register it as a submodule
    parent, _, leaf = module.rpartition(".")
    setattr(model.get_submodule(parent), leaf, packed.await_tensors({"weight": spec}))
    return True


def unpack(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace the packed modules of `model` by ordinary ones with dequantized weights in `dtype`. Returns `model`."""
    if any(isinstance(module, ScaledActivation) for module in model.modules()):
        raise FormatError(
            "AutoAWQ divides the outputs of this model's activation functions by scales; an ordinary model cannot",
            "Use the original model.",
        )
    plain: nn.Linear | Conv1D | nn.Embedding
    packed: dict[str, QLinear | QEmbedding] = dict(packed_linears(model))
    packed |= {name: m for name, m in model.named_modules() if isinstance(m, QEmbedding)}
    for name, module in packed.items():
        weight = module.qtensor().dequantize(dtype)
        if isinstance(module, QEmbedding):
            (plain,) = module.stands_for
            if module.scale is not None:
                plain.embed_scale = torch.tensor(module.scale, device=weight.device, dtype=torch.float32)
        elif module.transposed:
            with torch.device("meta"):
                plain = Conv1D(module.out_features, module.in_features)
            weight = weight.T.contiguous()
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(module, QLinear) and module.bias is not None:
            plain.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    if isinstance(model.get_input_embeddings(), nn.Embedding):
        model.tie_weights()
    return model
