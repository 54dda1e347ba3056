"""The weights of a GGUF file in a model of transformers, packed as they lie there.

`from_pretrained(..., gguf_file=...)` asks an `HfQuantizer` for the tensors. This one gives them under the names of the
model's own modules: blocks as the integers that `QLinear` and `QEmbedding` wait for, views on the file's pages, and the
rest as numbers. Rows of Llama's q and k are put in transformers' order; a row of blocks is moved whole. Nothing is
decoded but what no packed module stands for.

Saving such a model writes a GGUF file again: same keys, same tensors, same types.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from fewbit.errors import FormatError, KernelError, PlanError
from fewbit.formats.containers.gguf import PLAIN, Entry, GgufFile, GgufWriter
from fewbit.models import scales
from fewbit.models.gguf.names import ARCHITECTURES, Route, routes
from fewbit.models.linears import LINEARS
from fewbit.models.plugin.modules import kernel_asked_for, put, put_embedding, unpack
from fewbit.models.plugin.patch_gguf_config import gguf_path
from fewbit.nn.layers import QEmbedding, QLinear
from fewbit.schemes.base import QTensor
from fewbit.schemes.ggml import codec
from fewbit.system import heap, publish

_NUMBERS = ("f32", "f16", "bf16")
SAVED = "model.gguf"
_HEAD = ("lm_head.weight", "lm_head.bias")


_Theirs: Any = GgufHfQuantizer  # which serves the architectures that are not known here, and is not typed


class GgufQuantizer(_Theirs):  # type: ignore[misc]
    """Puts packed modules where a file has blocks, and gives each its own."""

    file: GgufFile | None = None
    dtype: torch.dtype

    def read_header(self, gguf_file: str) -> None:
        """Parse the header, when transformers has found out where the file is."""
        file = GgufFile(gguf_file)
        if file.metadata.get("general.architecture") not in ARCHITECTURES:
            super().read_header(gguf_file)
            return
        self.file = file
        self.packed: dict[str, QTensor] = {}

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        if self.file is None:
            other: torch.dtype = super().update_dtype(dtype)
            return other
        self.dtype = dtype or torch.float32
        return self.dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if self.file is None:
            return super()._process_model_before_weight_loading(model, **kwargs)
        self.routes = _routes_of(model)
        self.entries = _matched(self.file, model, self.routes)
        for name, entry in self.entries.items():
            if entry.type in PLAIN or self.quantization_config.dequantize:
                continue
            module = name.removesuffix(".weight")
            found = model.get_submodule(module) if name.endswith(".weight") else None
            if isinstance(found, LINEARS):
                put(model, module, {"weight": entry.spec}, has_bias=False)
            elif not isinstance(found, nn.Embedding) or not put_embedding(model, module, entry.spec):
                continue
            self.packed[module] = self._qtensor(entry)
        self._pack_ties(model)
        return model

    def _pack_ties(self, model: PreTrainedModel) -> None:
        """The head of a packed embedding that it is tied to."""
        for second, first in model.all_tied_weights_keys.items():
            source, target = first.removesuffix(".weight"), second.removesuffix(".weight")
            if source in self.packed and second not in self.entries:
                put(model, target, {"weight": self.entries[first].spec}, has_bias=False)
                self.packed[target] = self.packed[source]

    def _qtensor(self, entry: Entry) -> QTensor:
        """The weight without its data, which comes when it is loaded."""
        return QTensor(codec(entry.type), (entry.shape[0], entry.shape[1]), {})

    def get_state_dict(self, checkpoint_file: str, model: PreTrainedModel) -> dict[str, Tensor]:
        """The file's tensors by the names of the model's own."""
        if self.file is None:
            other: dict[str, Tensor] = super().get_state_dict(checkpoint_file, model)
            return other
        found = {}
        for name, entry in self.entries.items():
            route, tensor = self.routes[name], self.file.get(entry.name)
            if name.removesuffix(".weight") in self.packed:
                found[name] = tensor if route.rows_back is None else tensor[route.rows_back]
            else:
                if entry.type not in PLAIN:
                    tensor = _decoded(entry, tensor, self.dtype)
                found[name] = route.from_file(tensor).contiguous()
            if found[name].data_ptr() != tensor.data_ptr():
                self.file.release(entry.name)
        return found

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        """None: tensors have the names of the modules already."""
        return super().update_weight_conversions(weight_conversions, *args) if self.file is None else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.file is None:
            other: PreTrainedModel = super()._process_model_after_weight_loading(model, **kwargs)
            return other
        modules = dict(model.named_modules())
        with heap.trimmed() as done_with:
            self._prepare(modules, done_with)
        scales.attach(model, scales.of_metadata(self.file.metadata))
        self.file.forget()
        for second, first in model.all_tied_weights_keys.items():
            source, target = (modules.get(key.removesuffix(".weight")) for key in (first, second))
            if isinstance(source, QEmbedding) and isinstance(target, QLinear) and _same(source, target):
                target.weight = source.weight  # one parameter, so that it is counted once, and moved once
        model._weight_conversions = None  # type: ignore[assignment]
        if not self.quantization_config.dequantize:
            model.save_pretrained = _Saver(model, self)  # type: ignore[method-assign,assignment]
        return model

    def _prepare(self, modules: Mapping[str, Any], done_with: heap.DoneWith) -> None:
        """Lay out every weight for its kernel, and let go of what was read from the file."""
        for name, weight in self.packed.items():
            module = modules[name]
            assert isinstance(module, (QLinear, QEmbedding))
            (blocks,) = module.take_tensors().values()
            if blocks.is_meta:
                raise KernelError(
                    f"{name}: packed weights cannot be offloaded to the disk yet",
                    "Give a device map that keeps the whole model in memory, such as device_map='cpu'.",
                )
            full = QTensor(weight.codec, weight.shape, {weight.codec.payload: blocks})
            if isinstance(module, QEmbedding):
                module.adopt(full, self.dtype)
            else:
                module.adopt(full, self.dtype, kernel_asked_for())
                done_with([blocks], module.prepared)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if self.file is None:
            other: PreTrainedModel = super()._dequantize(model, dtype)
            return other
        model.__dict__.pop("save_pretrained", None)
        return unpack(model, dtype or model.dtype)

    def is_serializable(self, **kwargs: Any) -> bool:
        return self.file is not None

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        return None, {}

    @property
    def is_trainable(self) -> bool:
        return self.file is not None

    def check_place(self, path: Path) -> None:
        """PlanError where the model's own file lies at `path`."""
        assert self.file is not None
        if path.exists() and path.resolve() in {file.resolve() for file in self.file.files}:
            raise PlanError(f"{path} is the file that the model lies in", "Save to another folder.")

    def write(self, model: PreTrainedModel, path: Path) -> None:
        """The model as a GGUF file with the keys, tensors and types that it was loaded from."""
        assert self.file is not None
        if new := [name for name, _ in model.named_parameters() if _is_new(name, model, self.routes)]:
            raise PlanError(
                f"GGUF has no name for {new[0]} of a {type(model).__name__}",
                "Save an ordinary folder: model.dequantize().save_pretrained(folder).",
            )
        dropped = ("split.no", "split.count", "split.tensors.count", "general.alignment")
        metadata = {key: value for key, value in GgufFile(self.file.path).metadata.items() if key not in dropped}
        names = {entry.name: name for name, entry in self.entries.items()}
        modules = dict(model.named_modules())
        with GgufWriter(path, metadata, list(self.file.entries.values()), overwrite=True) as writer:
            for entry in self.file.entries.values():
                if entry.name not in names:
                    writer.add(entry.name, self.file.get(entry.name))
                    continue
                name, route = names[entry.name], self.routes[names[entry.name]]
                module = modules[name.rpartition(".")[0]]
                if name.removesuffix(".weight") in self.packed:
                    if not isinstance(module, (QLinear, QEmbedding)):
                        raise PlanError(f"{name} is no longer packed", "Save the model before it is changed so.")
                    weight = module.qtensor()
                    blocks = weight.parts[weight.codec.payload].cpu()
                    writer.add(entry.name, blocks if route.rows is None else blocks[route.rows])
                elif entry.type in PLAIN:
                    value = route.to_file(model.get_parameter(name).detach().cpu())
                    writer.add(entry.name, value.to(entry.spec.dtype).contiguous())
                else:
                    writer.add(entry.name, self.file.get(entry.name))


