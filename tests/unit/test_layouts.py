"""Layouts of other makers decode to what their own code gives, whole and by parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations import finegrained_fp8, mxfp4

from fewbit.errors import FormatError
from fewbit.formats.layouts.base import Layout, Packed
from fewbit.formats.layouts.compressed_tensors import CompressedTensors
from fewbit.formats.layouts.fp8 import FP8
from fewbit.formats.layouts.mxfp4 import MXFP4
from fewbit.models.decoded import LAYOUTS as READERS
from fewbit.schemes.base import PartSpec
from tests import packed_models
from tests.packed_models import LAYOUTS


def found(layout: Layout, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Packed, dict[str, Tensor]]:
    """The only packed tensor of a checkpoint, and its parts."""
    (packed,) = layout.find(config, {name: PartSpec.of(t) for name, t in tensors.items()}, tensors.__getitem__).values()
    return packed, {role: tensors[name] for role, name in packed.parts.items()}


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / 8


def test_fp8_blocks_decode_as_in_transformers() -> None:
    codes, scale = weight(256, 384).to(torch.float8_e4m3fn), weight(2, 3).abs()
    tensors = {"P.weight": codes, "P.weight_scale_inv": scale}
    packed, parts = found(FP8(), {"weight_block_size": [128, 128]}, tensors)
    theirs: Any = finegrained_fp8.Fp8Dequantize(None)
    wanted = theirs._dequantize_one(codes, scale)
    torch.testing.assert_close(packed.decode(parts, slice(0, 256)), wanted.float(), rtol=0, atol=0)


def test_fused_fp8_experts_decode_as_each_alone() -> None:
    codes, scale = weight(3, 96, 80).to(torch.float8_e4m3fn), weight(3, 3, 2).abs()
    fused = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scale}
    packed, parts = found(FP8(), {"weight_block_size": [40, 40]}, fused)
    for expert in range(3):
        own = {"P.weight": codes[expert], "P.weight_scale_inv": scale[expert]}
        alone, its = found(FP8(), {"weight_block_size": [40, 40]}, own)
        wanted = alone.decode(its, slice(0, 96))
        assert torch.equal(packed.decode(parts, slice(expert, expert + 1))[0], wanted)


def test_fp4_beside_fp8_decodes_as_in_transformers() -> None:
    codes = torch.randint(-128, 128, (6, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.randint(120, 134, (6, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    packed, parts = found(FP8(), {}, {"P.weight": codes, "P.scale": scale})
    theirs: Any = finegrained_fp8.Fp8Dequantize(None)
    wanted = theirs._dequantize_one(codes, scale, torch.float32)
    assert torch.equal(packed.decode(parts, slice(2, 5)), wanted[2:5])


def test_mxfp4_experts_decode_as_in_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 6, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (3, 6, 2), dtype=torch.uint8, generator=generator)
    packed, parts = found(MXFP4(), {}, {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales})
    wanted = mxfp4.convert_moe_packed_tensors(blocks, scales)
    assert packed.shape == tuple(wanted.shape)
    assert torch.equal(packed.decode(parts, slice(0, 3)), wanted.float())
    assert torch.equal(packed.decode(parts, slice(1, 2)), wanted[1:2].float())


@pytest.mark.parametrize(
    "layout", [name for name, (_, config, _) in LAYOUTS.items() if config["quant_method"] in READERS]
)
def test_rows_decode_as_in_the_whole(layout: str) -> None:
    packer, config, _ = LAYOUTS[layout]
    parts, values = packer(weight(100, 96))
    tensors = {f"P.{name}": tensor for name, tensor in parts.items()}
    packed, handles = found(READERS[config["quant_method"]], config, tensors)
    whole = packed.decode(handles, slice(0, 100))
    torch.testing.assert_close(whole, values, rtol=1e-6, atol=0)
    for start, stop in ((0, 1), (39, 41), (63, 100)):
        assert torch.equal(packed.decode(handles, slice(start, stop)), whole[start:stop])


@pytest.mark.parametrize("width", range(2, 9))
def test_integers_of_every_width_decode(width: int) -> None:
    config = packed_models.groups(num_bits=width, type="int", group_size=32)
    parts, values = packed_models.integers(weight(12, 96), width, symmetric=False)
    packed, handles = found(CompressedTensors(), config, {f"P.{name}": t for name, t in parts.items()})
    torch.testing.assert_close(packed.decode(handles, slice(0, 12)), values, rtol=1e-6, atol=0)


def _two_groups(first: list[str]) -> dict[str, Any]:
    eight = {"targets": first, "weights": {"num_bits": 8, "type": "int"}}
    four = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": four, "group_1": eight}}


@pytest.mark.parametrize("target", ["a.P", "re:.*P$"])
def test_a_group_that_names_a_module_decides_its_bits(target: str) -> None:
    parts, values = packed_models.integers(weight(12, 96), 8)
    tensors = {f"a.P.{name}": t for name, t in parts.items()}
    packed, handles = found(CompressedTensors(), _two_groups([target]), tensors)
    torch.testing.assert_close(packed.decode(handles, slice(0, 12)), values, rtol=1e-6, atol=0)
    with pytest.raises(FormatError, match=r"a\.P\.weight_packed"):
        found(CompressedTensors(), _two_groups(["another"]), tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
        (lambda c: c.update(transform_config={"config_groups": {"u": {}}}), "rotated"),
        (lambda c: c.update(config_groups=[]), "not an object|num_bits"),
        (lambda c: c.update(config_groups={"g": {"targets": "Linear"}}), "no weights and targets"),
        (lambda c: c.update(config_groups={"g": {"targets": ["re:("], "weights": {}}}), "regular expression"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=9), "num_bits = 9"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=True), "num_bits = True"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: Callable[[dict[str, Any]], None], words: str) -> None:
    config = _two_groups(["another"])
    change(config)
    parts, _ = packed_models.integers(weight(12, 96))
    with pytest.raises(FormatError, match=words):
        found(CompressedTensors(), config, {f"P.{name}": t for name, t in parts.items()})
