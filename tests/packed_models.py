"""Quantized models in the layouts of other tools, packed by the definitions of the formats, and their floats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.quantizers import auto

from fewbit import hook, prefer
from fewbit.models.plugin import quantizer
from tests import models

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Parts = dict[str, Tensor]  # the end of a name -> tensor
Packer = Callable[[Tensor], tuple[Parts, Tensor]]  # a weight -> its tensors, and its values in float32


def _expanded(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each entry."""
    rows, columns = torch.arange(shape[-2]) // block[0], torch.arange(shape[-1]) // block[1]
    return scale[rows][:, columns]


def _fp8(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    n, k = w.shape
    scale = torch.empty(-(-n // block[0]), -(-k // block[1]))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = w[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale[i, j] = part.abs().max() / 448
    every = _expanded(scale, block, w.shape)
    codes = (w / every).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * every


def fp8_block(w: Tensor) -> tuple[Parts, Tensor]:
    codes, scale, values = _fp8(w, (40, 40))  # divides no side
    return {"weight": codes, "weight_scale_inv": scale}, values


def fp8_128(w: Tensor) -> tuple[Parts, Tensor]:
    codes, scale, values = _fp8(w, (128, 128))
    return {"weight": codes, "weight_scale_inv": scale}, values


def fp8_tensor(w: Tensor) -> tuple[Parts, Tensor]:
    codes, scale, values = _fp8(w, (w.shape[0], w.shape[1]))
    return {"weight": codes, "weight_scale_inv": scale[0, 0], "activation_scale": torch.ones(())}, values


def fp8_power(w: Tensor) -> tuple[Parts, Tensor]:
    """Scales that are powers of two, stored as exponents."""
    _, scale, _ = _fp8(w, (32, 32))
    exponents = scale.log2().ceil()
    every = _expanded(exponents.exp2(), (32, 32), w.shape)
    codes = (w / every).to(torch.float8_e4m3fn)
    stored = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return {"weight": codes, "weight_scale_inv": stored}, codes.float() * every


def fp8_channel(w: Tensor) -> tuple[Parts, Tensor]:
    codes, scale, values = _fp8(w, (1, w.shape[1]))
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}, values


def fp8_blocks(w: Tensor, block: tuple[int, int] = (40, 40)) -> tuple[Parts, Tensor]:
    """Blocks for which fewbit has no scheme."""
    codes, scale, values = _fp8(w, block)
    return {"weight": codes, "weight_scale": scale}, values


def _bits(codes: Tensor, width: int) -> Tensor:
    """Rows of codes as one stream of bits each, the lowest bit first, in words."""
    array = codes.numpy().astype(np.uint8)
    bits = np.unpackbits(array[..., None], axis=-1, bitorder="little")[..., :width].reshape(len(array), -1)
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())


def integers(w: Tensor, width: int = 4, group: int = 32, *, symmetric: bool = True) -> tuple[Parts, Tensor]:
    """pack-quantized."""
    n, k = w.shape
    grouped, middle = w.reshape(n, -1, group), 2 ** (width - 1)
    if symmetric:
        scale, zero = grouped.abs().amax(-1) / (middle - 0.5), torch.zeros(n, k // group)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / (2 * middle - 1)
        zero = (-middle - low / scale).round().clamp(-middle, middle - 1)
    scale = scale.bfloat16()
    every, shift = scale.float().repeat_interleave(group, 1), zero.repeat_interleave(group, 1)
    codes = (w / every + shift).round().clamp(-middle, middle - 1)
    parts = {
        "weight_packed": _bits(codes + middle, width),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        parts["weight_zero_point"] = _bits((zero + middle).T, width).T.contiguous()
    return parts, (codes - shift) * every


def integers_in_order(w: Tensor) -> tuple[Parts, Tensor]:
    """pack-quantized with the group of each column in a tensor (act-order of older files)."""
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))
    parts, values = integers(w[:, order])
    groups = torch.empty(w.shape[1], dtype=torch.int32)
    groups[order] = torch.arange(w.shape[1], dtype=torch.int32) // 32
    codes = np.unpackbits(parts["weight_packed"].numpy().view(np.uint8), axis=1, bitorder="little")
    codes = (codes.reshape(len(w), -1, 4) * np.array([1, 2, 4, 8])).sum(-1)[:, : w.shape[1]]
    back = order.argsort()
    parts["weight_packed"] = _bits(torch.from_numpy(codes)[:, back], 4)
    return {**parts, "weight_g_idx": groups}, values[:, back]


def int8_channel(w: Tensor) -> tuple[Parts, Tensor]:
    """int-quantized, asymmetric."""
    scale = ((w.amax(1) - w.amin(1)) / 255)[:, None].bfloat16()
    zero = (-128 - w.amin(1, keepdim=True) / scale.float()).round().clamp(-128, 127)
    codes = (w / scale.float() + zero).round().clamp(-128, 127)
    parts = {"weight": codes.to(torch.int8), "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    return parts, (codes - zero) * scale.float()


def _fp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest values, and these values."""
    codes = (w.unsqueeze(-1) - E2M1).abs().argmin(-1)
    return codes.to(torch.uint8), E2M1[codes]


def _pairs(codes: Tensor) -> Tensor:
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def nvfp4(w: Tensor) -> tuple[Parts, Tensor]:
    whole = 448 * 6 / w.abs().max()
    scale = (whole * w.reshape(len(w), -1, 16).abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    every = (scale.float() / whole).repeat_interleave(16, 1)
    codes, values = _fp4(w / every)
    parts = {"weight_packed": _pairs(codes), "weight_scale": scale, "weight_global_scale": whole.reshape(1)}
    return {**parts, "input_global_scale": torch.ones(1)}, values * every


def modelopt_nvfp4(w: Tensor) -> tuple[Parts, Tensor]:
    parts, _ = nvfp4(w)
    codes, scale, whole = parts["weight_packed"], parts["weight_scale"], 1 / parts["weight_global_scale"][0]
    values = E2M1[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
    every = (scale.float() * whole).repeat_interleave(16, 1)
    own = {"weight": codes, "weight_scale": scale, "weight_scale_2": whole}
    return {**own, "input_scale": torch.ones(())}, values * every


def mxfp4(w: Tensor) -> tuple[Parts, Tensor]:
    exponents = w.reshape(len(w), -1, 32).abs().amax(-1).log2().floor() - 2
    every = exponents.exp2().repeat_interleave(32, 1)
    codes, values = _fp4(w / every)
    return {"weight_packed": _pairs(codes), "weight_scale": (exponents + 127).to(torch.uint8)}, values * every


def fp4_experts(fused: Tensor) -> tuple[Parts, Tensor]:
    """A fused parameter [E, K, N] of gpt-oss."""
    exponents = fused.mT.unflatten(-1, (-1, 32)).abs().amax(-1).log2().floor() - 2
    codes, values = _fp4(fused.mT.unflatten(-1, (-1, 32)) / exponents.exp2().unsqueeze(-1))
    parts = {"_blocks": _pairs(codes), "_scales": (exponents + 127).to(torch.uint8)}
    return parts, (values * exponents.exp2().unsqueeze(-1)).flatten(-2).mT


def groups(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


_FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
_INT4 = groups(num_bits=4, type="int", group_size=32, symmetric=True)
# Name -> how a weight is packed, the quantization_config, and what fewbit calls it.
LAYOUTS: dict[str, tuple[Packer, dict[str, Any], str]] = {
    "fp8-block": (fp8_block, {**_FP8, "weight_block_size": [40, 40]}, "FP8, block 40x40"),
    "fp8-b128": (fp8_128, {**_FP8, "weight_block_size": [128, 128]}, "fp8-b128"),
    "fp8-power": (fp8_power, {**_FP8, "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}, "FP8, block 32x32"),
    "fp8-tensor": (fp8_tensor, _FP8, "fp8-tensor"),
    "fp8-autofp8": (fp8_channel, _FP8, "fp8-row"),
    "ct-fp8": (fp8_channel, groups(num_bits=8, type="float", strategy="channel"), "compressed-tensors fp8-row"),
    "ct-fp8-blocks": (
        fp8_blocks,
        groups(num_bits=8, type="float", strategy="block", block_structure=[40, 40]),
        "FP8, block 40x40",
    ),
    "ct-int4": (integers, _INT4, "compressed-tensors int4-g32-sym-bf16"),
    "ct-int4-order": (integers_in_order, _INT4, "compressed-tensors int4-g32-sym-bf16"),
    "ct-int3-asym": (
        lambda w: integers(w, 3, symmetric=False),
        groups(num_bits=3, type="int", group_size=32, symmetric=False),
        "compressed-tensors int3-g32-bf16",
    ),
    "ct-int8": (
        int8_channel,
        groups(num_bits=8, type="int", strategy="channel", symmetric=False),
        "compressed-tensors int8-row-bf16",
    ),
    "ct-nvfp4": (
        nvfp4,
        groups(num_bits=4, type="float", strategy="tensor_group", group_size=16),
        "compressed-tensors nvfp4",
    ),
    "modelopt-fp8": (fp8_channel, {"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt fp8-row"),
    "modelopt-nvfp4": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt nvfp4-mul"),
    "ct-mxfp4": (mxfp4, groups(num_bits=4, type="float", strategy="group", group_size=32), "compressed-tensors mxfp4"),
}


def pack(plain: Path, packed: Path, layout: str, only: str = "proj.weight") -> Path:
    """Pack the matrices of the model in `plain` into the new folder `packed`, and round those in `plain` alike.

    `plain` then holds the dequantized model, in its dtype. only: how names of packed tensors end.
    """
    packer, config, _ = LAYOUTS[layout]
    stored, floats = dict[str, Tensor](), models.tensors_of(plain)
    for name, tensor in floats.items():
        if name.endswith(only) and tensor.dim() == 2:
            parts, values = packer(tensor.float())
            stored |= {f"{name.removesuffix('weight')}{part}": each.contiguous() for part, each in parts.items()}
            floats[name] = values.to(tensor.dtype)
        else:
            stored[name] = tensor
    return written(plain, packed, floats, stored, config)


def pack_mixed(plain: Path, packed: Path, layouts: Mapping[str, str]) -> Path:
    """The same in one file of compressed-tensors. layouts: the leaf of a name, such as "q_proj" -> its layout."""
    stored, floats, entries = dict[str, Tensor](), models.tensors_of(plain), dict[str, Any]()
    for leaf, layout in layouts.items():
        packer, config, _ = LAYOUTS[layout]
        entries[leaf] = {**config["config_groups"]["group_0"], "targets": [f"re:.*{leaf}$"]}
        for name in [name for name in floats if name.endswith(f".{leaf}.weight")]:
            parts, values = packer(floats[name].float())
            stored |= {f"{name.removesuffix('weight')}{part}": each.contiguous() for part, each in parts.items()}
            floats[name] = values.to(floats[name].dtype)
    kept = {name: each for name, each in floats.items() if name.split(".")[-2] not in layouts}
    config = {"quant_method": "compressed-tensors", "config_groups": entries, "ignore": ["lm_head"]}
    return written(plain, packed, floats, {**kept, **stored}, config)


def pack_gpt_oss(plain: Path, packed: Path) -> Path:
    """The same for the fused experts of gpt-oss."""
    stored, floats = dict[str, Tensor](), models.tensors_of(plain)
    for name, tensor in floats.items():
        if tensor.dim() == 3:
            parts, values = fp4_experts(tensor.float())
            stored |= {f"{name}{part}": each.contiguous() for part, each in parts.items()}
            floats[name] = values.to(tensor.dtype).contiguous()
        else:
            stored[name] = tensor
    return written(plain, packed, floats, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def written(
    plain: Path, packed: Path, floats: Mapping[str, Tensor], stored: Mapping[str, Tensor], config: dict[str, Any]
) -> Path:
    """Write both folders."""
    shutil.copytree(plain, packed)
    for folder, tensors in ((plain, floats), (packed, stored)):
        for old in folder.glob("*.safetensors*"):
            old.unlink()
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    models.edit_json(packed / "config.json", quantization_config=config)
    return packed


def edit(folder: Path, changes: Mapping[str, Tensor | None]) -> Path:
    """Replace tensors of a packed folder; None removes one."""
    tensors = {**models.tensors_of(folder), **changes}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def record(folder: Path) -> Any:
    """The record of fewbit in an output folder."""
    return json.loads((folder / "fewbit.json").read_text(encoding="utf-8"))


def same_files(one: Path, other: Path) -> None:
    """Assert that the tensors of two folders have the same names, dtypes, shapes and bytes."""
    found, wanted = models.tensors_of(one), models.tensors_of(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@contextmanager
def preferred(method: str) -> Iterator[None]:
    """Inside this context, fewbit serves the method even where transformers has a back end, as after `prefer`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hook, "preferred", set())
        patch.setattr(auto, "AUTO_QUANTIZER_MAPPING", dict(auto.AUTO_QUANTIZER_MAPPING))
        prefer(method)
        assert auto.AUTO_QUANTIZER_MAPPING[method] is quantizer.FewbitQuantizer
        yield