class _Saver:
    """`save_pretrained` of a model that came from a GGUF file: another such file in the folder.

    A model with an adapter (`add_adapter`) saves the adapter alone, as transformers' models do.
    """

    def __init__(self, model: PreTrainedModel, quantizer: GgufQuantizer) -> None:
        self.model, self.quantizer = model, quantizer

    def __call__(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `model.gguf`, which `from_pretrained(folder, gguf_file="model.gguf")` reads."""
        if getattr(self.model, "_hf_peft_config_loaded", False):
            PreTrainedModel.save_pretrained(self.model, save_directory, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            raise PlanError("a GGUF file is saved to a folder only", "Push that folder with huggingface_hub.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.quantizer.check_place(folder / SAVED)
        with publish.published(folder / SAVED, overwrite=True, file=True) as made:
            self.quantizer.write(self.model, made)


def _routes_of(model: PreTrainedModel) -> dict[str, Route]:
    """The routes by the model's own names: a base model, which has no head, is no part of another there."""
    found = routes(model.config)
    if model.base_model is not model:
        return found
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): route for name, route in found.items()}


def _is_new(name: str, model: PreTrainedModel, known: Mapping[str, Route]) -> bool:
    """Whether it belongs to a head that no file has, such as that of a classifier."""
    base = model.base_model
    return base is not model and name not in known and not name.startswith(f"{model.base_model_prefix}.")


