"""Layouts of other makers decode to what their own code gives, whole and by parts."""

from __future__ import annotations

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


@pytest.mark.parametrize("layout", ["fp8-block", "fp8-b128", "fp8-power", "fp8-tensor", "fp8-autofp8", "ct-fp8-blocks"])
def test_rows_decode_as_in_the_whole(layout: str) -> None:
    packer, config, _ = LAYOUTS[layout]
    parts, values = packer(weight(100, 96))
    check_rows(READERS[config["quant_method"]], config, parts, values)


def check_rows(layout: Layout, config: dict[str, Any], tensors: dict[str, Tensor], values: Tensor) -> None:
    """Assert that a weight of 100 rows decodes to `values`, whole and by parts."""
    packed, handles = found(layout, config, {f"P.{name}": tensor for name, tensor in tensors.items()})
    whole = packed.decode(handles, slice(0, 100))
    torch.testing.assert_close(whole, values, rtol=1e-6, atol=0)
    for start, stop in ((0, 1), (39, 41), (63, 100)):
        assert torch.equal(packed.decode(handles, slice(start, stop)), whole[start:stop])


@pytest.mark.parametrize("kind", ["E5M2", "groups", "E8M0"])
def test_fp8_without_a_scheme_decodes(kind: str) -> None:
    """The kinds of FP8 in compressed-tensors that have no scheme, besides blocks of other sizes."""
    columns = 96 if kind == "E5M2" else 32
    exponents = weight(100, 96).unflatten(1, (-1, columns)).abs().amax(-1).log2().ceil()
    codes = (weight(100, 96) / exponents.exp2().repeat_interleave(columns, 1)).to(
        torch.float8_e5m2 if kind == "E5M2" else torch.float8_e4m3fn
    )
    scale = (exponents + 127).to(torch.uint8) if kind == "E8M0" else exponents.exp2()
    size: dict[str, Any] = {"strategy": "channel"} if kind == "E5M2" else {"strategy": "group", "group_size": 32}
    values = codes.float() * exponents.exp2().repeat_interleave(columns, 1)
    config = packed_models.groups(num_bits=8, type="float", **size)
    check_rows(CompressedTensors(), config, {"weight": codes, "weight_scale": scale}, values)


@pytest.mark.parametrize("target", ["P", "re:P$"])
def test_a_group_that_names_a_module_decides_its_blocks(target: str) -> None:
    """Scales [5, 4] fit a weight [100, 96] with blocks of 24 x 24 and of 22 x 28."""
    parts, values = packed_models.fp8_blocks(weight(100, 96), (24, 24))
    check_rows(CompressedTensors(), _two_groups([target], other=[22, 28]), parts, values)
    with pytest.raises(FormatError, match=r"P\.weight_scale is float32 \[5, 4\]; \[3, 2\]"):
        found(
            CompressedTensors(), _two_groups(["re:Q$"], other=[40, 50]), {f"P.{name}": t for name, t in parts.items()}
        )


def _two_groups(first: list[str], other: list[int]) -> dict[str, Any]:
    """Blocks of 24 x 24 for the targets `first`, and of the size `other` for all other linears."""

    def group(targets: list[str], block: list[int]) -> dict[str, Any]:
        weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": block}
        return {"targets": targets, "weights": weights}

    groups = {"group_0": group(["Linear"], other), "group_1": group(first, [24, 24])}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


def test_fp8_without_scales_names_them() -> None:
    config = LAYOUTS["ct-fp8-blocks"][1]
    with pytest.raises(FormatError, match=r"P\.weight_scale is missing"):
        found(CompressedTensors(), config, {"P.weight": weight(100, 96).to(torch.float8_e4m3fn)})
