"""modelopt: FP8 and NVFP4 weights as NVIDIA's ModelOpt stores them. Read, and saved again; a plan cannot name it.

    FP8      P.weight          e4m3     [N, K]
             P.weight_scale    float    [] for the tensor, [N] or [N, 1] for rows, or a scale for each block of
                                        128 x 128: [ceil(N / 128), ceil(K / 128)], or with a 1 after each number
    NVFP4    P.weight          uint8    [N, K / 2]     column 2j in the low half of byte j
             P.weight_scale    e4m3     [N, K / 16]
             P.weight_scale_2  float32  []

    columns      0 ... 15      16 ... 31
    weight      | 8 bytes |   | 8 bytes |   ...        w = (weight_scale * weight_scale_2) * e2m1(code)
    weight_scale    s_0           s_1       ...        all scales multiply

Tensors tell which of the two a weight is, because lists of modules in the config are wildcards over the names of some
version of the model's class. The config is in config.json or in `hf_quant_config.json`. `P.input_scale`, `P.k_scale`
and `P.v_scale` are for servers; saving keeps them. `P.pre_quant_scale` (AWQ) and low-rank parts (SVDQuant) change what
the linear computes; such weights are refused.
Source: ModelOpt 0.47, `torch/export`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fewbit.errors import FormatError, PlanError
from fewbit.formats.base import Format, Shape, Stored, missing, of_all_rows, wrong
from fewbit.formats.layouts.base import is_float, is_fp8
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import PartSpec, QTensor, Scheme
from fewbit.schemes.fp8 import FP8
from fewbit.schemes.nvfp4 import GROUP, NVFP4

_PARTS = {"codes": "weight", "scale": "weight_scale", "global": "weight_scale_2"}
_REFUSED = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
_BLOCK = 128
_NOT_WRITTEN = "fewbit reads modelopt files, and does not write them"


@register("formats", "modelopt")
class ModelOpt(Format):
    """Reads FP8 and NVFP4 weights of ModelOpt. Does not write them."""

    name: ClassVar[str] = "modelopt"
    quant_method: ClassVar[str] = "modelopt"
    readers: ClassVar[str] = "vLLM, SGLang, TensorRT-LLM"
    held: ClassVar[tuple[str, ...]] = ("fp8-row", "fp8-tensor", "fp8-b128", "nvfp4-mul")
    read_only: ClassVar[bool] = True
    carried_suffixes: ClassVar[tuple[str, ...]] = ("input_scale", "k_scale", "v_scale")

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        return _NOT_WRITTEN

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        parts = scheme.part_specs(shape)
        if isinstance(scheme, NVFP4):
            scale = PartSpec(parts["scale"].shape, torch.float8_e4m3fn)
            return {"weight": parts["codes"], "weight_scale": scale, "weight_scale_2": PartSpec((), torch.float32)}
        assert isinstance(scheme, FP8)
        whole = PartSpec((), torch.float32) if scheme.kind == "tensor" else parts["scale"]
        return {"weight": PartSpec(shape, torch.float8_e4m3fn), "weight_scale": whole}

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        if weight.permutation is not None:
            raise FormatError("modelopt files have no act-order, but the columns of this weight are permuted")
        assert isinstance(weight.codec, Scheme)
        laid = {}
        for (part, tensor), spec in zip(
            weight.parts.items(), self.specs(weight.shape, weight.codec).values(), strict=True
        ):
            if spec.shape == ():
                tensor = of_all_rows(tensor, f"modelopt files have one {_PARTS[part]}")[0]
            laid[_PARTS[part]] = tensor.view(spec.dtype)
        return laid

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        scheme, shape = self.describe({s: PartSpec.of(t) for s, t in tensors.items()}, config, module, {})
        parts = {}
        for part, spec in scheme.part_specs(shape).items():
            stored = tensors[_PARTS[part]]
            if spec.dtype == torch.uint8:
                parts[part] = stored.contiguous().view(torch.uint8)
            else:  # one number for the tensor becomes one for each row
                parts[part] = stored.float().reshape(-1, spec.shape[1]).expand(spec.shape).contiguous()
        if flaw := scheme.flaw(parts):
            raise FormatError(f"{module}.{_PARTS[flaw[0]]} {flaw[1]}")
        return QTensor(scheme, shape, parts)

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        raise PlanError(_NOT_WRITTEN)

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        weight = tensors["weight"]
        if "weight_scale" not in tensors:
            raise missing(f"{module}.weight_scale", f"{module}.weight")
        if len(weight.shape) != 2 or not min(weight.shape):
            raise wrong(f"{module}.weight", weight, "two dimensions")
        return _nvfp4(tensors, config, module) if weight.dtype == torch.uint8 else _fp8(tensors, module)

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        weights: dict[str, dict[str, PartSpec]] = {}
        for name, spec in names.items():
            module, _, leaf = name.rpartition(".")
            if leaf in _REFUSED:
                raise FormatError(f"{name}: ModelOpt's {leaf} changes what the linear computes, and is not supported")
            if leaf == "weight" and (is_fp8(spec) or spec.dtype == torch.uint8):
                weights[module] = {"weight": spec}
        for module, tensors in weights.items():
            for suffix in (*list(_PARTS.values())[1:], *self.carried_suffixes):
                if f"{module}.{suffix}" in names:
                    tensors[suffix] = names[f"{module}.{suffix}"]
            self.describe(tensors, config, module, {})
        for name, spec in names.items():
            module, _, leaf = name.rpartition(".")
            if module in weights and leaf in weights[module]:
                continue
            if leaf in ("weight_scale", "weight_scale_2"):
                weight = f"{module}.weight"
                if weight not in names:
                    raise missing(weight, name)
                raise wrong(weight, names[weight], f"float8_e4m3fn (FP8) or uint8 (NVFP4) beside {name}")
            if is_fp8(spec) or spec.dtype in (torch.uint8, torch.int8):
                raise wrong(name, spec, "a float, or FP8 or NVFP4 called *.weight,")
        if not weights:
            raise FormatError("the config says modelopt, but no weight is float8_e4m3fn or uint8")
        return weights


def _fp8(tensors: Mapping[str, PartSpec], module: str) -> tuple[Scheme, Shape]:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if weight.dtype != torch.float8_e4m3fn:
        raise wrong(f"{module}.weight", weight, "float8_e4m3fn (FP8) or uint8 (NVFP4)")
    if "weight_scale_2" in tensors:
        raise wrong(f"{module}.weight", weight, f"uint8 (NVFP4) beside {module}.weight_scale_2")
    if not is_float(scale):
        raise wrong(f"{module}.weight_scale", scale, "a float")
    n, k = weight.shape
    blocks = (-(-n // _BLOCK), -(-k // _BLOCK))
    shapes: dict[str, list[tuple[int, ...]]] = {
        "tensor": [(), (1,), (1, 1)],
        "row": [(n, 1), (n,)],
        "b128": [blocks, (blocks[0], 1, blocks[1], 1)],
    }
    for kind, known in shapes.items():
        if scale.shape in known:
            return FP8(_BLOCK if kind == "b128" else 0, kind), (n, k)
    wanted = " or ".join(str(list(known[0])) for known in shapes.values())
    raise wrong(f"{module}.weight_scale", scale, f"{wanted} for {module}.weight of shape {[n, k]}")


def _nvfp4(tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str) -> tuple[Scheme, Shape]:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if "weight_scale_2" not in tensors:
        raise missing(f"{module}.weight_scale_2", f"{module}.weight")
    n, k = weight.shape[0], 2 * weight.shape[1]
    scheme, settings = NVFP4(divides=False), config.get("quantization")
    group = (settings if isinstance(settings, Mapping) else config).get("group_size")
    if group not in (None, GROUP):
        raise FormatError(f"group_size = {group!r} in the quantization config, but {module}.weight is NVFP4: {GROUP}")
    if scheme.why_not((n, k)) is not None:
        raise wrong(f"{module}.weight", weight, "uint8 [rows, columns / 2], with a multiple of 16 columns,")
    if scale != PartSpec((n, k // GROUP), torch.float8_e4m3fn):
        raise wrong(f"{module}.weight_scale", scale, f"float8_e4m3fn {[n, k // GROUP]}")
    whole = tensors["weight_scale_2"]
    if whole.dtype != torch.float32 or whole.shape not in ((), (1,)):
        raise wrong(f"{module}.weight_scale_2", whole, "float32 []")
    return scheme, (n, k)