def _matched(file: GgufFile, model: PreTrainedModel, known: dict[str, Route]) -> dict[str, Entry]:
    """Name in the model -> its tensor in the file; FormatError unless they are all there and of the right shapes.

    As transformers does with any checkpoint: the output head is left out where the model's class has none, and a head
    that no file has is initialized, with a warning.
    """
    ours = {route.name: name for name, route in known.items()}
    extra = ARCHITECTURES[file.metadata["general.architecture"]].extra
    expected = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    found = {}
    for entry in file.entries.values():
        if entry.name in extra:
            continue
        name = ours.get(entry.name)
        if name in _HEAD and model.get_output_embeddings() is None:
            continue
        if name is None or name not in expected:
            raise FormatError(f"{file.path}: the tensor {entry.name} has no place in a {type(model).__name__}")
        shape = tuple(expected[name][::-1] if known[name].transposed else expected[name])
        if entry.shape != shape:
            raise FormatError(
                f"{file.path}: {entry.name} has shape {list(entry.shape)}, its keys ask for {list(shape)}"
            )
        if entry.type in PLAIN and entry.type not in _NUMBERS:
            raise FormatError(f"{file.path}: {entry.name} has type {entry.type}, which is none of a weight")
        found[name] = entry
    tied = model.all_tied_weights_keys
    missing = [name for name in expected if name not in found and tied.get(name) not in found]
    missing = [name for name in missing if not _is_new(name, model, known)]
    if missing:
        named = known[missing[0]].name if missing[0] in known else missing[0]
        raise FormatError(f"{file.path}: {len(missing)} tensors are missing, the first is {named}")
    return found


def _decoded(entry: Entry, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a tensor that no packed module stands for."""
    rows = blocks.reshape(-1, blocks.shape[-1])
    weight = QTensor(codec(entry.type), (rows.shape[0], entry.shape[-1]), {})
    weight.parts[weight.codec.payload] = rows
    return weight.dequantize(dtype).view(entry.shape)


def _same(embedding: QEmbedding, head: QLinear) -> bool:
    ours, theirs = embedding.held, head.held
    return (
        ours is not None and theirs is not None and ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape
    )


def register() -> None:
    """Have `from_pretrained(folder, gguf_file=...)` read the folder's file, whatever lies in the working directory."""
    cls: Any = PreTrainedModel
    theirs = cls.from_pretrained
    if hasattr(theirs, "by_fewbit"):
        return
    inner = theirs.__func__

    @wraps(inner)
    def ours(kind: Any, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        if pretrained_model_name_or_path is not None and (file := kwargs.get("gguf_file")):
            kwargs["gguf_file"] = gguf_path(pretrained_model_name_or_path, file, kwargs)
        return inner(kind, pretrained_model_name_or_path, *args, **kwargs)

    ours.by_fewbit = True  # type: ignore[attr-defined]
    patched: Any = ours
    cls.from_pretrained = classmethod(patched)


register()
