"""A weight of a GGUF file: the blocks of its scheme, a row after the other.

Until the file is written, a weight [N, K] is the tensor `<module>.blocks`, uint8 [N, bytes of a row]; which scheme
those bytes are of stands in `config["types"]`, as it does in the tensor table of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import Format, Shape, Stored
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import PartSpec, QTensor, Scheme, parse
from fewbit.schemes.ggml.table import BLOCK_TYPES

_SUFFIX = "blocks"


@register("formats", "gguf")
class GGUFFormat(Format):
    """One file for a whole model, each tensor with a block type of its own."""

    name: ClassVar[str] = "gguf"
    quant_method: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        if str(scheme) not in BLOCK_TYPES:
            return f"gguf files hold block types such as q4_k, not {scheme}"
        return scheme.why_not(shape)

    def why_not_together(self, weights: Sequence[Stored]) -> str | None:
        return None

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        return scheme.part_specs(shape)

    def lay_out(self, weight: QTensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
        if weight.permutation is not None:
            raise FormatError("gguf files have no act-order: this weight's columns lie in another order")
        return dict(weight.parts)

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        specs = {suffix: PartSpec(tuple(t.shape), t.dtype) for suffix, t in tensors.items()}
        scheme, shape = self.describe(specs, config, module, {})
        return QTensor(scheme, shape, {_SUFFIX: tensors[_SUFFIX]})

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, told: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        scheme = _scheme(config, module)
        found = tensors.get(_SUFFIX)
        if found is None:
            raise FormatError(f"{module}.{_SUFFIX} is missing")
        block = BLOCK_TYPES[str(scheme)]
        if found.dtype != torch.uint8 or len(found.shape) != 2 or not found.shape[0] or found.shape[1] < block.nbytes:
            raise FormatError(
                f"{module}.{_SUFFIX} is {found.dtype} {list(found.shape)}; uint8 with rows of blocks expected"
            )
        if found.shape[1] % block.nbytes:
            raise FormatError(
                f"{module}.{_SUFFIX} has rows of {found.shape[1]} bytes, which blocks of {block.nbytes} do not divide"
            )
        return scheme, (found.shape[0], found.shape[1] // block.nbytes * block.columns)

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "types": {w.module: str(w.scheme) for w in weights}}

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        found = {}
        for module in _types(config):
            if f"{module}.{_SUFFIX}" not in names:
                raise FormatError(f"{module}.{_SUFFIX} is missing")
            found[module] = {_SUFFIX: names[f"{module}.{_SUFFIX}"]}
            self.describe(found[module], config, module, {})
        return found


def _types(config: Mapping[str, Any]) -> Mapping[str, Any]:
    types = config.get("types")
    if not isinstance(types, Mapping) or not types:
        raise FormatError(f"gguf: types = {types!r} in the quantization config", "It maps modules to block types.")
    return types


def _scheme(config: Mapping[str, Any], module: str) -> Scheme:
    name = _types(config).get(module)
    if not isinstance(name, str) or name not in BLOCK_TYPES:
        raise FormatError(f"gguf: {module} has the type {name!r}", "It is a block type such as q4_k.")
    return parse(name)
