"""ModelOpt's FP8 and NVFP4 models as users have them: loaded packed, saved again in the same bytes, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.errors import FormatError, PlanError
from fewbit.nn.fused import packed_linears
from tests import architectures, models, packed_models

IDS = torch.arange(24)[None] + 3
NAME = "model.layers.0.mlp.down_proj"
LAYOUTS = ["modelopt-fp8", "modelopt-nvfp4"]


def packed_model(tmp_path: Path, layout: str) -> Path:
    plain = models.save(tmp_path / "plain", "llama", dtype="float32")
    return packed_models.pack(plain, tmp_path / "packed", layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_pretrained_keeps_it_packed_and_saves_it_again(layout: str, tmp_path: Path) -> None:
    packed = packed_model(tmp_path, layout)
    loaded: Any = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    assert len(packed_linears(loaded)) == 14
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    wanted = models.logits(plain, IDS)
    assert (models.logits(loaded, IDS) - wanted).norm() < 1e-3 * wanted.norm()
    loaded.save_pretrained(tmp_path / "again")
    packed_models.same_files(tmp_path / "again", packed)
    again = models.quantization_of(tmp_path / "again")
    assert again == packed_models.LAYOUTS[layout][1]
    values, own = models.tensors_of(tmp_path / "plain"), fewbit.load(tmp_path / "again").dequantize().state_dict()
    assert all(torch.equal(own[name].float(), tensor.float()) for name, tensor in values.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_of_modelopt_stay_packed(layout: str, tmp_path: Path) -> None:
    plain = architectures.save(tmp_path / "plain", "qwen3_moe")
    packed = packed_models.pack(plain, tmp_path / "packed", layout)
    model, stored = fewbit.load(packed, device="cpu"), models.tensors_of(packed)
    assert len(packed_linears(model)) == sum(name.endswith(".weight_scale") for name in stored)
    model.save_pretrained(tmp_path / "again")
    packed_models.same_files(tmp_path / "again", packed)
    values, own = models.tensors_of(plain), model.dequantize().state_dict()
    assert sum(".experts." in name for name in values) > 10
    assert all(torch.equal(own[name].float(), tensor.float()) for name, tensor in values.items())


def test_a_config_beside_config_json_is_found(tmp_path: Path) -> None:
    """Older ModelOpt folders say nothing in config.json."""
    packed = packed_model(tmp_path, "modelopt-nvfp4")
    models.edit_json(packed / "config.json", quantization_config=None)
    settings = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"]}
    own = {"producer": {"name": "modelopt", "version": "0.47"}, "quantization": settings}
    (packed / "hf_quant_config.json").write_text(json.dumps(own), encoding="utf-8")
    loaded: Any = AutoModelForCausalLM.from_pretrained(packed)
    assert len(packed_linears(loaded)) == len(packed_linears(fewbit.load(packed, device="cpu"))) == 14
    loaded.save_pretrained(tmp_path / "again")
    packed_models.same_files(tmp_path / "again", packed)
    assert len(packed_linears(fewbit.load(tmp_path / "again", device="cpu"))) == 14


@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1), (1, 1, 1, 1)])
def test_scales_of_every_shape_are_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Of the tensor, of rows, and of the one block of a matrix [64, 96]."""
    packed = packed_model(tmp_path, "modelopt-fp8")
    stored = models.tensors_of(packed)[f"{NAME}.weight"]
    scale = torch.full(shape, 0.25)
    packed_models.edit(packed, {f"{NAME}.weight_scale": scale, f"{NAME}.k_scale": torch.ones(())})
    model = fewbit.load(packed, device="cpu")
    model.save_pretrained(tmp_path / "again")
    packed_models.same_files(tmp_path / "again", packed)
    assert torch.equal(model.dequantize().get_submodule(NAME).weight.float(), 0.25 * stored.float())


