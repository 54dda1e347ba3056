"""MXFP4 experts as gpt-oss stores them: one tensor holds the weights of all experts of a layer.

P is the name of the fused parameter in transformers, such as `model.layers.0.mlp.experts.gate_up_proj`. With E experts,
R rows (the outputs of a linear) and G groups of 32 columns:

    P_blocks    uint8 [E, R, G, 16]     FP4 codes (E2M1), two a byte, the even column in the low half
    P_scales    uint8 [E, R, G]         their scales (E8M0); 255 (NaN) is refused

    byte          0     1     2           15 | 0
    P_blocks   |1,0  |3,2  |5,4  |  ... |31,30|33,32|  ...       one row of one expert (high half, low half)
    P_scales   |             e_0              |     e_1  ...

In `gate_up_proj` the rows of gate and up alternate: gate has the even ones. transformers' parameter is the transpose,
[E, 32 G, R]. Without the first dimension, the tensors of one expert are the scheme `mxfp4`. Biases are ordinary tensors
`P_bias`. No plan writes this format; `convert` does, for models with such experts.
Source: transformers 5.24, integrations/mxfp4.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import Format, Shape, Stored, missing, wrong
from fewbit.formats.layouts.mxfp4 import BLOCKS, SCALES, check, fused_in
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import PartSpec, QTensor, Scheme
from fewbit.schemes.mxfp4 import GROUP, MXFP4

_PARTS = {"codes": BLOCKS, "scale": SCALES}
_FUSED = (".experts.gate_up_proj", ".experts.down_proj")
_ONLY_FUSED = "mxfp4 files hold the fused experts of gpt-oss; `convert` writes them, and no plan does"
_OF_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(?:gate|up|down)_proj")


@register("formats", "mxfp4")
class Mxfp4Format(Format):
    """Reads and writes the fused experts of gpt-oss."""

    name: ClassVar[str] = "mxfp4"
    quant_method: ClassVar[str] = "mxfp4"
    readers: ClassVar[str] = "vLLM, SGLang, transformers"
    held: ClassVar[tuple[str, ...]] = ("mxfp4",)
    read_only: ClassVar[bool] = True
    ignores_all: ClassVar[bool] = True

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        return _ONLY_FUSED

    def why_not_moved(self, shape: Shape, scheme: Scheme) -> str | None:
        if not isinstance(scheme, MXFP4):
            return f"mxfp4 files store weights in mxfp4, not {scheme}"
        return scheme.why_not(shape)

    def why_not_together(self, weights: Sequence[Stored], kept: Sequence[str] = ()) -> str | None:
        matches = {weight.module: _OF_EXPERT.fullmatch(weight.module) for weight in weights}
        if other := next((module for module, match in matches.items() if match is None), None):
            return f"mxfp4 files hold the experts of gpt-oss only, and {other} is not one"
        layers = {match[1] for match in matches.values() if match is not None}
        if alone := next((m for m in kept if (match := _OF_EXPERT.fullmatch(m)) and match[1] in layers), None):
            return f"mxfp4 files hold all experts of a layer or none, and {alone} is not quantized"
        return super().why_not_together(weights, kept)

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        n, k = shape
        return {
            BLOCKS: PartSpec((n, k // GROUP, GROUP // 2), torch.uint8),
            SCALES: PartSpec((n, k // GROUP), torch.uint8),
        }

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        if weight.permutation is not None:
            raise FormatError("mxfp4 files have no act-order, but the columns of this weight are permuted")
        specs = self.specs(weight.shape, MXFP4())
        return {ending: weight.parts[part].reshape(specs[ending].shape) for part, ending in _PARTS.items()}

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        specs = {ending: PartSpec.of(tensor) for ending, tensor in tensors.items()}
        scheme, shape = self.describe(specs, config, module, {})
        wanted = scheme.part_specs(shape)
        parts = {part: tensors[ending].reshape(wanted[part].shape) for part, ending in _PARTS.items()}
        if flaw := scheme.flaw(parts):
            raise FormatError(f"{module}{_PARTS[flaw[0]]} {flaw[1]}")
        return QTensor(scheme, shape, parts)

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        # transformers matches names from their start, so one pattern stands for a module of all layers.
        patterns = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in skipped)
        return {"quant_method": self.quant_method, "modules_to_not_convert": sorted(patterns)}

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        for ending, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
            if ending not in tensors:
                raise missing(f"{module}{ending}", f"{module}{other}")
        blocks, scales = tensors[BLOCKS], tensors[SCALES]
        if blocks.dtype != torch.uint8 or len(blocks.shape) != 3 or blocks.shape[2] != 16 or not min(blocks.shape):
            raise wrong(f"{module}{BLOCKS} of one expert", blocks, "uint8 [rows, groups, 16]")
        if scales != PartSpec(blocks.shape[:2], torch.uint8):
            raise wrong(f"{module}{SCALES} of one expert", scales, f"uint8 {list(blocks.shape[:2])}")
        return MXFP4(), (blocks.shape[0], GROUP * blocks.shape[1])

    def why_unpacked(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> str | None:
        other = next((name for name in fused_in(names) if not name.endswith(_FUSED)), None)
        return f"{other} is MXFP4 and not a fused weight of experts" if other else None

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        if not fused_in(names):
            raise FormatError("the config says mxfp4, but no tensor is named *_blocks")
        return {}

    def find_fused(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        for fused in fused_in(names):
            check(fused, names)
        return {fused: {ending: names[f"{fused}{ending}"] for ending in _PARTS.values()} for fused in fused_in(names)}
