"""FP8 weights in the layout of DeepSeek-V3, which transformers calls fine-grained FP8, and its relatives.

    T              float8_e4m3fn [..., N, K]     the weight; [E, N, K] for fused experts
    T_scale_inv    float32, bfloat16 or E8M0     its scales, which multiply the weight, despite the name

The scales have the shape [ceil(N / 128), ceil(K / 128)] for blocks as in `weight_block_size`, [N] or [N, 1] for one
scale per output channel, and one element for the whole tensor. Other names of the scales: `T_scale` (AutoFP8),
`P.scale` (DeepSeek-V4) and `P.qscale_weight` (Mistral), where T is `P.weight`. DeepSeek-V4 stores experts as FP4 in the
same way: int8 [N, K / 2] with a scale for 32 columns. Source: transformers 5.24, integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import called, missing, wrong
from fewbit.formats.layouts.base import Handles, Layout, Packed, Read, is_float, is_fp8
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import PartSpec
from fewbit.schemes.floats import e2m1, e8m0, scaled

_UNUSED = ("activation_scale", "input_scale")  # scales of activations


class FP8(Layout):
    """Reads FP8 weights with scales for blocks, channels or whole tensors, and FP4 weights beside them."""

    quant_method: ClassVar[str] = "fp8"

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec], read: Read) -> dict[str, Packed]:
        block = block_size(config)
        found, owners = {}, set()
        for name, spec in names.items():
            scale = next((each for each in scale_names(name) if each in names), None)
            if is_fp8(spec) and not is_scale(name, names):
                if scale is None:
                    raise missing(scale_names(name)[0], f"{name}, which is {called(spec.dtype)},")
                found[name] = packed_fp8(name, spec, scale, names[scale], block)
            elif scale is not None and spec.dtype in (torch.int8, torch.uint8):
                found[name] = _packed_fp4(name, spec, scale, names[scale])
            elif scale is not None and scale.endswith("_scale_inv"):
                raise wrong(name, spec, f"float8_e4m3fn beside {scale}")
            owners.add(scale)
        for name in names:
            if name.endswith("_scale_inv") and name not in owners:
                raise missing(name.removesuffix("_scale_inv"), name)
        if not found:
            raise FormatError(f"the config says {self.quant_method}, but no tensor is float8_e4m3fn")
        return found


class FbgemmFP8(FP8):
    """Reads FP8 weights that transformers' FBGEMM back end stored, with one scale for each output channel."""

    quant_method: ClassVar[str] = "fbgemm_fp8"


def packed_fp8(
    name: str,
    spec: PartSpec,
    scale: str,
    scales: PartSpec,
    block: tuple[int, int] | None,
    unused: Sequence[str] = _UNUSED,
) -> Packed:
    """The FP8 weight `name` with the scales `scale`. FormatError if their shape fits no kind of scale.

    unused: suffixes of scales of activations.
    """
    shape = spec.shape
    if len(shape) not in (2, 3) or not min(shape):
        raise wrong(name, spec, "two dimensions, or three for fused experts")
    if not is_float(scales) and scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise wrong(scale, scales, "a float")
    *lead, n, k = shape
    grids = {"per channel": (1, k), "per tensor": (n, k)}
    if block is not None:
        grids = {f"block {block[0]}x{block[1]}": block, **grids}
    fitting = {how: size for how, size in grids.items() if scales.shape in _shapes(lead, n, k, size)}
    if not fitting:
        wanted = [list(_shapes(lead, n, k, size)[0]) for size in grids.values()]
        raise wrong(scale, scales, f"{' or '.join(map(str, wanted))} for {name} of shape {list(shape)}")
    how, size = next(iter(fitting.items()))
    module = name.rpartition(".")[0]
    return Packed(
        shape=shape,
        kind=f"FP8, {how}" if spec.dtype == torch.float8_e4m3fn else f"FP8 (E5M2), {how}",
        parts={"weight": name, "scale": scale},
        decode=partial(_decode, shape=shape, size=size, four=False),
        scales=("scale",),
        unused=tuple(f"{module}.{suffix}" for suffix in unused),
    )


def _packed_fp4(name: str, spec: PartSpec, scale: str, scales: PartSpec) -> Packed:
    if len(spec.shape) not in (2, 3):
        raise wrong(name, spec, "two dimensions, or three for fused experts")
    *lead, n, half = spec.shape
    if scales.shape != (*lead, n, half // 16) or half % 16:
        raise wrong(scale, scales, f"{[*lead, n, half // 16]} for {name}, FP4 with a scale for 32 columns,")
    return Packed(
        shape=(*lead, n, 2 * half),
        kind="MXFP4",
        parts={"weight": name, "scale": scale},
        decode=partial(_decode, shape=(*lead, n, 2 * half), size=(1, 32), four=True),
        scales=("scale",),
    )


def _decode(parts: Handles, rows: slice, *, shape: tuple[int, ...], size: tuple[int, int], four: bool) -> Tensor:
    values = parts["weight"][rows]
    values = e2m1(values) if four else values.float()
    grid = (*shape[:-2], -(-shape[-2] // size[0]), -(-shape[-1] // size[1]))
    scales = parts["scale"][...].reshape(grid)
    scales = e8m0(scales) if scales.dtype in (torch.uint8, torch.float8_e8m0fnu) else scales
    if len(shape) == 3:
        return scaled(values, scales[rows], size)
    return scaled(values, scales[rows.start // size[0] : -(-rows.stop // size[0])], size, rows.start)


def _shapes(lead: list[int], n: int, k: int, size: tuple[int, int]) -> list[tuple[int, ...]]:
    """The shapes that scales of blocks of this size may have."""
    grid = (*lead, -(-n // size[0]), -(-k // size[1]))
    flat = [grid[:-1]] if grid[-1] == 1 else []
    if grid[-2:] == (1, 1):
        flat += [tuple(lead), *([()] if not lead else [])]
    return [grid, *flat]


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block with one scale; None for one scale for each row or tensor."""
    size = config.get("weight_block_size")
    if size is None:
        return None
    pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not pair or not all(type(each) is int and each > 0 for each in size):
        raise FormatError(
            f"weight_block_size = {size!r} in the quantization config", "Two integers above 0 are expected."
        )
    return size[0], size[1]


def scale_names(name: str) -> list[str]:
    """The names that the scales of the tensor `name` may have."""
    module, _, leaf = name.rpartition(".")
    others = [f"{module}.scale", f"{module}.qscale_weight"] if leaf == "weight" else []
    return [f"{name}_scale_inv", f"{name}_scale", *others]


def is_scale(name: str, names: Mapping[str, PartSpec]) -> bool:
    """Whether the tensor `name` holds the scales of another tensor."""
    return any(name.endswith(end) and name.removesuffix(end) in names for end in ("_scale_inv", "_scale"))