CODES = torch.zeros(64, 48, dtype=torch.uint8)
BAD = {
    "FP8 scale of 0": ("modelopt-fp8", "weight_scale", torch.zeros(64, 1), "weight_scale has numbers that are not"),
    "negative": ("modelopt-fp8", "weight_scale", -torch.ones(64, 1), "weight_scale has numbers that are not above 0"),
    "FP8 NaN": ("modelopt-fp8", "weight_scale", torch.full((64, 1), torch.nan), "weight_scale has NaN"),
    "infinite": ("modelopt-fp8", "weight_scale", torch.full((64, 1), torch.inf), "weight_scale has"),
    "no scale": ("modelopt-fp8", "weight_scale", None, "weight_scale is missing"),
    "rows": ("modelopt-fp8", "weight_scale", torch.ones(63), r"weight_scale is float32 \[63\]; \[\] or \[64, 1\]"),
    "MXFP8": ("modelopt-fp8", "weight_scale", CODES[:, :3], r"weight_scale is uint8 \[64, 3\]; a float"),
    "integers": ("modelopt-fp8", "weight", torch.zeros(64, 96, dtype=torch.int8), "weight is int8"),
    "floats": ("modelopt-fp8", "weight", torch.zeros(64, 96, dtype=torch.bfloat16), "weight is bfloat16"),
    "E5M2": ("modelopt-fp8", "weight", torch.zeros(64, 96, dtype=torch.float8_e5m2), "weight is float8_e5m2"),
    "no weight": ("modelopt-fp8", "weight", None, "weight is missing"),
    "two scales": ("modelopt-fp8", "weight_scale_2", torch.ones(()), "weight is float8_e4m3fn"),
    "no second scale": ("modelopt-nvfp4", "weight_scale_2", None, "weight_scale_2 is missing"),
    "second of 0": ("modelopt-nvfp4", "weight_scale_2", torch.zeros(()), "weight_scale_2 has numbers that are not"),
    "second NaN": ("modelopt-nvfp4", "weight_scale_2", torch.tensor(torch.nan), "weight_scale_2 has NaN"),
    "second for rows": ("modelopt-nvfp4", "weight_scale_2", torch.ones(64), r"weight_scale_2 is float32 \[64\]"),
    "groups of 32": ("modelopt-nvfp4", "weight_scale", torch.ones(64, 3).to(torch.float8_e4m3fn), r"\[64, 6\]"),
    "columns": ("modelopt-nvfp4", "weight", CODES[:, :44].contiguous(), "weight is uint8"),
    "AWQ": ("modelopt-nvfp4", "pre_quant_scale", torch.ones(96), "pre_quant_scale changes what"),
    "fused": ("modelopt-nvfp4", "gate_up_proj", CODES[None], r"gate_up_proj is uint8 \[1, 64, 48\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_by_its_tensor(case: str, tmp_path: Path) -> None:
    layout, part, tensor, words = BAD[case]
    packed = packed_model(tmp_path, layout)
    packed_models.edit(packed, {f"{NAME}.{part}": tensor})
    for load in (AutoModelForCausalLM.from_pretrained, fewbit.load):
        with pytest.raises(FormatError, match=f"{NAME}.*{words}"):
            load(packed)


def test_another_group_size_is_named(tmp_path: Path) -> None:
    packed = packed_model(tmp_path, "modelopt-nvfp4")
    settings = {**packed_models.LAYOUTS["modelopt-nvfp4"][1], "group_size": 32}
    models.edit_json(packed / "config.json", quantization_config=settings)
    with pytest.raises(FormatError, match=r"group_size = 32 .*_proj.weight is NVFP4"):
        fewbit.load(packed)


def test_a_plan_and_a_conversion_cannot_write_it(tmp_path: Path) -> None:
    model = models.save(tmp_path / "plain", "llama")
    plan = tmp_path / "plan.json"
    plan.write_text(
        json.dumps({"name": "own", "format": "modelopt", "rules": [{"match": "*", "scheme": "fp8-row"}]}),
        encoding="utf-8",
    )
    with pytest.raises(PlanError, match="modelopt"):
        fewbit.quantize(model, tmp_path / "out", plan=plan, progress=False)
    with pytest.raises(PlanError, match="modelopt"):
        fewbit.convert(model, tmp_path / "out", to="modelopt")
