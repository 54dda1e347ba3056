"""GGUF: one file for a whole model, in which each weight has a ggml block type of its own.

A weight [N, K] is stored as the blocks of its scheme, row by row. Before the file is written, it is the tensor

    <module>.blocks   uint8 [N, K / columns * bytes]      columns and bytes of a block as in `schemes/ggml/table.py`

and `config["types"]` maps the module to its block type. The file holds the type in its tensor table. The container,
its header and its metadata are in `formats/containers/gguf.py`. The scheme `mxfp4` is stored as blocks of this name:

    byte              0     1      2           16
    block of mxfp4  | e  |16, 0 |17, 1|  ... |31,15|       columns (high half, low half)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import Format, Shape, Stored, wrong
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import PartSpec, QTensor, Scheme, parse
from fewbit.schemes.ggml.few import Few
from fewbit.schemes.ggml.iq import IQ
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.ggml.table import BLOCK_TYPES
from fewbit.schemes.mxfp4 import MXFP4, from_blocks, to_blocks

_SUFFIX = "blocks"


@register("formats", "gguf")
class GGUFFormat(Format):
    """Stores and reads weights of any block type that fewbit can write."""

    name: ClassVar[str] = "gguf"
    quant_method: ClassVar[str] = "gguf"
    readers: ClassVar[str] = "llama.cpp and programs built on it"
    suffix: ClassVar[str] = ".gguf"

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        if not isinstance(scheme, (GGML, IQ, Few, MXFP4)):
            return f"gguf files store block types such as q4_k, not {scheme}"
        return scheme.why_not(shape)

    def why_not_together(self, weights: Sequence[Stored], kept: Sequence[str] = ()) -> str | None:
        return None

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        block = BLOCK_TYPES[str(scheme)]
        return {_SUFFIX: PartSpec((shape[0], shape[1] // block.columns * block.nbytes), torch.uint8)}

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        if weight.permutation is not None:
            raise FormatError("gguf files have no act-order, but the columns of this weight are permuted")
        return {_SUFFIX: to_blocks(weight.parts)} if isinstance(weight.codec, MXFP4) else dict(weight.parts)

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        specs = {suffix: PartSpec.of(t) for suffix, t in tensors.items()}
        scheme, shape = self.describe(specs, config, module, {})
        blocks = tensors[_SUFFIX]
        parts = from_blocks(blocks) if isinstance(scheme, MXFP4) else {_SUFFIX: blocks}
        if isinstance(scheme, MXFP4) and scheme.flaw(parts):
            raise FormatError(f"{module}.{_SUFFIX} has a scale that is NaN")
        return QTensor(scheme, shape, parts)

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        scheme = _scheme(config, module)
        spec = tensors.get(_SUFFIX)
        if spec is None:
            raise FormatError(f"{module}.{_SUFFIX} is missing")
        block = BLOCK_TYPES[str(scheme)]
        if spec.dtype != torch.uint8 or len(spec.shape) != 2 or not spec.shape[0] or spec.shape[1] < block.nbytes:
            raise wrong(f"{module}.{_SUFFIX}", spec, "uint8 with rows of blocks")
        if spec.shape[1] % block.nbytes:
            raise FormatError(
                f"{module}.{_SUFFIX} has rows of {spec.shape[1]} bytes, which blocks of {block.nbytes} do not divide"
            )
        return scheme, (spec.shape[0], spec.shape[1] // block.nbytes * block.columns)

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "types": {w.module: str(w.scheme) for w in weights}}

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        weights = {}
        for module in _types(config):
            if f"{module}.{_SUFFIX}" not in names:
                raise FormatError(f"{module}.{_SUFFIX} is missing")
            weights[module] = {_SUFFIX: names[f"{module}.{_SUFFIX}"]}
            self.describe(weights[module], config, module, {})
        return weights


def _types(config: Mapping[str, Any]) -> Mapping[str, Any]:
    types = config.get("types")
    if not isinstance(types, Mapping) or not types:
        raise FormatError(f"gguf: types = {types!r} in the quantization config", "It must map modules to block types.")
    return types


def _scheme(config: Mapping[str, Any], module: str) -> GGML | IQ | Few | MXFP4:
    name = _types(config).get(module)
    scheme = parse(name) if isinstance(name, str) and name in BLOCK_TYPES else None
    if not isinstance(scheme, (GGML, IQ, Few, MXFP4)):
        raise FormatError(f"gguf: {module} has the type {name!r}", "It must be a block type such as q4_k.")
    return scheme
