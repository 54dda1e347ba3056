"""compressed-tensors, the layout of llm-compressor and of many models that are published for vLLM.

The tensors of a linear `P` say how it is stored. N: rows, K: columns, g: columns with one scale, b: bits.

    pack-quantized    P.weight_packed int32 [N, K b / 32]    unsigned codes, one bit stream per row
                      P.weight_scale [N, K / g] or [N, 1], P.weight_shape int64 [2]
                      P.weight_zero_point int32 [N b / 32, K / g], packed along the rows (only if asymmetric)
    int-quantized     P.weight int8 [N, K], P.weight_scale [N, 1], [N, K / g] or [1], P.weight_zero_point int8
    float-quantized   P.weight float8_e4m3fn [N, K], P.weight_scale for blocks, channels or the tensor
    mxfp8             the same, with P.weight_scale uint8 [N, K / 32], E8M0
    nvfp4             P.weight_packed uint8 [N, K / 2], P.weight_scale float8_e4m3fn [N, K / 16],
                      P.weight_global_scale float32 [1], which divides
    mxfp4             P.weight_packed uint8 [N, K / 2], P.weight_scale uint8 [N, K / 32], E8M0

An integer weight is (q - zero point) * scale, and pack-quantized files store q + 2**(b - 1). Headers say all but the
bits of pack-quantized weights and the blocks of FP8, which are in the config. Source: compressed-tensors 0.20,
`compressors/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import called, missing, wrong
from fewbit.formats.layouts.base import Handles, Layout, Packed, Read, is_float, is_fp8
from fewbit.formats.layouts.fp8 import packed_fp8
from fewbit.lazy import Tensor, torch
from fewbit.schemes import bits as streams
from fewbit.schemes.base import PartSpec
from fewbit.schemes.floats import e2m1, e8m0, scaled

_PARTS = ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")  # after `P.weight_`
_PART = re.compile(rf"(.+)\.weight_({'|'.join(_PARTS)})")
_UNUSED = [f"{which}_{what}" for which in ("input", "output") for what in ("scale", "zero_point", "global_scale")]
_PRESET = re.compile(r"W(\d)A\d+.*")  # W4A16, the name of a group of settings


class CompressedTensors(Layout):
    """Reads integer, FP8, MXFP4 and NVFP4 weights of compressed-tensors."""

    quant_method: ClassVar[str] = "compressed-tensors"

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec], read: Read) -> dict[str, Packed]:
        _check(config)
        modules: dict[str, dict[str, PartSpec]] = {}
        for name, spec in names.items():
            if match := _PART.fullmatch(name):
                modules.setdefault(match[1], {})[match[2]] = spec
            elif name.endswith(".weight") and (is_fp8(spec) or spec.dtype == torch.int8):
                modules.setdefault(name.removesuffix(".weight"), {})
        if not modules and config.get("config_groups"):
            raise FormatError("the config says compressed-tensors, but no tensor is named *.weight_scale")
        found, usual = {}, "weight_packed" if any("packed" in parts for parts in modules.values()) else "weight"
        for module, parts in modules.items():
            packed = "weight" if f"{module}.weight" in names else usual
            if f"{module}.{packed}" not in names:
                raise missing(f"{module}.{packed}", f"{module}.weight_{next(iter(parts))}")
            if "scale" not in parts:
                raise missing(f"{module}.weight_scale", f"{module}.{packed}")
            weight = names.get(f"{module}.weight")
            if parts.get("packed", PartSpec((), torch.uint8)).dtype == torch.int32:
                stated = parts.get("shape")  # no header says how many codes fill the last word of a row
                shape = read(f"{module}.weight_shape").tolist() if stated and stated.shape == (2,) else None
                made = _stream(module, parts, config, shape)
            else:
                made = _bytes(module, weight, parts, config)
            unused = tuple(f"{module}.{each}" for each in _UNUSED)
            found[f"{module}.weight"] = replace(made, unused=unused)
        return found


def _bytes(module: str, weight: PartSpec | None, parts: Mapping[str, PartSpec], config: Mapping[str, Any]) -> Packed:
    """Weights whose codes are bytes or halves of bytes."""
    if "packed" not in parts:
        assert weight is not None
        if is_fp8(weight):
            block = _block(config, module)
            name, scale = f"{module}.weight", f"{module}.weight_scale"
            return packed_fp8(name, weight, scale, parts["scale"], block)
        if weight.dtype != torch.int8:
            raise wrong(f"{module}.weight", weight, f"int8 or float8_e4m3fn beside {module}.weight_scale")
        return _integers(module, weight, parts)
    if parts["packed"].dtype == torch.uint8:
        return _fp4(module, parts)
    raise wrong(f"{module}.weight_packed", parts["packed"], "int32 or uint8")


def _integers(module: str, weight: PartSpec, parts: Mapping[str, PartSpec]) -> Packed:
    """int-quantized and naive-quantized weights of 8 bits."""
    if len(weight.shape) != 2 or not min(weight.shape):
        raise wrong(f"{module}.weight", weight, "two dimensions")
    n, k = weight.shape
    scale = parts["scale"]
    shapes = {(1,): "per tensor", (): "per tensor", (1, 1): "per tensor", (n, 1): "per channel", (n,): "per channel"}
    how = shapes.get(scale.shape)
    if how is None and len(scale.shape) == 2 and scale.shape[0] == n and scale.shape[1] and k % scale.shape[1] == 0:
        how = f"group {k // scale.shape[1]}"
    if how is None or not is_float(scale):
        raise wrong(f"{module}.weight_scale", scale, f"a float [1], {[n, 1]} or {[n]} + [groups] for {module}.weight")
    zero = parts.get("zero_point")
    if zero is not None and (zero.shape != scale.shape or zero.dtype != torch.int8):
        raise wrong(f"{module}.weight_zero_point", zero, f"int8 {list(scale.shape)}")
    roles = {"weight": f"{module}.weight", **_roles(module, parts, ("scale", "zero_point"))}
    return Packed((n, k), f"int8, {how}", roles, _of_integers, ("scale",))


def _of_integers(parts: Handles, rows: slice) -> Tensor:
    values = parts["weight"][rows].float()
    scale, zero = _of_rows(parts["scale"], rows), None
    if "zero_point" in parts:
        zero = _of_rows(parts["zero_point"], rows).float()
    return _affine(values, scale, zero, None)


def _of_rows(handle: Any, rows: slice) -> Tensor:
    """The entries [rows, G] of scales or zero points, which may be those of the whole tensor."""
    every: Tensor = handle[...]
    if every.numel() == 1:
        return every.reshape(1, 1)
    own: Tensor = every.reshape(len(every), -1)[rows]
    return own


def _affine(codes: Tensor, scale: Tensor, zero: Tensor | None, group_of: Tensor | None) -> Tensor:
    """(codes - zero) * scale, float32 [R, K], for scale and zero [R, G]. group_of: the group of each column."""
    if group_of is not None:
        codes = codes if zero is None else codes - zero[:, group_of]
        return codes * scale.float()[:, group_of]
    grouped: Tensor = codes.unflatten(1, (scale.shape[1], -1))
    grouped = grouped if zero is None else grouped - zero.unsqueeze(-1)
    return (grouped * scale.float().unsqueeze(-1)).flatten(1)


def _stream(module: str, parts: Mapping[str, PartSpec], config: Mapping[str, Any], shape: Any) -> Packed:
    """pack-quantized weights. shape: the content of `P.weight_shape`."""
    name, packed, scale = f"{module}.weight_packed", parts["packed"], parts["scale"]
    width = _setting(config, module, "num_bits")
    if type(width) is not int or not 2 <= width <= 8:
        raise FormatError(f"{module}: num_bits = {width!r} in the quantization config", "2 to 8 are expected.")
    if len(packed.shape) != 2 or not min(packed.shape):
        raise wrong(name, packed, "int32 [rows, words]")
    if not is_float(scale) or len(scale.shape) != 2 or scale.shape[0] != packed.shape[0] or not scale.shape[1]:
        raise wrong(f"{module}.weight_scale", scale, f"a float [{packed.shape[0]}, groups]")
    n, groups = scale.shape
    shaped = parts.get("shape")
    if shaped is None or shaped.shape != (2,) or shaped.dtype.is_floating_point:
        if shaped is None:
            raise missing(f"{module}.weight_shape", name)
        raise wrong(f"{module}.weight_shape", shaped, "int64 [2]")
    k = shape[1]
    if shape[0] != n or k < groups or k % groups:
        raise FormatError(f"{module}.weight_shape is {shape}, but {module}.weight_scale has shape {[n, groups]}")
    if -(-k * width // 32) != packed.shape[1]:
        raise wrong(name, packed, f"{[n, -(-k * width // 32)]}, {k} codes of {width} bits in a row,")
    zero = parts.get("zero_point")
    if zero is not None and zero != PartSpec((-(-n * width // 32), groups), torch.int32):
        raise wrong(f"{module}.weight_zero_point", zero, f"int32 {[-(-n * width // 32), groups]}")
    order = parts.get("g_idx")
    if order is not None and order != PartSpec((k,), torch.int32):
        raise wrong(f"{module}.weight_g_idx", order, f"int32 {[k]}")
    group = f"group {k // groups}" if groups > 1 else "per channel"
    kind = f"int{width}, {group}{'' if zero is None else ', asymmetric'}"
    roles = _roles(module, parts, ("packed", "scale", "zero_point", "g_idx", "shape"))
    decode = partial(_of_stream, shape=(n, k), width=width)
    return Packed((n, k), kind, roles, decode, ("scale",))


def _of_stream(parts: Handles, rows: slice, *, shape: tuple[int, int], width: int) -> Tensor:
    n, k = shape
    middle = 1 << (width - 1)
    codes = _unpacked(parts["packed"][rows], width, k).float().sub_(middle)
    zero = None
    if "zero_point" in parts:
        whole = _unpacked(parts["zero_point"][...].T.contiguous(), width, n).T
        zero = whole[rows].float() - middle
    group_of = parts["g_idx"][...].long() if "g_idx" in parts else None
    return _affine(codes, parts["scale"][rows], zero, group_of)


def _unpacked(words: Tensor, width: int, count: int) -> Tensor:
    """`count` codes of each row of words int32 [R, W]."""
    return streams.unpack(words.contiguous().view(torch.uint8), width, count)


def _fp4(module: str, parts: Mapping[str, PartSpec]) -> Packed:
    """NVFP4 weights if there is a global scale, else MXFP4."""
    packed, scale, whole = parts["packed"], parts["scale"], parts.get("global_scale")
    if len(packed.shape) != 2 or not min(packed.shape):
        raise wrong(f"{module}.weight_packed", packed, "uint8 [rows, columns / 2]")
    n, k = packed.shape[0], 2 * packed.shape[1]
    group, dtype = (32, torch.uint8) if whole is None else (16, torch.float8_e4m3fn)
    if scale != PartSpec((n, -(-k // group)), dtype):
        if whole is None and scale.dtype == torch.float8_e4m3fn:
            raise missing(f"{module}.weight_global_scale", f"{module}.weight_scale, which is float8_e4m3fn,")
        raise wrong(f"{module}.weight_scale", scale, f"{called(dtype)} {[n, -(-k // group)]}")
    if whole is not None and (whole.dtype != torch.float32 or whole.shape not in ((1,), ())):
        raise wrong(f"{module}.weight_global_scale", whole, "float32 [1]")
    roles = _roles(module, parts, ("packed", "scale", "global_scale"))
    scales = ("scale",) if whole is None else ("scale", "global_scale")
    return Packed((n, k), "MXFP4" if whole is None else "NVFP4", roles, _of_fp4, scales)


def _of_fp4(parts: Handles, rows: slice) -> Tensor:
    values, scale = e2m1(parts["packed"][rows]), parts["scale"][rows]
    if "global_scale" not in parts:
        return scaled(values, e8m0(scale), (1, 32))
    return scaled(values, scale.float() / parts["global_scale"][...].float(), (1, 16))


def _roles(module: str, parts: Mapping[str, PartSpec], wanted: tuple[str, ...]) -> dict[str, str]:
    return {role: f"{module}.weight_{role}" for role in wanted if role in parts}


def _check(config: Mapping[str, Any]) -> None:
    """FormatError for what changes the weights or the model beyond quantization."""
    sparse = config.get("sparsity_config") or {}
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        raise FormatError(f"compressed-tensors with sparse weights ({sparse['format']}) are not supported")
    rotated = config.get("transform_config") or {}
    if isinstance(rotated, Mapping) and rotated.get("config_groups"):
        raise FormatError("compressed-tensors with rotated weights (transform_config) are not supported")
    if not isinstance(config.get("config_groups") or {}, Mapping):
        raise FormatError(f"config_groups = {config['config_groups']!r} in the quantization config is not an object")


def _setting(config: Mapping[str, Any], module: str, key: str) -> Any:
    """An entry of the weights' settings in the group of `module`: the one that names it, else one for its class."""
    named, others = list[Any](), list[Any]()
    for name, group in (config.get("config_groups") or {}).items():
        if isinstance(group, list):  # "W4A16": ["Linear"]
            preset = _PRESET.fullmatch(str(name))
            weights: Any = {"num_bits": int(preset[1]), "group_size": 128} if preset else {}
            targets: Any = group
        else:
            weights, targets = (
                group.get(each) if isinstance(group, Mapping) else None for each in ("weights", "targets")
            )
        if not isinstance(weights, Mapping) or not isinstance(targets, list):
            raise FormatError(f"config_groups: {name} in the quantization config has no weights and targets")
        (named if any(_names(str(target), module) for target in targets) else others).append(weights)
    return next((weights.get(key) for weights in [*named, *others]), None)


def _names(target: str, module: str) -> bool:
    try:
        return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module
    except re.error as error:
        raise FormatError(f"{target!r} in the quantization config is not a regular expression: {error}") from None


def _block(config: Mapping[str, Any], module: str) -> tuple[int, int] | None:
    """The rows and columns that share a scale of an FP8 weight; None if the config gives no such block."""
    group = _setting(config, module, "group_size")
    if type(group) is int and group > 0:
        return 1, group
    size = _setting(config, module, "block_structure")
    valid = isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size)
    return (size[0], size[1]) if valid else None
