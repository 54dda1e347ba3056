"""A copy of a quantized model's files in which some tensors have other values.

Names, shapes, types and the config stay those of the source, so every reader of the source reads the copy. A packed
weight is laid out by its own format, and only the tensors that change are replaced. `why_not` tells if fewbit does not
reproduce the layout of these tensors.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FormatError, PlanError
from fewbit.formats.base import by_quant_method
from fewbit.formats.containers.gguf import PLAIN, GgufFile, GgufWriter
from fewbit.formats.containers.safetensors import Checkpoint, copy_side_files, rewritten
from fewbit.models import decoded, scales, stored
from fewbit.models.gguf import names as gguf_names
from fewbit.models.packing import Weight
from fewbit.models.plugin.modules import as_stored
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import Source
from fewbit.schemes.base import PartSpec, QTensor
from fewbit.schemes.ggml.table import BLOCK_TYPES

_PROBE = 1.0625  # all floats of a weight times this, to see which tensors hold them
_SPLIT = ("split.no", "split.count", "split.tensors.count", "general.alignment")  # keys that the copy does not keep


class Files(ABC):
    """The files of a quantized source. Names of weights and parameters are those in the model."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton, self.source = skeleton, skeleton.source
        self.weights: Mapping[str, Weight] = stored.weights(skeleton)
        self.keys = {name: key for key, name in skeleton.name_of.items()}

    @abstractmethod
    def of_weight(self, module: str, weight: QTensor) -> dict[str, Tensor]:
        """Name in the files -> tensor, of the tensors that differ if the packed weight of `module` becomes `weight`.

        FormatError if the files cannot hold it.
        """

    def changes(self, module: str, weight: Callable[[], QTensor]) -> Mapping[str, Callable[[], Tensor]]:
        """Name in the files -> function that makes the tensor, for `of_weight` of the weight that `weight` returns."""
        return {name: partial(_same, tensor) for name, tensor in self.of_weight(module, weight()).items()}

    @abstractmethod
    def stored_type(self, module: str) -> torch.dtype | None:
        """The type in which the files hold the scales of a weight, if it is one of 16 bits."""

    @abstractmethod
    def of_parameter(self, name: str) -> str | None:
        """The name in the files of a parameter that is stored as it is in the model; None if it is not."""

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """The type in which the files hold a parameter of `of_parameter`."""

    @abstractmethod
    def to_file(self, name: str, value: Tensor) -> Tensor:
        """A parameter of the model as its tensor in the files."""

    @abstractmethod
    def write(self, place: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write the copy at `place`. tensors: name in the files -> the new tensor."""

    def why_not(self, module: str) -> str | None:
        """Why the files cannot hold other scales of a weight; None if they can. It reads the weight."""
        weight = self.weights[module].read()
        floats = {name: value * _PROBE for name, value in weight.codec.floats(weight.parts).items()}
        parts = weight.codec.with_floats(weight.parts, weight.codec.rounded(weight.parts, floats))
        moved = QTensor(weight.codec, weight.shape, parts, weight.permutation)
        if (narrow := self.stored_type(module)) is not None:
            stored = {name: value.to(narrow).float() for name, value in moved.codec.floats(moved.parts).items()}
            moved.parts = moved.codec.with_floats(moved.parts, moved.codec.rounded(moved.parts, stored))
        try:
            self.of_weight(module, moved)
        except FormatError as error:
            return error.message
        return None


class Folder(Files):
    """The safetensors files of a folder."""

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__(skeleton)
        config = self.source.quantization or {}
        format = by_quant_method(str(config.get("quant_method")))
        assert format is not None
        self.format, self.config, self.raw = format, config, Checkpoint(list(self.source.files))
        inside = {key.removesuffix(".weight"): key for key in (skeleton.packing.weights if skeleton.packing else ())}
        self.stored_as = {name: self._key(name) for name in self.weights if self._key(name) in inside}

    def _key(self, module: str) -> str:
        return self.keys.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")

    def of_weight(self, module: str, weight: QTensor) -> dict[str, Tensor]:
        key, before = self.stored_as[module], self.weights[module].read()
        # Scales do not depend on the order of columns (act-order), for which the config may name no place.
        plain = [replace(each, permutation=None) for each in (before, weight)]
        was, now = (self.format.lay_out(each, self.config, key) for each in plain)
        changed = {}
        for suffix, tensor in now.items():
            if suffix in was and torch.equal(was[suffix], tensor):
                continue
            name = self._name(module, suffix, was[suffix])
            spec = self.raw.specs.get(name)
            changed[name] = as_stored(tensor, spec)
            # JSON, as bitsandbytes has it beside a weight, may become longer or shorter.
            if spec != PartSpec.of(changed[name]) and suffix not in self.format.metadata_suffixes:
                raise FormatError(f"fewbit does not write {name} as this file has it")
        stored = {suffix: handle[...] for suffix, handle in self.weights[module].handles.items()}
        stored |= {name.removeprefix(f"{key}."): tensor for name, tensor in changed.items()}
        again = self.format.read(stored, self.config, key)
        if any(not torch.equal(again.parts[part], tensor) for part, tensor in weight.parts.items()):
            raise FormatError(f"the scales of {key} would change when they are written")
        return changed

    def _name(self, module: str, suffix: str, value: Tensor) -> str:
        """The name in the files of the tensor that has this value, and this suffix where fewbit writes the weight."""
        key = self.stored_as[module]
        if (usual := f"{key}.{suffix}") in self.raw.specs:
            return usual
        for other, handle in self.weights[module].handles.items():  # other tools have other names for scales
            spec = self.raw.specs[f"{key}.{other}"]
            if PartSpec.of(stored := as_stored(value, spec)) == spec and torch.equal(stored, handle[...]):
                return f"{key}.{other}"
        return usual

    def stored_type(self, module: str) -> torch.dtype | None:
        handles = {s: h for s, h in self.weights[module].handles.items() if s not in self.format.carried_suffixes}
        found = {self.raw.specs[f"{self.stored_as[module]}.{suffix}"].dtype for suffix in handles}
        narrow = found & {torch.float16, torch.bfloat16}
        return narrow.pop() if len(narrow) == 1 and torch.float32 not in found else None

    def of_parameter(self, name: str) -> str | None:
        key = self.keys.get(name)
        if key is None or key not in self.raw.specs or name in self.skeleton.merged or key in self.skeleton.splits:
            return None
        return None if self.skeleton.checkpoint.is_part(key) else key

    def dtype_of(self, name: str) -> torch.dtype:
        return self.raw.specs[self.keys[name]].dtype

    def to_file(self, name: str, value: Tensor) -> Tensor:
        spec = self.raw.specs[self.keys[name]]
        return value.to(spec.dtype).view(spec.shape)

    def write(self, place: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        for file in self.source.files:
            rewritten(file, place / file.name, tensors)
        for index in self.source.folder.glob("*.index.json"):
            shutil.copyfile(index, place / index.name)
        copy_side_files(self.source.beside, place, quantized=True)
        if (folded := self.source.beside / scales.FILE).is_file():
            shutil.copyfile(folded, place / scales.FILE)


class OneFile(Files):
    """A GGUF file, or the parts of one, which the copy joins."""

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__(skeleton)
        self.file, self.routes = GgufFile(self.source.files[0]), gguf_names.routes(skeleton.config)
        for what, some in (
            (
                "stacked matrices in a GGUF file, such as those of experts,",
                any(route.expert is not None for route in self.routes.values()),
            ),
            ("matrices that a GGUF file has in pieces", any(route.split for route in self.routes.values())),
        ):
            if some:
                raise PlanError(
                    f"{self.source.name}: {what} cannot be trained yet",
                    "Train a folder, and convert it to a GGUF file.",
                )

    def of_weight(self, module: str, weight: QTensor) -> dict[str, Tensor]:
        route, blocks = self.routes[f"{module}.weight"], weight.parts[weight.codec.payload]
        if weight.permutation is not None:  # its columns are in the file's order
            return {route.name: blocks if route.rows is None else blocks[route.rows]}
        return {route.name: route.blocks_to_file(blocks, BLOCK_TYPES[self.file.entries[route.name].type].columns)}

    def changes(self, module: str, weight: Callable[[], QTensor]) -> Mapping[str, Callable[[], Tensor]]:
        name = self.routes[f"{module}.weight"].name
        # A tensor has codes and scales, so it is not made before it is read.
        return {name: lambda: self.of_weight(module, weight())[name]}

    def stored_type(self, module: str) -> torch.dtype | None:
        return None

    def of_parameter(self, name: str) -> str | None:
        route = self.routes.get(name)
        entry = None if route is None else self.file.entries.get(route.name)
        return None if entry is None or entry.type not in PLAIN or name in self.skeleton.tied else entry.name

    def dtype_of(self, name: str) -> torch.dtype:
        return self.file.entries[self.routes[name].name].spec.dtype

    def to_file(self, name: str, value: Tensor) -> Tensor:
        route = self.routes[name]
        return route.to_file(value).to(self.dtype_of(name)).contiguous()

    def write(self, place: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        with_metadata(self.file, place, {scales.GGUF_RECORD: json.dumps(record)}, tensors)


def with_metadata(
    file: GgufFile, place: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a copy of a GGUF file at `place`, with some of its `metadata` and `tensors` replaced. Parts are joined."""
    keys = {key: value for key, value in file.metadata.items() if key not in _SPLIT}
    with GgufWriter(place, keys | dict(metadata), list(file.entries.values())) as writer:
        for name in file.entries:
            writer.add(name, tensors[name] if tensors and name in tensors else file.get(name))
            file.release(name)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def files_of(skeleton: Skeleton) -> Files:
    """The files of a quantized source. PlanError if fewbit does not keep its weights packed."""
    source: Source = skeleton.source
    if source.quantization is None:
        raise PlanError(f"{source.name} is not quantized", "Give a quantized model.")
    if not decoded.is_packed(source):
        said = skeleton.packing.said if skeleton.packing is not None else "its weights"
        raise PlanError(f"{source.name}: fewbit reads {said} as floats only, and cannot write them again")
    return OneFile(skeleton) if source.gguf is not None else Folder(skeleton)
