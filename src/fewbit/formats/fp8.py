"""fp8: the layout of DeepSeek-V3, which transformers calls fine-grained FP8, and which vLLM and SGLang read.

    P.weight              float8_e4m3fn    [N, K]
    P.weight_scale_inv    float32          [ceil(N / 128), ceil(K / 128)] in blocks, [1] for the whole tensor

        K
      +---128---+---128---+--+      weight_scale_inv (it multiplies, despite its name)
    N |   128   |         |  |      +------+------+------+
      |         |         |  |      | s_00 | s_01 | s_02 |      w = s_ij * e4m3(code)
      +---------+---------+--+      +------+------+------+
      |         |         |  |      | s_10 | s_11 | s_12 |
      +---------+---------+--+      +------+------+------+

`weight_block_size` in the config is [128, 128] for blocks, and null for one scale. Also read: scales for each row, [N]
or [N, 1], scales in bfloat16 and E8M0, and the names `P.weight_scale` (AutoFP8), `P.scale` and `P.qscale_weight`.
Scales with these names are saved as float32 `weight_scale_inv`; others keep their dtype. `P.activation_scale` and
`P.input_scale` are for servers; saving keeps them.
Fused experts, FP4 experts and other block sizes are decoded as they are read (`layouts/fp8.py`).
Source: transformers 5.24, integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import Format, Shape, Stored, missing, of_all_rows, wrong
from fewbit.formats.layouts.base import is_float, is_fp8
from fewbit.formats.layouts.fp8 import block_size, is_scale, scale_names
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import PartSpec, QTensor, Scheme
from fewbit.schemes.floats import e8m0
from fewbit.schemes.fp8 import FP8

_SCALE = "weight_scale_inv"
_SCALES = (_SCALE, "weight_scale", "scale", "qscale_weight")
_BLOCK = (128, 128)


@register("formats", "fp8")
class FP8Blocks(Format):
    """Reads and writes FP8 weights with scales for blocks of 128 x 128 or for whole tensors. Reads those of rows."""

    name: ClassVar[str] = "fp8"
    quant_method: ClassVar[str] = "fp8"
    readers: ClassVar[str] = "vLLM, SGLang, transformers"
    carried_suffixes: ClassVar[tuple[str, ...]] = ("activation_scale", "input_scale")
    ignores_all: ClassVar[bool] = True
    absent: ClassVar[Mapping[str, Any]] = {"weight_block_size": None}  # transformers: [128, 128]

    def with_activations(self, activations: str | None) -> FP8Blocks:
        return self  # these files always declare dynamic scales of activations

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        if not isinstance(scheme, FP8) or scheme.kind == "row":
            return f"fp8 files store fp8-b128 or fp8-tensor, not {scheme}"
        return scheme.why_not(shape)

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        assert isinstance(scheme, FP8)
        scale = PartSpec((1,), torch.float32) if scheme.kind == "tensor" else scheme.part_specs(shape)["scale"]
        return {"weight": PartSpec(shape, torch.float8_e4m3fn), _SCALE: scale}

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        scheme, scale = weight.codec, weight.parts["scale"]
        assert isinstance(scheme, FP8)
        if weight.permutation is not None:
            raise FormatError("fp8 files have no act-order, but the columns of this weight are permuted")
        if scheme.kind == "tensor":
            scale = of_all_rows(scale, "fp8 files have one scale")
        return {"weight": weight.parts["codes"].view(torch.float8_e4m3fn), _SCALE: scale}

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        scheme, shape = self.describe({s: PartSpec.of(t) for s, t in tensors.items()}, config, module, {})
        name = _scale_of(tensors, module)
        stored, spec = tensors[name], scheme.part_specs(shape)["scale"]
        stored = e8m0(stored) if stored.dtype in (torch.uint8, torch.float8_e8m0fnu) else stored.float()
        # One number for the tensor becomes one for each row.
        scale = stored.reshape(-1, spec.shape[1]).expand(spec.shape).contiguous()
        parts = {"codes": tensors["weight"].contiguous().view(torch.uint8), "scale": scale}
        if flaw := scheme.flaw(parts):
            raise FormatError(f"{module}.{'weight' if flaw[0] == 'codes' else name} {flaw[1]}")
        return QTensor(scheme, shape, parts)

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(_BLOCK) if weights[0].scheme.group else None,
            "modules_to_not_convert": sorted(skipped),
        }

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        weight, name = tensors["weight"], _scale_of(tensors, module)
        if len(weight.shape) != 2 or not min(weight.shape):
            raise wrong(f"{module}.weight", weight, "two dimensions")
        shape, scale = (weight.shape[0], weight.shape[1]), tensors[name]
        if not is_float(scale) and scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            raise wrong(f"{module}.{name}", scale, "a float")
        shapes = _shapes(shape, blocks=block_size(config) is not None)
        for kind, wanted in shapes.items():
            if scale.shape in wanted:
                return FP8(_BLOCK[0] if kind == "b128" else 0, kind), shape
        expected = " or ".join(str(list(wanted[0])) for wanted in shapes.values())
        raise wrong(f"{module}.{name}", scale, f"{expected} for {module}.weight of shape {list(shape)}")

    def scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        return FP8.from_spec("fp8-tensor" if block_size(config) is None else "fp8-b128")

    def why_unpacked(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> str | None:
        block = block_size(config)
        if block is not None and block != _BLOCK:
            return f"weight_block_size is {list(block)}, not {list(_BLOCK)}"
        for name, spec in names.items():
            if is_fp8(spec) and not is_scale(name, names):
                if spec.dtype != torch.float8_e4m3fn:
                    return f"{name} is FP8 of the kind E5M2"
                if len(spec.shape) == 3 or not name.endswith(".weight"):
                    return f"{name} is FP8 and no weight of a linear"
            if spec.dtype in (torch.int8, torch.uint8) and any(each in names for each in scale_names(name)):
                return f"{name} is FP4"
        return None

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        block_size(config)
        weights: dict[str, dict[str, PartSpec]] = {}
        for name, spec in names.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and is_fp8(spec):
                weights[module] = {"weight": spec}
        for module, tensors in weights.items():
            for suffix in (*_SCALES, *self.carried_suffixes):
                if f"{module}.{suffix}" in names:
                    tensors[suffix] = names[f"{module}.{suffix}"]
            self.describe(tensors, config, module, {})
        for name in names:
            module, _, leaf = name.rpartition(".")
            if leaf == _SCALE and module not in weights:
                if f"{module}.weight" not in names:
                    raise missing(f"{module}.weight", name)
                raise wrong(f"{module}.weight", names[f"{module}.weight"], f"float8_e4m3fn beside {name}")
        if not weights:
            raise FormatError("the config says fp8, but no tensor is float8_e4m3fn")
        return weights


def _shapes(shape: Shape, *, blocks: bool) -> dict[str, list[tuple[int, ...]]]:
    """Kind of scales -> the shapes that they may have for a weight of this shape."""
    n, k = shape
    if blocks:
        return {"b128": [(-(-n // _BLOCK[0]), -(-k // _BLOCK[1]))]}
    # The one scale of a single row is that of the tensor: no plan writes scales for rows.
    return {"tensor": [(1,), (), (1, 1)], "row": [(n, 1), (n,)]}


def _scale_of(tensors: Iterable[str], module: str) -> str:
    """The suffix of the scales of `module`. FormatError if it has none."""
    found = next((suffix for suffix in _SCALES if suffix in tensors), None)
    if found is None:
        raise missing(f"{module}.{_SCALE}", f"{module}.weight, which is float8_e4m3fn,")
    return found
