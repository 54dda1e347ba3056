"""FP8 and NVFP4 weights in the layout of NVIDIA's ModelOpt.

    FP8      P.weight float8_e4m3fn [N, K], P.weight_scale float32, one element or one for each row
    NVFP4    P.weight uint8 [N, K / 2], FP4 codes of two columns in a byte
             P.weight_scale float8_e4m3fn [N, K / 16], P.weight_scale_2 float32, one element; both multiply

`P.pre_quant_scale` (AWQ) and low-rank parts (SVDQuant) change what the linear computes; such weights are refused.
Source: ModelOpt 0.47, `torch/export`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.layouts.base import Handles, Layout, Packed, Read, is_fp8, missing, wrong
from fewbit.formats.layouts.fp8 import packed_fp8
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import PartSpec
from fewbit.schemes.floats import e2m1, scaled

_REFUSED = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")


class ModelOpt(Layout):
    """Reads FP8 and NVFP4 weights of ModelOpt."""

    quant_method: ClassVar[str] = "modelopt"

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec], read: Read) -> dict[str, Packed]:
        found = {}
        for name, spec in names.items():
            module, _, leaf = name.rpartition(".")
            if leaf in _REFUSED:
                raise FormatError(f"{name}: ModelOpt's {leaf} changes what the linear computes, and is not supported")
            if leaf == "weight_scale" and f"{module}.weight" not in names:
                raise missing(f"{module}.weight", name)
            if leaf != "weight" or not (is_fp8(spec) or spec.dtype == torch.uint8):
                continue
            scale = f"{module}.weight_scale"
            if scale not in names:
                raise missing(scale, name)
            if is_fp8(spec):
                made = packed_fp8(name, spec, scale, names[scale], None)
            else:
                made = _nvfp4(module, spec, names)
            found[name] = replace(made, unused=(f"{module}.input_scale",))
        if not found:
            raise FormatError(f"the config says {self.quant_method}, but no weight is float8_e4m3fn or uint8")
        return found


def _nvfp4(module: str, spec: PartSpec, names: Mapping[str, PartSpec]) -> Packed:
    weight, scale, whole = (f"{module}.{leaf}" for leaf in ("weight", "weight_scale", "weight_scale_2"))
    if whole not in names:
        raise missing(whole, weight)
    if len(spec.shape) != 2 or not min(spec.shape) or spec.shape[1] % 8:
        raise wrong(weight, spec, "uint8 [rows, columns / 2], with a multiple of 16 columns,")
    n, k = spec.shape[0], 2 * spec.shape[1]
    if names[scale] != PartSpec((n, k // 16), torch.float8_e4m3fn):
        raise wrong(scale, names[scale], f"float8_e4m3fn {[n, k // 16]}")
    if names[whole].dtype != torch.float32 or names[whole].shape not in ((), (1,)):
        raise wrong(whole, names[whole], "float32 []")
    return Packed((n, k), "NVFP4", {"weight": weight, "scale": scale, "whole": whole}, _decode, ("scale", "whole"))


def _decode(parts: Handles, rows: slice) -> Tensor:
    return scaled(e2m1(parts["weight"][rows]), parts["scale"][rows].float() * parts["whole"][...], (1, 16))
