"""float-quantized, naive-quantized, nvfp4-pack-quantized and mxfp4-pack-quantized: the schemes fp8, nvfp4 and mxfp4."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from fewbit.errors import FormatError
from fewbit.formats.base import Shape, called, of_all_rows, wrong
from fewbit.formats.compressed_tensors.config import Args, Group
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import PartSpec, QTensor, Scheme
from fewbit.schemes.fp8 import FP8
from fewbit.schemes.mxfp4 import MXFP4
from fewbit.schemes.nvfp4 import NVFP4

Float = FP8 | MXFP4 | NVFP4
OF_INPUTS, LARGEST = "input_global_scale", 448.0 * 6.0  # the largest scale times the largest FP4 number
_FP8, _BLOCK = {"tensor": "tensor", "channel": "row", "block": "b128"}, (128, 128)
# Part -> suffix.
_FP8_PARTS = {"codes": "weight", "scale": "weight_scale"}
_FP4_PARTS = {"codes": "weight_packed", "scale": "weight_scale", "global": "weight_global_scale"}


def layout(scheme: Float, *, activations: bool) -> str:
    """The name of the layout. activations: whether a server rounds activations too."""
    if isinstance(scheme, FP8):
        return "float-quantized" if activations else "naive-quantized"
    return "nvfp4-pack-quantized" if isinstance(scheme, NVFP4) else "mxfp4-pack-quantized"


def scheme_args(scheme: Float) -> dict[str, Any]:
    """The entry `weights` of a group with this scheme."""
    own: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    if isinstance(scheme, NVFP4):
        return {**own, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    if isinstance(scheme, MXFP4):
        return {**own, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    strategy = next(name for name, kind in _FP8.items() if kind == scheme.kind)
    block = {"block_structure": list(_BLOCK)} if strategy == "block" else {}
    return {**own, "num_bits": 8, "strategy": strategy, **block}


def activation_args(scheme: Float) -> dict[str, Any]:
    """The entry `input_activations` of a group with this scheme, for activations that a server rounds."""
    own = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    if isinstance(scheme, FP8):
        return {**own, "strategy": "group", "group_size": 128} if scheme.group else {**own, "strategy": "token"}
    if isinstance(scheme, NVFP4):
        return {**scheme_args(scheme), "dynamic": "local"}  # the group's scales are computed, the global one is stored
    return {**own, "num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}


def specs(shape: Shape, scheme: Float) -> dict[str, PartSpec]:
    """Suffix -> shape and dtype."""
    parts = scheme.part_specs(shape)
    if isinstance(scheme, FP8):
        scale = PartSpec((1,), torch.float32) if scheme.kind == "tensor" else parts["scale"]
        return {"weight": PartSpec(shape, torch.float8_e4m3fn), "weight_scale": scale}
    if isinstance(scheme, MXFP4):
        return {"weight_packed": parts["codes"], "weight_scale": parts["scale"]}
    return {
        "weight_packed": parts["codes"],
        "weight_scale": PartSpec(parts["scale"].shape, torch.float8_e4m3fn),
        "weight_global_scale": PartSpec((1,), torch.float32),
    }


def lay_out(weight: QTensor) -> dict[str, Tensor]:
    """The tensors of a weight."""
    scheme, parts = weight.codec, weight.parts
    assert isinstance(scheme, Float)
    if weight.permutation is not None:
        raise FormatError("compressed-tensors files have no act-order, but the columns of this weight are permuted")
    if isinstance(scheme, MXFP4):
        return {"weight_packed": parts["codes"], "weight_scale": parts["scale"]}
    if isinstance(scheme, NVFP4):
        return {
            "weight_packed": parts["codes"],
            "weight_scale": parts["scale"].view(torch.float8_e4m3fn),
            "weight_global_scale": of_all_rows(parts["global"], "compressed-tensors files have one global scale"),
        }
    scale = parts["scale"]
    if scheme.kind == "tensor":
        scale = of_all_rows(scale, "compressed-tensors files have one scale")
    return {"weight": parts["codes"].view(torch.float8_e4m3fn), "weight_scale": scale}


def why_without_scheme(args: Args, parts: Mapping[str, PartSpec]) -> str | None:
    """None if fewbit has a scheme for float weights with these settings and headers, else the reason why not."""
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    if weight is not None and weight.dtype == torch.float8_e5m2:
        return "it is FP8 of the kind E5M2"
    if weight is None or args.kind != "float":
        return None
    if scale is not None and scale.dtype == torch.uint8:
        return "it is FP8 with E8M0 scales (MXFP8)"
    if args.strategy == "block" and args.block != _BLOCK:
        return f"it is FP8 in blocks of {args.block}"
    return None if args.strategy in _FP8 else f"it is FP8 with scales of the strategy {args.strategy!r}"


def describe(tensors: Mapping[str, PartSpec], group: Group, module: str) -> tuple[Scheme, Shape]:
    """Scheme and shape. FormatError that names the tensor if headers and config contradict each other."""
    args = group.args
    packed = "weight_packed" in tensors
    name = "weight_packed" if packed else "weight"
    stored, scale = tensors[name], tensors["weight_scale"]
    width = 4 if packed else 8
    if (args.kind, args.bits) != ("float", width):
        raise FormatError(
            f"{module}: num_bits = {args.bits}, type = {args.kind!r} in the quantization config, but {module}.{name} "
            f"is {called(stored.dtype)}",
            f"float and {width} bits are expected.",
        )
    if len(stored.shape) != 2 or not min(stored.shape):
        raise wrong(f"{module}.{name}", stored, "two dimensions")
    scheme: Float
    if packed:
        n, k = stored.shape[0], 2 * stored.shape[1]
        scheme = NVFP4() if args.strategy == "tensor_group" else MXFP4()
        if args.group != scheme.group:
            raise FormatError(
                f"{module}: strategy {args.strategy!r} with group_size = {args.group} in the quantization config",
                "tensor_group with 16 columns (NVFP4) and group with 32 (MXFP4) are expected.",
            )
        if reason := scheme.why_not((n, k)):
            raise FormatError(f"{module}.{name} is uint8 {[n, k // 2]}: {reason}")
        for suffix, expected in specs((n, k), scheme).items():
            found = tensors.get(suffix)
            if found is None:
                raise FormatError(f"{module}.{suffix} is missing; {module}.{name} needs it")
            if found != expected and not (suffix == "weight_global_scale" and found == PartSpec((), torch.float32)):
                raise wrong(f"{module}.{suffix}", found, f"{called(expected.dtype)} {list(expected.shape)}")
        if isinstance(scheme, MXFP4) and "weight_global_scale" in tensors:
            raise FormatError(f"{module}.weight_global_scale belongs to strategy tensor_group (NVFP4), not to group")
        return scheme, (n, k)
    n, k = stored.shape
    made = FP8.from_spec(f"fp8-{_FP8[args.strategy]}")
    assert made is not None
    needed: tuple[int, ...] = (1,) if made.kind == "tensor" else made.part_specs((n, k))["scale"].shape
    shapes: list[tuple[int, ...]] = [needed, needed[:1]] if made.kind == "row" else [needed]
    if prod(needed) == 1:
        shapes += [(), (1,), (1, 1)]
    if scale.shape not in shapes or not scale.dtype.is_floating_point or scale.dtype.itemsize < 2:
        raise wrong(f"{module}.weight_scale", scale, f"a float {list(needed)}")
    return made, (n, k)


def read(tensors: Mapping[str, Tensor], group: Group, module: str) -> QTensor:
    """The weight in its canonical parts. FormatError that names the tensor for NaN and for scales not above 0."""
    found = {suffix: PartSpec.of(tensor) for suffix, tensor in tensors.items()}
    scheme, shape = describe(found, group, module)
    assert isinstance(scheme, Float)
    names = _FP8_PARTS if isinstance(scheme, FP8) else _FP4_PARTS
    specs = scheme.part_specs(shape)
    parts = {}
    for part, spec in specs.items():
        stored = tensors[names[part]]
        if spec.dtype == torch.uint8:
            parts[part] = stored.contiguous().view(torch.uint8)
        else:  # one number for the tensor becomes one for each row
            parts[part] = stored.to(torch.float32).reshape(-1, spec.shape[1]).expand(spec.shape).contiguous()
    if flaw := scheme.flaw(parts):
        raise FormatError(f"{module}.{names[flaw[0]]} {flaw[1]}")
    return QTensor(scheme, shape, parts)
