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

    float-quantized, naive-quantized
                     P.weight             e4m3      [N, K]
                     P.weight_scale       float     [1], [N, 1] or [ceil(N / 128), ceil(K / 128)]
    nvfp4-pack-quantized, mxfp4-pack-quantized
                     P.weight_packed      uint8     [N, K / 2]              column 2j in the low half of byte j
                     P.weight_scale       e4m3|E8M0 [N, K / 16]             E8M0 (MXFP4): uint8 [N, K / 32]
                     P.weight_global_scale float32  [1]                     NVFP4 only; it divides

    word 0 of a row, b = 4      bits 31 ..  28 ........ 8 7 .. 4 3 .. 0
                                   | c7  |   ...   | c1     | c0     |

Codes are signed, q = -2^(b-1) ... 2^(b-1) - 1, and w = (q - z) scale. pack-quantized stores c = q + 2^(b-1), which is
the code of the scheme `affine`; so are the zero points. A code may cross two words where b does not divide 32. Older
files of 3, 5, 6 and 7 bits put floor(32 / b) codes in each word; the width of `weight_packed` tells them apart.
FP8 in other blocks, in groups, with E8M0 scales and of the kind E5M2 is decoded (`layouts/compressed_tensors.py`).

A plan with `"activations": "dynamic"` declares that a server may round activations: int-quantized and float-quantized
with 8-bit activations, MXFP4 and NVFP4 with 4-bit ones. NVFP4 then has P.input_global_scale [1], 448 * 6 / max|x|, from
calibration. Without it, integers are pack-quantized and FP8 is naive-quantized.
fewbit computes with activations in 16 bits. vLLM loads scales of integers in the dtype of the model, so a bfloat16
model gets scales that are bfloat16 numbers (`-bf16`); it loads those of FP8 as float32, which fewbit writes.
Source: compressed-tensors 0.20, `compressors/`, and vLLM 0.33, `compressed_tensors_wNa16.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import Format, Shape, Stored, called, wrong
from fewbit.formats.compressed_tensors import floats, integers
from fewbit.formats.compressed_tensors.config import MIXED, Group, Groups, patterns
from fewbit.lazy import Tensor, torch
from fewbit.names import in_short
from fewbit.registry import register
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import PartSpec, QTensor, Scheme
from fewbit.schemes.nvfp4 import NVFP4

_PART = re.compile(r"(.+)\.(weight_(?:packed|scale|shape|zero_point|g_idx|global_scale))")
# Linears that servers fuse into one: they need one scheme.
_FUSED = (
    *(("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("in_proj_qkv", "in_proj_z")),
    *(("gate_proj", "up_proj"), ("w1", "w3"), ("gate", "up")),
)
# Tensors beside a weight that fewbit keeps for other readers: static scales of activations.
CARRIED = tuple(f"{which}_{what}" for which in ("input", "output") for what in ("scale", "zero_point", "global_scale"))
_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")


@register("formats", "compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors(Format):
    """Reads and writes integers of 2 to 8 bits, FP8, MXFP4 and NVFP4.

    input_activations: "dynamic" if files declare that a server rounds activations; None if it must not.
    """

    input_activations: str | None = None

    name: ClassVar[str] = "compressed-tensors"
    quant_method: ClassVar[str] = "compressed-tensors"
    readers: ClassVar[str] = "vLLM, SGLang, transformers with compressed-tensors"
    metadata_suffixes: ClassVar[tuple[str, ...]] = ("weight_shape",)
    carried_suffixes: ClassVar[tuple[str, ...]] = CARRIED
    ignores_all: ClassVar[bool] = True
    packs_head: ClassVar[bool] = True

    def with_activations(self, activations: str | None) -> CompressedTensors:
        return replace(self, input_activations=activations)

    def measures_inputs(self, scheme: Scheme) -> bool:
        return self.input_activations is not None and isinstance(scheme, NVFP4)

    def scales_of_inputs(self, scheme: Scheme, largest: float) -> dict[str, Tensor]:
        whole = floats.LARGEST / largest if largest else 1.0
        return {floats.OF_INPUTS: torch.tensor([whole], dtype=torch.float32, device="cpu")}

    def suited(self, scheme: Scheme, dtype: torch.dtype) -> Scheme:
        if isinstance(scheme, Affine) and dtype == torch.bfloat16:
            return replace(scheme, bf16=True)
        return scheme

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        if isinstance(scheme, NVFP4) and not scheme.divides:
            return "the global scale of compressed-tensors' NVFP4 divides: use nvfp4"
        if isinstance(scheme, Affine):
            if self.input_activations and (scheme.bits != 8 or scheme.group or not scheme.symmetric):
                return f"servers round activations for int8-row-sym weights, not for {scheme}"
        elif not isinstance(scheme, floats.Float):
            return f"compressed-tensors files store integers with scales, fp8, mxfp4 and nvfp4, not {scheme}"
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
        if isinstance(scheme, Affine):
            return integers.specs(shape, scheme, self._layout(scheme))
        assert isinstance(scheme, floats.Float)
        inputs = {floats.OF_INPUTS: PartSpec((1,), torch.float32)} if self.measures_inputs(scheme) else {}
        return {**floats.specs(shape, scheme), **inputs}

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        if not isinstance(weight.codec, Affine):
            return floats.lay_out(weight)
        group = _group_of(Groups.of(config), weight, module)
        return integers.lay_out(weight, group.format or integers.PACKED, group.args)

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        group = Groups.of(config).for_module(module)
        holds_integers = _holds_integers({suffix: PartSpec.of(tensor) for suffix, tensor in tensors.items()})
        return integers.read(tensors, group, module) if holds_integers else floats.read(tensors, group, module)

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

    def with_head(self, config: Mapping[str, Any], head: str) -> dict[str, Any]:
        """vLLM's class for output heads is not called Linear, so a target names the head."""
        groups = {
            name: {**group, "targets": [*group["targets"], head]} if group["targets"] == ["Linear"] else group
            for name, group in config["config_groups"].items()
        }
        return {**config, "config_groups": groups}

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        return _described(tensors, Groups.of(config).for_module(module), module, metadata.get("weight_shape"))

    def as_stored(
        self, scheme: Scheme, shape: Shape, tensors: Mapping[str, Any], config: Mapping[str, Any], module: str
    ) -> tuple[Scheme, bool]:
        return integers.as_stored(scheme, shape, tensors, module) if isinstance(scheme, Affine) else (scheme, False)

    def why_unpacked(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> str | None:
        reasons = without_scheme(Groups.of(config), weights_in(names))
        return next((f"{module}: {reason}" for module, reason in reasons.items()), None)

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        groups, weights = Groups.of(config), weights_in(names)
        if not weights:
            raise FormatError("the config says compressed-tensors, but no tensor is named *.weight_scale")
        usual = "weight_packed" if any("weight_packed" in parts for parts in weights.values()) else "weight"
        decoded = without_scheme(groups, weights)
        held = {module: parts for module, parts in weights.items() if module not in decoded}
        for module, parts in held.items():
            if "weight_packed" not in parts and "weight" not in parts:
                raise FormatError(f"{module}.{usual} is missing; {module}.{next(iter(parts))} needs it")
            if "weight_packed" in parts and "weight" in parts:
                raise FormatError(f"{module} has both weight and weight_packed")
            _check(module, parts)
            _described(parts, groups.for_module(module), module, None)
        plain = [
            name.removesuffix(".weight")
            for name, spec in names.items()
            if name.endswith(".weight") and len(spec.shape) == 2 and name.removesuffix(".weight") not in weights
        ]
        groups.check(weights, plain)
        return held

    def _layout(self, scheme: Scheme) -> str:
        if isinstance(scheme, Affine):
            return integers.UNPACKED if self.input_activations else integers.PACKED
        assert isinstance(scheme, floats.Float)
        return floats.layout(scheme, activations=self.input_activations is not None)

    def _group(self, scheme: Scheme, targets: list[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        if isinstance(scheme, Affine):
            weights, rounded = integers.scheme_args(scheme), integers.ACTIVATIONS
        else:
            assert isinstance(scheme, floats.Float)
            weights, rounded = floats.scheme_args(scheme), floats.activation_args(scheme)
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": dict(rounded) if self.input_activations else None,
            "output_activations": None,
            "format": self._layout(scheme),
        }


def _holds_integers(tensors: Mapping[str, PartSpec]) -> bool:
    return tensors["weight_packed" if "weight_packed" in tensors else "weight"].dtype in (torch.int32, torch.int8)


def _described(
    tensors: Mapping[str, PartSpec], group: Group, module: str, shape: Tensor | None
) -> tuple[Scheme, Shape]:
    if _holds_integers(tensors):
        return integers.describe(tensors, group, module, shape)
    return floats.describe(tensors, group, module)


def weights_in(names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
    """Module -> suffix -> header of the tensors that store its weight."""
    found: dict[str, dict[str, PartSpec]] = {}
    for name, spec in names.items():
        if match := _PART.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = spec
        elif name.endswith(".weight") and spec.dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
            found.setdefault(name.removesuffix(".weight"), {})
    for module, parts in found.items():
        for suffix in ("weight", *CARRIED):
            if f"{module}.{suffix}" in names:
                parts[suffix] = names[f"{module}.{suffix}"]
    return found


def without_scheme(groups: Groups, weights: Mapping[str, Mapping[str, PartSpec]]) -> dict[str, str]:
    """Module -> the reason why fewbit has no scheme for its weight, of the FP8 weights that are only decoded."""
    found = {}
    for module, parts in weights.items():
        if claims := groups.claiming(module) or groups.groups[:1]:
            reason = floats.why_without_scheme(claims[0].args, parts)
            if reason is not None:
                found[module] = reason
    return found


def _check(module: str, parts: Mapping[str, PartSpec]) -> None:
    """FormatError unless the tensors that need no config are as expected."""
    packed, words = "weight_packed" in parts, "weight_packed" in parts and parts["weight_packed"].dtype == torch.int32
    own = "weight_packed" if packed else "weight"
    for suffix in ("weight_scale", *(["weight_shape"] if words else [])):
        if suffix not in parts:
            raise FormatError(f"{module}.{suffix} is missing; {module}.{own} needs it")
    if not packed and "weight_shape" in parts:
        raise FormatError(f"{module}.weight_packed is missing; {module}.weight_shape needs it")
    expected = {
        "weight_packed": (torch.int32, torch.uint8),
        "weight": (torch.int8, torch.float8_e4m3fn),
        "weight_shape": (torch.int64,),
    }
    for suffix, dtypes in expected.items():
        spec = parts.get(suffix)
        if spec is None or (spec.dtype in dtypes and (suffix != "weight_shape" or spec.shape == (2,))):
            continue
        names = " or ".join(map(called, dtypes))
        raise wrong(f"{module}.{suffix}", spec, f"{names}{' [2]' if suffix == 'weight_shape' else ''}")


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
