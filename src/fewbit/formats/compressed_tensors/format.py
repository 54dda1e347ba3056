"""compressed-tensors: the layouts of llm-compressor, which vLLM and SGLang read. One file may mix schemes.

A linear `P` has N rows and K columns, b bits and groups of g columns. There is no `P.weight` in the packed layouts.

    pack-quantized   P.weight_packed      int32     [N, ceil(K b / 32)]     one bit stream for each row
                     P.weight_scale       bf16|fp16 [N, K / g]              [N, 1] for a row
                     P.weight_shape       int64     [2]                     N, K
                     P.weight_zero_point  int32     [ceil(N b / 32), K / g] asymmetric only; packed along N
                     P.weight_g_idx       int32     [K]                     older files with act-order only
    int-quantized    P.weight             int8      [N, K]                  codes q
                     P.weight_scale       bf16|fp16 [N, K / g]              [N, 1] for a row, [1] for the tensor
                     P.weight_zero_point  int8      [N, K / g]              asymmetric only

    word 0 of a row, b = 4      bits 31 ..  28 ........ 8 7 .. 4 3 .. 0
                                   | c7  |   ...   | c1     | c0     |

Codes are signed, q = -2^(b-1) ... 2^(b-1) - 1, and w = (q - z) scale. pack-quantized stores c = q + 2^(b-1), which is
the code of the scheme `affine`; so are the zero points. A code may cross two words where b does not divide 32. Older
files of 3, 5, 6 and 7 bits put floor(32 / b) codes in each word; the width of `weight_packed` tells them apart.

Weights alone are pack-quantized. A plan with `"activations": "dynamic"` writes int-quantized weights of 8 bits, and
declares that a server may round activations to 8 bits (W8A8). fewbit computes with activations in 16 bits.
vLLM loads scales in the dtype of the model. So a bfloat16 model gets scales that are bfloat16 numbers (`-bf16`).
Source: compressed-tensors 0.20, `compressors/`, and vLLM 0.33, `compressed_tensors_wNa16.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import Format, Shape, Stored
from fewbit.formats.compressed_tensors import integers
from fewbit.formats.compressed_tensors.config import MIXED, Group, Groups, patterns
from fewbit.lazy import Tensor, torch
from fewbit.names import in_short
from fewbit.registry import register
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import PartSpec, QTensor, Scheme

_PART = re.compile(r"(.+)\.(weight_(?:packed|scale|shape|zero_point|g_idx|global_scale))")
# Linears that servers fuse into one: they need one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("gate", "up"))
_FP8 = ("float8_e4m3fn", "float8_e5m2")
_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")


@register("formats", "compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors(Format):
    """Reads and writes pack-quantized weights of 2 to 8 bits, and int-quantized ones of 8 bits.

    input_activations: "dynamic" if files declare that a server rounds activations to 8 bits; None if it must not.
    """

    input_activations: str | None = None

    name: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str] = "compressed-tensors"
    metadata_suffixes: ClassVar[tuple[str, ...]] = ("weight_shape",)
    ignores_all: ClassVar[bool] = True

    def with_activations(self, activations: str | None) -> CompressedTensors:
        return replace(self, input_activations=activations)

    def suited(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        if isinstance(scheme, Affine) and dtype == torch.bfloat16:
            return replace(scheme, bf16=True)
        return scheme

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        if not isinstance(scheme, Affine):
            return f"compressed-tensors files store integers with scales, not {scheme}"
        if self.input_activations and (scheme.bits != 8 or scheme.group or not scheme.symmetric):
            return f"servers round activations for int8-row-sym weights, not for {scheme}"
        return scheme.why_not(shape)

    def why_not_together(self, weights: Sequence[Stored], kept: Sequence[str] = ()) -> str | None:
        schemes: dict[str, Scheme | None] = dict.fromkeys(kept)
        schemes |= {weight.module: weight.scheme for weight in weights}
        together: dict[str, list[str]] = {}
        for module in schemes:
            parent, _, leaf = module.rpartition(".")
            for leaves in _FUSED:
                if leaf in leaves and all(f"{parent}.{other}" in schemes for other in leaves):
                    together.setdefault(f"{parent}.{leaves[0]}", []).append(module)
            if match := _EXPERT.fullmatch(module):
                together.setdefault(match[1], []).append(module)
        for members in together.values():
            found = {schemes[module] for module in members}
            if len(found) > 1:
                ways = " and ".join(sorted("16 bits" if each is None else str(each) for each in found))
                return f"servers compute {in_short(members)} together, and these need one scheme, not {ways}"
        return None

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        assert isinstance(scheme, Affine)
        return integers.specs(shape, scheme, self._layout(scheme))

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        group = _group_of(Groups.of(config), weight, module)
        return integers.lay_out(weight, group.format or integers.PACKED, group.args)

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        return integers.read(tensors, Groups.of(config).for_module(module), module)

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        ignored = sorted(skipped)
        schemes = list(dict.fromkeys(weight.scheme for weight in weights))
        targets: dict[Any, list[str]] = {schemes[0]: ["Linear"]}
        if schemes[1:]:
            targets = patterns({weight.module: weight.scheme for weight in weights}, ignored)
        groups = {f"group_{i}": self._group(scheme, targets[scheme]) for i, scheme in enumerate(schemes)}
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignored,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        group = Groups.of(config).for_module(module)
        return integers.describe(tensors, group, module, metadata.get("weight_shape"))

    def why_unpacked(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> str | None:
        for name, spec in names.items():
            if name.endswith(".weight") and str(spec.dtype).removeprefix("torch.") in _FP8:
                return f"{name} is FP8"
            if name.endswith(".weight_packed") and spec.dtype == torch.uint8:
                return f"{name} is FP4"
        return None

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        groups = Groups.of(config)
        weights = _weights(names)
        if not weights:
            raise FormatError("the config says compressed-tensors, but no tensor is named *.weight_scale")
        usual = "weight_packed" if any("weight_packed" in parts for parts in weights.values()) else "weight"
        for module, parts in weights.items():
            if "weight_packed" not in parts and "weight" not in parts:
                raise FormatError(f"{module}.{usual} is missing; {module}.{next(iter(parts))} needs it")
            if "weight_packed" in parts and "weight" in parts:
                raise FormatError(f"{module} has both weight and weight_packed")
            _check(module, parts)
            integers.describe(parts, groups.for_module(module), module, None)
        plain = [
            name.removesuffix(".weight")
            for name, spec in names.items()
            if name.endswith(".weight") and len(spec.shape) == 2 and name.removesuffix(".weight") not in weights
        ]
        groups.check(weights, plain)
        return weights

    def _layout(self, scheme: Affine) -> str:
        return integers.UNPACKED if self.input_activations else integers.PACKED

    def _group(self, scheme: Scheme, targets: list[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        assert isinstance(scheme, Affine)
        token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": targets,
            "weights": integers.scheme_args(scheme),
            "input_activations": token if self.input_activations else None,
            "output_activations": None,
            "format": self._layout(scheme),
        }


def _weights(names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
    """Module -> suffix -> header of the tensors that store its weight."""
    found: dict[str, dict[str, PartSpec]] = {}
    for name, spec in names.items():
        if match := _PART.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = spec
        elif name.endswith(".weight") and spec.dtype == torch.int8:
            found.setdefault(name.removesuffix(".weight"), {})
    for module, parts in found.items():
        if f"{module}.weight" in names:
            parts["weight"] = names[f"{module}.weight"]
    return found


def _check(module: str, parts: Mapping[str, PartSpec]) -> None:
    """FormatError unless the tensors that need no config are as expected."""
    packed = "weight_packed" in parts
    for suffix in ("weight_scale", "weight_shape") if packed else ("weight_scale",):
        if suffix not in parts:
            raise FormatError(
                f"{module}.{suffix} is missing; {module}.{'weight_packed' if packed else 'weight'} needs it"
            )
    expected = {"weight_packed": torch.int32, "weight_shape": torch.int64, "weight": torch.int8}
    for suffix, dtype in expected.items():
        spec = parts.get(suffix)
        if spec is not None and (spec.dtype != dtype or (suffix == "weight_shape" and spec.shape != (2,))):
            name = str(dtype).removeprefix("torch.")
            raise FormatError(
                f"{module}.{suffix} is {str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}; "
                f"{name}{' [2]' if suffix == 'weight_shape' else ''} expected"
            )
    if not packed and "weight_shape" in parts:
        raise FormatError(f"{module}.weight_packed is missing; {module}.weight_shape needs it")


def _group_of(groups: Groups, weight: QTensor, module: str) -> Group:
    """The group of a config for a weight that is to be written: the one of its module, or of its scheme."""
    scheme = weight.codec
    assert isinstance(scheme, Affine)
    alike = [
        group
        for group in groups.groups
        if (group.args.bits, group.args.symmetric) == (scheme.bits, scheme.symmetric)
        and (group.args.group or weight.shape[1]) == (scheme.group or weight.shape[1])
    ]
    if len({(group.args, group.format) for group in alike}) == 1:
        return alike[0]
    return groups.for_module(module)
