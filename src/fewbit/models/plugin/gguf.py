"""Loads a GGUF file into a transformers model and keeps its weights packed.

`from_pretrained(..., gguf_file=...)` takes the tensors from an `HfQuantizer`. This one renames them to the model's
modules. A quantized weight becomes the bytes of its blocks, a memory-mapped view of the file, for `QLinear` or
`QEmbedding`. Other tensors become floats. The rows of Llama's q and k are permuted to transformers' order, a whole row
of blocks at a time. A quantized tensor is decoded only if it belongs to a module that has no packed counterpart. A
tensor of all experts of a layer is cut into those of the experts, which are stacked again as for other formats. A
matrix that the file has in pieces is joined (`models/gguf/pieces.py`).

Saving such a model writes a GGUF file with the same keys, tensors and types.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from fewbit import hook
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import PLAIN, SAVED, Entry, GgufFile, GgufWriter
from fewbit.models import experts, parallel, scales, stacking
from fewbit.models.building import building
from fewbit.models.decoding import compiled_blocks
from fewbit.models.gguf import hybrid, towers
from fewbit.models.gguf.architectures import of_file
from fewbit.models.gguf.config import to_config
from fewbit.models.gguf.names import Route, architecture, listed_of, lists_of, names_of, routes, splits_of
from fewbit.models.gguf.pieces import Joined, decoded
from fewbit.models.linears import LINEARS
from fewbit.models.patching import replace
from fewbit.models.plugin.modules import put, put_embedding, releasing, taken, unpack, without_place
from fewbit.models.plugin.patch_gguf_config import gguf_path, named
from fewbit.models.plugin.serving import requested_kernel, requested_tower
from fewbit.names import lacking
from fewbit.nn.layers import QEmbedding, QLinear
from fewbit.schemes.base import QTensor
from fewbit.schemes.ggml import codec
from fewbit.system import heap, publish

_NUMBERS = ("f32", "f16", "bf16")
_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_HEAD = ("lm_head.weight", "lm_head.bias")


_Theirs: Any = GgufHfQuantizer  # untyped; it loads the architectures that fewbit does not know


class GgufQuantizer(_Theirs):  # type: ignore[misc]
    """Replaces the modules of quantized tensors by packed modules, and loads the file's tensors into them."""

    file: GgufFile | Joined | None = None
    origin: Path | None = None  # the path of `file`
    dtype: torch.dtype

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.kernel, self.tower_file = requested_kernel(), requested_tower()
        self.text_config: Any = None  # of the language model, if the file of a tower is beside it
        self.tower: towers.Weights | None = None

    def read_header(self, gguf_file: str) -> None:
        """Parse the header. transformers calls this once it knows the file's path."""
        file = GgufFile(gguf_file)
        if of_file(file) is None:
            super().read_header(gguf_file)
            return
        self.file, self.origin, self.own_scales = file, file.path, scales.of_metadata(file.metadata)
        if self.tower_file is not None:
            self.text_config = AutoConfig.for_model(**to_config(file))
        file.release_headers()
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
        parallel.check_loader(model)
        config = self.text_config or model.config
        self.routes = _routes_of(model, config) if self.text_config is None else routes(config)
        if any(route.expert is not None and not route.heights for route in self.routes.values()):
            experts.separate(model)
        if self.tower_file is not None:
            self._find_tower(model, self.tower_file)
        splits, listed = splits_of(self.routes), listed_of(self.routes)
        if splits or listed:
            assert isinstance(self.file, GgufFile)
            self.file = Joined(self.file, splits, listed, _NAMES.get(self.dtype, "f32"))
        beside = self.tower.shapes if self.tower is not None else {}
        try:
            self.entries = _matched(self.file, model, self.routes, architecture(config).extra, beside)
        except FormatError as error:
            if self.tower is None:
                raise
            raise FormatError(
                f"{error.message}. The model is a {type(model).__name__} because of its tower, {self.tower.file.path}",
                "Give the mmproj file that was made of the same model.",
            ) from None
        for name, entry in self.entries.items():
            if entry.type in PLAIN or self.quantization_config.dequantize:
                continue
            module = name.removesuffix(".weight")
            original = model.get_submodule(module) if name.endswith(".weight") else None
            if isinstance(original, LINEARS):
                put(model, module, {"weight": entry.spec}, has_bias=False)
            elif not isinstance(original, nn.Embedding) or not put_embedding(model, module, entry.spec):
                continue
            self.packed[module] = self._qtensor(entry, self.routes[name])
        self._pack_ties(model)
        return model

    def _find_tower(self, model: PreTrainedModel, path: Path) -> None:
        """Find the vision tower's tensors. What is outside the language model is the tower."""
        opened = towers.opened(path, self.text_config.model_type)
        self.routes = {opened.row.inside(name): route for name, route in self.routes.items()}
        own = [*model.named_parameters(remove_duplicate=False), *persistent(model)]
        shapes = {name: tuple(tensor.shape) for name, tensor in own if name not in self.routes}
        self.tower = towers.Weights(opened, model.config, shapes)
        if kinds := self.tower.quantized:
            warnings.warn(
                f"{path.name}: {', '.join(kinds)} tensors of the tower are dequantized in memory", stacklevel=2
            )
        if self.tower.heard:
            warnings.warn(f"{path.name}: its tower for sound is left out; fewbit reads that for images", stacklevel=2)

    def _pack_ties(self, model: PreTrainedModel) -> None:
        """Pack each output head that is tied to a packed embedding."""
        for second, first in model.all_tied_weights_keys.items():
            source, target = first.removesuffix(".weight"), second.removesuffix(".weight")
            if source in self.packed and second not in self.entries:
                put(model, target, {"weight": self.entries[first].spec}, has_bias=False)
                self.packed[target] = self.packed[source]

    def _qtensor(self, entry: Entry, route: Route) -> QTensor:
        """The weight's scheme, shape and order of columns. Its data is added when the file is loaded."""
        return QTensor(codec(entry.type), (entry.shape[0], entry.shape[1]), {}, route.column_order)

    def get_state_dict(self, checkpoint_file: str, model: PreTrainedModel) -> dict[str, Tensor]:
        """The file's tensors, by their names in the model."""
        if self.file is None:
            other: dict[str, Tensor] = super().get_state_dict(checkpoint_file, model)
            return other
        state = self.tower.state(self.dtype) if self.tower is not None else {}
        for name, entry in self.entries.items():
            route, tensor = self.routes[name], self._stored(name)
            if name.removesuffix(".weight") in self.packed:
                state[name] = tensor if route.rows_back is None else tensor[route.rows_back]
            else:
                if entry.type not in PLAIN:
                    tensor = decoded(entry, tensor, self.dtype)
                state[name] = route.from_file(tensor).contiguous()
            if state[name].data_ptr() != tensor.data_ptr():
                self.file.release(entry.name)
        return state

    def _stored(self, name: str) -> Tensor:
        """What the file holds for a tensor of the model."""
        assert self.file is not None
        return self.routes[name].part_of(self.file.get(self.entries[name].name))

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        """No conversions: `get_state_dict` has renamed the tensors already."""
        return super().update_weight_conversions(weight_conversions, *args) if self.file is None else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.file is None:
            other: PreTrainedModel = super()._process_model_after_weight_loading(model, **kwargs)
            return other
        with heap.trimmed() as done_with:
            self._prepare(model, done_with)
        modules = dict(model.named_modules())
        scales.attach(model, self.own_scales)
        for second, first in model.all_tied_weights_keys.items():
            source, target = (modules.get(key.removesuffix(".weight")) for key in (first, second))
            if isinstance(source, QEmbedding) and isinstance(target, QLinear) and _same(source, target):
                target.weight = source.weight  # shared, so that it is counted and moved once
        model._weight_conversions = None  # type: ignore[assignment]
        if self.quantization_config.dequantize:
            experts.join(model)
        else:
            compiled_blocks.use(model)
            model.save_pretrained = _Saver(model, self)  # type: ignore[method-assign,assignment]
        return model

    def _prepare(self, model: PreTrainedModel, done_with: heap.DoneWith) -> None:
        """Convert every weight to its kernel's layout, and release what was read from the file."""
        read: list[Tensor] = []

        def weight_of(name: str, module: QLinear | QEmbedding) -> QTensor:
            (blocks,) = taken(name, module).values()
            read.append(blocks)
            weight = self.packed[name]
            return QTensor(weight.codec, weight.shape, {weight.codec.payload: blocks}, weight.permutation)

        own = parallel.parts_of(model, weight_of)
        for name, module in model.named_modules():
            if isinstance(module, QEmbedding):
                module.adopt(own(name, module), self.dtype)
        read.clear()
        stacking.pack(model, weight_of, releasing(read, done_with), self.dtype, self.kernel)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if self.file is None:
            other: PreTrainedModel = super()._dequantize(model, dtype)
            return other
        model.__dict__.pop("save_pretrained", None)
        plain = unpack(model, dtype or model.dtype)
        experts.join(plain)
        return plain

    def is_serializable(self, **kwargs: Any) -> bool:
        return self.file is not None

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        return None, {}

    @property
    def is_trainable(self) -> bool:
        return self.file is not None

    def check_place(self, path: Path) -> None:
        """PlanError if `path` is the file that the model was loaded from."""
        assert self.file is not None
        if path.exists() and path.resolve() in {file.resolve() for file in self.file.files}:
            raise PlanError(f"{path} is the file that this model was loaded from", "Save to another folder.")

    def check_saved(self, model: PreTrainedModel) -> None:
        """PlanError if a GGUF file cannot hold the model."""
        if self.tower is not None:
            raise PlanError(
                f"a GGUF file holds no vision tower, and this model has that of {self.tower.file.path.name}",
                "Save an ordinary folder: model.dequantize().save_pretrained(folder).",
            )
        if new := [name for name, _ in model.named_parameters() if _is_new(name, model, self.routes)]:
            raise PlanError(
                f"GGUF has no name for {new[0]} of a {type(model).__name__}",
                "Save an ordinary folder: model.dequantize().save_pretrained(folder).",
            )

    def write(self, model: PreTrainedModel, path: Path) -> None:
        """Write the model as a GGUF file with the keys, tensors and types of the file that it was loaded from."""
        assert self.file is not None
        dropped = ("split.no", "split.count", "split.tensors.count", "general.alignment")
        metadata = {key: value for key, value in self.file.metadata.items() if key not in dropped}
        names: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            names.setdefault(entry.name, []).append(name)
        modules = dict(model.named_modules())
        file = self.file if isinstance(self.file, Joined) else Joined(self.file, {}, {})
        if file.listed:
            state = model.state_dict()
            metadata |= lists_of(self.routes, {name: state[name] for name in self.entries if self.routes[name].listed})
        with GgufWriter(path, metadata, list(file.stored.entries.values()), overwrite=True) as writer:
            for entry in file.entries.values():
                if entry.name in file.listed:
                    continue
                if entry.name not in names:
                    writer.add(entry.name, file.get(entry.name))
                    continue
                parts = [self._written(model, modules, name) for name in names[entry.name]]
                whole = self.routes[names[entry.name][0]].joined(parts)
                for own, piece in zip(file.pieces(entry.name), file.cut(entry.name, whole), strict=True):
                    writer.add(own.name, piece)

    def _written(self, model: PreTrainedModel, modules: Mapping[str, nn.Module], name: str) -> Tensor:
        """A tensor of the model, or of one expert, as the file stores it."""
        entry, route, module = self.entries[name], self.routes[name], modules[name.rpartition(".")[0]]
        if name.removesuffix(".weight") in self.packed:
            if not isinstance(module, (QLinear, QEmbedding)):
                raise PlanError(f"{name} is no longer packed", "Save the model before you replace its modules.")
            weight = module.qtensor()
            blocks = weight.parts[weight.codec.payload].cpu()
            return blocks if route.rows is None else blocks[route.rows]
        if entry.type not in PLAIN:
            return self._stored(name)
        held, stored = getattr(module, name.rpartition(".")[2]).detach().cpu(), self._stored(name)
        if not route.is_exact and torch.equal(held, route.from_file(stored).to(held.dtype)):
            return stored  # computed anew, some values would differ in their last digit
        return route.to_file(held).to(entry.spec.dtype).contiguous()


