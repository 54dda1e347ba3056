"""On an NVIDIA GPU: models in FP8, MXFP4 and NVFP4 stay packed, and the kernels for that GPU multiply by them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.nn.fused import packed_linears
from fewbit.plans.plan import Plan, Rule
from tests import architectures, models, packed_models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
IDS = torch.arange(24)[None] + 3


def kernels_there(folder: Path) -> set[str]:
    """The kernels that serve a model there. Its logits are those that it has here."""
    here = models.logits(fewbit.load(folder, device="cpu", dtype=torch.float32, kernel="reference"), IDS)
    model = fewbit.load(folder, device="cuda", dtype=torch.bfloat16)
    linears = packed_linears(model).values()
    assert linears
    there = models.logits(model, IDS.cuda()).float().cpu()
    assert (there - here).norm() < 3e-2 * here.norm()
    return {linear.kernel.name for linear in linears if linear.kernel is not None}


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("fp8", "fp8-b128"),
        ("fp8", "fp8-tensor"),
        ("compressed-tensors", "fp8-row"),
        ("compressed-tensors", "mxfp4"),
        ("compressed-tensors", "nvfp4"),
    ],
)
def test_models_stay_packed_there(format: str, scheme: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "llama", dtype="bfloat16", hidden_size=256, intermediate_size=384)
    fewbit.quantize(folder, tmp_path / "out", plan=Plan("plan", format, (Rule("*", scheme),)), device="cuda")
    assert kernels_there(tmp_path / "out") == {"nvidia"}


def test_experts_of_gpt_oss_stay_packed_there(tmp_path: Path) -> None:
    plain = architectures.save(tmp_path / "plain", "gpt_oss")
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    every = {"num_experts_per_tok": config["num_local_experts"]}  # else rounding to bfloat16 chooses other experts
    (plain / "config.json").write_text(json.dumps(config | every), encoding="utf-8")
    kernels_there(packed_models.pack_gpt_oss(plain, tmp_path / "packed"))


@pytest.mark.parametrize("width", [128, 64])
def test_experts_stay_packed_there(width: int, tmp_path: Path) -> None:
    """Blocks of 128 rows fit into experts, or they do not; then experts are multiplied one at a time."""
    config = architectures.config("qwen3_moe")
    config.update({"hidden_size": 128, "moe_intermediate_size": width})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    architectures.draw(model, 0)
    model.save_pretrained(tmp_path / "plain")
    models.tokenizer().save_pretrained(tmp_path / "plain")
    packed = packed_models.pack(tmp_path / "plain", tmp_path / "packed", "fp8-b128")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert "nvidia" in kernels_there(packed)
    assert any("one expert at a time" in str(each.message) for each in given) == (width == 64)