class _Saver:
    """`save_pretrained` of a model that was loaded from a GGUF file: it writes a GGUF file into the folder.

    If the model has an adapter (`add_adapter`), it saves only the adapter, as transformers does.
    """

    def __init__(self, model: PreTrainedModel, quantizer: GgufQuantizer) -> None:
        self.model, self.quantizer = model, quantizer

    def __call__(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `model.gguf`, which `from_pretrained(folder)` reads, without fewbit with `gguf_file="model.gguf"`."""
        if getattr(self.model, "_hf_peft_config_loaded", False):
            PreTrainedModel.save_pretrained(self.model, save_directory, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            raise PlanError("a GGUF file is saved to a folder only", "Push that folder with huggingface_hub.")
        folder = Path(save_directory)
        self.quantizer.check_saved(self.model)
        folder.mkdir(parents=True, exist_ok=True)
        self.quantizer.check_place(folder / SAVED)
        with (
            hook.saved().described(self.model, folder, self.quantizer.origin),
            publish.published(folder / SAVED, overwrite=True, file=True) as path,
        ):
            self.quantizer.write(self.model, path)


def _routes_of(model: PreTrainedModel, config: Any) -> dict[str, Route]:
    """The routes, by names in this model. A base model (without a head) has no prefix in its names.

    config: that of the language model.
    """
    by_name = routes(config)
    if model.base_model is not model:
        return by_name
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): route for name, route in by_name.items()}


def _is_new(name: str, model: PreTrainedModel, known: Mapping[str, Route]) -> bool:
    """Whether a parameter belongs to a head that GGUF files never have, such as a classifier's."""
    base = model.base_model
    return base is not model and name not in known and not name.startswith(f"{model.base_model_prefix}.")


def _matched(
    file: GgufFile | Joined,
    model: PreTrainedModel,
    known: dict[str, Route],
    extra: frozenset[str],
    beside: Container[str],
) -> dict[str, Entry]:
    """Name in the model -> its tensor in the file. FormatError if a tensor is missing or has a wrong shape.

    extra: tensors of the file that are no weights. beside: tensors of the model that are in another file.

    As with other checkpoints in transformers, the file's output head is ignored if the model's class has none, and a
    head that GGUF files never have (such as a classifier's) is initialized with a warning.
    """
    ours = names_of(known)
    ignored = extra | hybrid.beyond(file)
    own = [*model.named_parameters(remove_duplicate=False), *persistent(model)]
    expected = {name: tensor.shape for name, tensor in own if name not in beside}
    entries: dict[str, Entry] = {}
    for entry in file.entries.values():
        if entry.name in ignored:
            continue
        name, *others = ours.get(entry.name, [""])
        if name in _HEAD and model.get_output_embeddings() is None:
            continue
        if name not in expected:
            said = f"{file.path}: the tensor {entry.name} has no place in a {type(model).__name__}"
            raise without_place(model, name, said)
        shapes = {each: known[each].shape_in_file(expected[each]) for each in (name, *others)}
        whole = known[name].shape_of_all(shapes[name], len(shapes))
        if entry.shape != whole:
            raise FormatError(
                f"{file.path}: {entry.name} has shape {list(entry.shape)}, the model expects {list(whole)}"
            )
        if entry.type in PLAIN and entry.type not in _NUMBERS:
            raise FormatError(f"{file.path}: {entry.name} has type {entry.type}, expected a float type")
        entries |= {each: entry._replace(shape=shape) for each, shape in shapes.items()}
    tied = model.all_tied_weights_keys
    missing = [name for name in expected if name not in entries and tied.get(name) not in entries]
    missing = [name for name in missing if not _is_new(name, model, known)]
    if missing:
        stored = [known[name].name if name in known else name for name in missing]
        raise FormatError(f"{file.path}: {lacking(stored)}")
    return entries


def persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that files have, such as what corrects the scores of experts."""
    kept = model.state_dict(keep_vars=True)
    return ((name, tensor) for name, tensor in model.named_buffers() if name in kept)


def _same(embedding: QEmbedding, head: QLinear) -> bool:
    ours, theirs = embedding.held, head.held
    return (
        ours is not None and theirs is not None and ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape
    )


def _from_pretrained(
    theirs: Any, kind: Any, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if file := named(pretrained_model_name_or_path, kwargs, "*.safetensors*", "*.bin*"):
        kwargs["gguf_file"] = gguf_path(pretrained_model_name_or_path, file, kwargs)
    with building():
        return theirs(kind, pretrained_model_name_or_path, *args, **kwargs)


def register() -> None:
    """Replace `from_pretrained` of all models.

    `from_pretrained(folder, gguf_file=...)` reads the file in `folder`: transformers would prefer a file of that name
    in the working directory. A folder with one GGUF model and nothing else to read needs no `gguf_file`. And threads
    take turns: transformers changes settings of the process while it builds a model, such as whether weights are tied.
    """
    replace(PreTrainedModel, "from_pretrained", _from_pretrained)


register()
